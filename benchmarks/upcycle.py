"""Time and peak memory of `moesurgery upcycle` against `cp` of the output's bytes, in one run.

    python benchmarks/upcycle.py [--gb 2] [--shards 4] [--rounds 3] [--mergekit PATH/TO/mergekit-moe]

Makes a synthetic Mistral-shaped bf16 checkpoint whose upcycle to 8 experts has about `--gb` GB, upcycles it, and then
runs the commands in turn, each as a process of its own: `cp` copies what the upcycle wrote. Reported are the medians
of wall time, CPU time and peak resident memory, the ratio to `cp`, and the disk space that the output takes. Files are
in the page cache. `cp` does not wait for the disk, moesurgery does (fsync before rename): compare its rows with `cp
and sync`, and `--no-fsync` with `cp`. The proof on a shrunk clone imports transformers and runs tiny models: a constant
number of seconds, in a row of its own. Memory flat means: as much for `--gb 4` as for `--gb 1`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthetic import write_checkpoint
from timing import compare, in_own_process, timed

EXPERTS = 8
HIDDEN, WIDTH = 1024, 3584


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> None:
    """Write a Mistral-shaped checkpoint of bf16 normals whose FFNs, eight times over, make about `gigabytes` GB."""
    layer_bytes = 2 * (EXPERTS * 3 * HIDDEN * WIDTH + 4 * HIDDEN * HIDDEN)
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 8192,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": max(shards, round(gigabytes * 1e9 / layer_bytes)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }

    def layer(at: str, normal: Callable[..., Any]) -> dict[str, Any]:
        tensors = {f"{at}mlp.{p}_proj.weight": normal(WIDTH, HIDDEN) for p in ("gate", "up")}
        return {**tensors, f"{at}mlp.down_proj.weight": normal(HIDDEN, WIDTH)}

    write_checkpoint(folder, config, shards, layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-moe in an environment of its own")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    tool = [str(Path(sys.executable).parent / "moesurgery")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        model, whole, out = work / "model", work / "whole", work / "out"
        in_own_process(make_checkpoint, model, options.gb, options.shards)
        upcycle = [*tool, "upcycle", str(model), "--experts", str(EXPERTS), "-q"]
        timed([*upcycle, "--no-proof", "-o", str(whole)])
        size = sum(f.stat().st_size for f in whole.iterdir())
        source = sum(f.stat().st_size for f in model.iterdir())
        load = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{source / 1e9:.2f} GB dense, {size / 1e9:.2f} GB mixture; {load}")
        upcycle += ["-o", str(out)]
        jobs = {
            "cp of the output": ["cp", "-r", str(whole), str(out)],
            "cp and sync": ["sh", "-c", f"cp -r {whole} {out} && sync {out}/*"],
            "upcycle, copies": [*upcycle, "--no-proof"],
            "the same, --no-fsync": [*upcycle, "--no-proof", "--no-fsync"],
            "upcycle with the proof": upcycle,
            "upcycle, --granularity 2": [*upcycle, "--no-proof", "--granularity", "2"],
        }
        if options.mergekit:
            recipe = work / "mergekit.yml"
            experts = f"  - source_model: {model}\n" * EXPERTS
            recipe.write_text(f"base_model: {model}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}")
            jobs["mergekit-moe"] = [options.mergekit, str(recipe), str(out), "--quiet"]
        compare(jobs, out, options.rounds)


if __name__ == "__main__":
    main()
