"""Commands measured against each other: each a process of its own, in turn, several rounds."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Bytecode is cached, as it is wherever packages were installed by pip.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a process of its own: the peak memory of what is timed later starts at that of this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        maker.submit(function, *arguments).result()


def timed(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return wall seconds, CPU seconds and peak resident MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(jobs: Mapping[str, list[str]], out: Path, rounds: int) -> None:
    """Run all jobs, which write `out`, in turn; print medians, and the ratios to the first job of each round.

    Of the ratios of wall time also the smallest and the largest.
    """
    results: dict[str, list[tuple[float, float, float]]] = {job: [] for job in jobs}
    new_space: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first round fills the page cache and is not counted
        for job, command in jobs.items():
            os.sync()  # no job pays for what another left to be written
            before = os.statvfs(out.parent)
            results[job].append(timed(command))
            os.sync()
            after = os.statvfs(out.parent)
            new_space[job] = (before.f_bfree - after.f_bfree) * after.f_frsize / 1e6
            shutil.rmtree(out)
    first = results[next(iter(jobs))][1:]
    spread = "from to"
    print(f"{'':32} {'wall s':>8} {'x cp':>6} {spread:>11} {'cpu s':>7} {'x cp':>6} {'peak MB':>8} {'new disk MB':>12}")
    for job, runs in results.items():
        wall, cpu, memory = (statistics.median(run[i] for run in runs[1:]) for i in range(3))
        ratio, ratio_cpu = (sorted(run[i] / base[i] for run, base in zip(runs[1:], first, strict=True)) for i in (0, 1))
        walls = f"{wall:8.2f} {statistics.median(ratio):6.2f} {ratio[0]:5.2f} {ratio[-1]:5.2f}"
        print(f"{job:32} {walls} {cpu:7.2f} {statistics.median(ratio_cpu):6.2f} {memory:8.0f} {new_space[job]:12.0f}")
