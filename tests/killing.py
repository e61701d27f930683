"""Breaks a writer at every step it takes on the disk: `python -m tests.killing RECIPE MODEL FOLDER [POINTS]`.

The command runs in a process of its own that is killed by SIGKILL in the middle of its n-th step (a write torn in
half, a rename not done), or whose disk is full or cannot be read from that step on. Whatever n is: no folder that
`validate` lets pass holds anything but what was asked for, no input changes, and the same command finishes the work.
"""

from __future__ import annotations

import builtins
import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesurgery.checkpoint.finding import Finding
from moesurgery.cli import main as command
from moesurgery.validate.check import CHECKS
from moesurgery.validate.check_architecture import check_architecture
from moesurgery.validate.run_checks import validate_checkpoint
from moesurgery.write import publish

READS = ("preadv", "pread")
WRITES = ("pwritev", "copy_file_range", "open", "replace", "rename", "fsync", "ftruncate", "posix_fallocate", "link")
WRITES += ("mkdir", "rmdir", "unlink")
NEEDS_SPACE = ("pwritev", "copy_file_range", "open", "mkdir", "posix_fallocate", "link", "write")
OURS = ".moesurgery"


class Steps:
    """Counts what a process does to files; at step `last` it `breaks`."""

    def __init__(self, last: int | None, kind: str) -> None:
        self.last, self.kind, self.count = last, kind, 0
        for name in READS if kind == "unreadable" else WRITES:
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        if kind != "unreadable":
            builtins.open = self.opened(builtins.open)  # type: ignore[assignment]
            publish.exchange = self.wrapped("exchange", publish.exchange)

    def step(self, name: str, half: Callable[[], Any]) -> None:
        self.count += 1
        if self.last is None or self.count < self.last:
            return
        if self.kind == "killed":
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "full" and name in NEEDS_SPACE:
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.kind == "unreadable":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def wrapped(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            creates = name != "open" or (len(args) > 1 and args[1] & (os.O_CREAT | os.O_TRUNC))
            if creates:
                self.step(name, lambda: self.half(name, original, args))
            return original(*args, **kwargs)

        return call

    def half(self, name: str, original: Any, args: Any) -> None:
        """Do half of a write."""
        if name == "pwritev":
            original(args[0], [part[: len(part) // 2] for part in args[1]], *args[2:])
        elif name == "copy_file_range":
            original(*args[:2], args[2] // 2, *args[3:])

    def opened(self, original: Any) -> Any:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" not in mode:
                self.step("write", lambda: original(file, mode, *args, **kwargs).close())
            return original(file, mode, *args, **kwargs)

        return call


def in_a_process(arguments: list[str], last: int | None, kind: str) -> tuple[int, int]:
    """Run a command in a fork; return its exit status (-9 where it was killed) and the steps it took."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        steps = Steps(last, kind)
        try:
            code = command(arguments)
        except BaseException:
            code = 99
        os.write(writer, str(steps.count).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and OURS not in p.relative_to(folder).parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def weights(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith((".safetensors", "config.json"))}


def passes(folder: Path) -> bool:
    findings: tuple[Finding, ...] = validate_checkpoint(folder, level="values").findings
    return not any(finding.severity == "error" for finding in findings)


def main(recipe: str, model: str, folder: str, points: int) -> None:
    torch.set_num_threads(1)  # imported here once, and without threads that a fork would lack
    CHECKS[:] = [
        check for check in CHECKS if check.function is not check_architecture
    ]  # it is slow, and not about bytes
    out = Path(folder, "out")
    arguments = ["run", recipe, "--model", model, "-o", str(out), "-j", "1", "-q", "--max-shard-size", "60KB"]
    before = contents(Path(model))
    assert command(arguments) == 0  # here, so that forks need not import everything again
    assert passes(out)
    expected = contents(out)
    wreck(out)
    _, reads = in_a_process(arguments, None, "unreadable")
    wreck(out)
    _, total = in_a_process(arguments, None, "killed")
    wreck(out)
    chosen = random.Random(0)
    tried = {"killed": 0, "full": 0, "unreadable": 0}
    start = time.monotonic()
    for kind in tried:
        steps = range(1, (reads if kind == "unreadable" else total) + 1)
        for last in sorted(chosen.sample(steps, min(points, len(steps)))):
            code, _ = in_a_process(arguments, last, kind)
            where = f"{kind} at step {last} of {len(steps)}"
            assert code in {"killed": (-9, 0), "full": (0, 2), "unreadable": (0, 2)}[kind], f"{where}: exit {code}"
            assert contents(Path(model)) == before, f"{where}: an input has changed"
            for left in Path(folder).iterdir():
                if left == out:
                    assert contents(left) == expected, f"{where}: the output is there and not whole"
                elif left.is_dir() and passes(left):
                    assert weights(contents(left)) == weights(expected), f"{where}: {left.name} passes and is wrong"
            if not out.exists():
                code, _ = in_a_process(arguments, None, "killed")
                assert code == 0, f"{where}: the same command does not resume: exit {code}"
                assert contents(out) == expected, f"{where}: resumed to other bytes"
            assert [p.name for p in Path(folder).iterdir()] == ["out"], f"{where}: something is left behind"
            wreck(out)
            tried[kind] += 1
    print(f"{total} steps, {reads} reads; tried {tried} in {time.monotonic() - start:.0f} s")


def wreck(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:4], points=int(sys.argv[4]) if len(sys.argv) > 4 else 10**6)
