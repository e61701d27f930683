"""A thread for each device that runs windows of its own, kept for as long as the process lives.

The first matrix product of a new thread makes a cuBLAS handle: 40 ms, during which no other thread's products begin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")

_threads: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_threads.clear)  # threads are not forked


def side_by_side(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run jobs at the same time, job i always in the same thread, and return what they return when all have ended.

    A single job runs in the caller's thread. Raises what the first of those that fail raises.
    """
    if len(jobs) == 1:
        return [jobs[0]()]
    while len(_threads) < len(jobs):
        _threads.append(ThreadPoolExecutor(1, "device"))
    running = [thread.submit(job) for thread, job in zip(_threads, jobs, strict=False)]
    wait(running)
    return [each.result() for each in running]
