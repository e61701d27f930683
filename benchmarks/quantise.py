"""Time and peak memory of `convert --quantize` against `cp`, and with --adapter of one merged onto what it wrote.

    python benchmarks/quantise.py [--gb 2] [--rounds 2] [--forms fp8 fp8-block mxfp4 nvfp4 int4] [--adapter]

Makes a synthetic Mixtral-shaped bf16 checkpoint, and quantises its experts. Each job is a process of its own; nobody
waits for the disk (`--no-fsync`), and files are in the page cache. `cp` copies the bf16 model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from quantised_loss import make_adapter
from rescale import make_checkpoint
from timing import compare, in_own_process, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--forms", nargs="+", default=["fp8", "fp8-block", "mxfp4", "nvfp4", "int4"])
    options = parser.parse_args()
    tool = [sys.executable, "-m", "moesurgery"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model, out = work / "model", work / "out"
        in_own_process(make_checkpoint, model, options.gb, 2)
        in_own_process(make_adapter, model, work / "adapter")
        jobs = {"cp": ["cp", "-r", str(model), str(out)]}
        for form in options.forms:
            quantise = [*tool, "convert", str(model), "--quantize", form, "--no-fsync", "-q"]
            jobs[f"convert --quantize {form}"] = [*quantise, "-o", str(out)]
            if not options.adapter:
                continue
            timed([*quantise, "-o", str(work / form)])
            recipe = work / f"{form}.yml"
            recipe.write_text(f"models:\n- model: {work / form}+{work / 'adapter'}\nmerge_method: passthrough\n")
            jobs[f"adapter onto {form}"] = [*tool, "merge", str(recipe), "--no-fsync", "-q", "-o", str(out)]
        compare(jobs, out, options.rounds)


if __name__ == "__main__":
    main()
