"""Writers and `validate` at a given size, each against `cp` of the bytes it writes or reads; killed and resumed.

    python benchmarks/at_size.py --gb 100 [--shards 40] [--folder WORK]

Needs about 3.2 times --gb of disk: two Mixtral-shaped bf16 checkpoints, a dense one whose upcycle to 8 experts has as
many bytes, and one output. Every command is a process of its own. Then each writer is killed (SIGKILL) when half of its
shards are written, and run again: printed are the seconds of that run, and that its files are those of the first one.
`cp` copies the first checkpoint, without and with `sync`, three times in turn; the medians count. `validate` reads all
values. Peak memory is the resident set. The last column is what 1 TB would take at the same seconds per byte: on
paper, not measured.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rescale
import upcycle
from timing import ENVIRONMENT, in_own_process, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, required=True)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        for model in ("a", "b"):
            in_own_process(rescale.make_checkpoint, work / model, options.gb, options.shards)
        in_own_process(upcycle.make_checkpoint, work / "dense", options.gb, options.shards)
        recipe = work / "merge.yaml"
        models = ", ".join(f"{{model: {work / model}}}" for model in ("a", "b"))
        recipe.write_text(f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: [{models}]\n")
        run(work, recipe, options.shards)


def run(work: Path, recipe: Path, shards: int) -> None:
    tool = [sys.executable, "-m", "moesurgery"]
    a, out = work / "a", work / "out"
    end = ["-q", "-o", str(out)]
    writers = {
        "rescale, all down-projections": [*tool, "rescale", str(a), "--top-k", "3", "--scale", "norm", *end],
        "drop-experts, 6 of 8 stay": [*tool, "drop-experts", str(a), "--keep", "0,1,2,4,5,7", *end],
        "upcycle to 8 experts": [*tool, "upcycle", str(work / "dense"), "--experts", "8", "--no-proof", *end],
        "merge of two, linear": [*tool, "merge", str(recipe), *end],
    }
    load = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{size(a) / 1e9:.2f} GB in {shards} shards; {load}")
    heads = f"{'GB':>7} {'wall s':>8} {'x cp':>6} {'peak MB':>8} {'resumed s':>10} {'same':>5} {'1 TB, h':>8}"
    print(f"{'':32} {heads}", flush=True)
    timed(["cp", "-r", str(a), str(out)])  # fills the page cache as far as it goes
    shutil.rmtree(out)
    copies = {
        "cp": ["cp", "-r", str(a), str(out)],
        "cp and sync": ["sh", "-c", f"cp -r {a} {out} && sync {out}/*"],
    }
    runs: dict[str, list[float]] = {job: [] for job in copies}
    for _ in range(3):
        for job, command in copies.items():
            os.sync()
            runs[job].append(timed(command)[0])
            shutil.rmtree(out)
    rate = size(a) / statistics.median(runs["cp"])
    for job, walls in runs.items():
        report(job, size(a), statistics.median(walls), rate, None)
    for job, command in writers.items():
        os.sync()
        wall, _, memory = timed(command)
        written, first = size(out), digests(out)
        shutil.rmtree(out)
        kill(command, out.with_name("out.partial"))
        again, _, _ = timed(command)
        report(job, written, wall, rate, memory, f"{again:10.1f} {'yes' if digests(out) == first else 'NO':>5}")
        shutil.rmtree(out)
    wall, _, memory = timed([*tool, "validate", str(a), "--level", "values"])
    report("validate --level values", size(a), wall, rate, memory)


def report(job: str, nbytes: int, wall: float, rate: float, memory: float | None, resumed: str = " " * 16) -> None:
    """Print one row; `rate` is that of `cp` in bytes per second."""
    hours = 1e12 / nbytes * wall / 3600
    figures = f"{nbytes / 1e9:7.2f} {wall:8.1f} {wall * rate / nbytes:6.2f} {f'{memory:.0f}' if memory else '':>8}"
    print(f"{job:32} {figures} {resumed} {hours:8.2f}", flush=True)


def kill(command: list[str], partial: Path) -> None:
    """Start a command, and kill it when half of its shards are written."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None:
        names = [file.name for file in partial.glob("*.safetensors")]
        if names and 2 * len(names) >= int(names[0].rpartition("-of-")[2].partition(".")[0]):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    main()
