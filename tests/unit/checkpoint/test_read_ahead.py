"""Reading ahead: several ranges at once, in order, within bounds; what goes wrong is raised where it is wanted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.checkpoint.read_ahead import REQUEST, Range, ReadAhead
from moesurgery.errors import CheckpointError
from moesurgery.expr.elementwise import cast, scale
from moesurgery.expr.nodes import Concat, Expr, Slice, concat, reshape
from moesurgery.expr.tensors import Gather, SliceLast, transpose
from tests.unit.expr.test_expr import stored

WAIT = 20  # seconds that a test waits for what must happen; it never waits for what must not


class Far:
    """A source whose reads wait for `together` of them to be there at once. Byte i of a file is i modulo 251."""

    def __init__(self, together: int = 1, size: int = 1 << 40) -> None:
        self.barrier = threading.Barrier(together)
        self.size = size
        self.begun: list[tuple[int, int]] = []

    def local(self, file: str) -> None:
        return None

    def read(self, file: str, start: int, length: int) -> bytes:
        self.begun.append((start, length))
        self.barrier.wait(WAIT)
        return bytes_of(start, max(0, min(length, self.size - start)))


def bytes_of(start: int, length: int) -> bytes:
    return (np.arange(start, start + length, dtype=np.int64) % 251).astype(np.uint8).tobytes()


def wanted(source: Any, *sizes: int) -> list[list[Range]]:
    starts = np.cumsum([0, *sizes])
    return [[(source, "x", int(start), size)] for start, size in zip(starts, sizes, strict=False)]


def test_several_ranges_are_fetched_at_once_and_joined() -> None:
    source = Far(together=4)
    ahead = ReadAhead(wanted(source, 2 * REQUEST, 1000, 500), 1 << 30, threading.Event())
    fetched = ahead.begin(0)  # the first read waits until the other three are there, too
    view = memoryview(bytearray(2000))
    assert fetched.fill(view, source, "x", REQUEST - 1000)  # type: ignore[arg-type]
    assert view == bytes_of(REQUEST - 1000, 2000)
    assert b"".join(fetched.parts(source, "x", 0, 2 * REQUEST)) == bytes_of(0, 2 * REQUEST)  # type: ignore[arg-type]
    assert not fetched.fill(view, source, "x", 2 * REQUEST - 10)  # type: ignore[arg-type]
    assert not fetched.fill(view, source, "y", 0)  # type: ignore[arg-type]
    assert sorted(source.begun) == [(0, REQUEST), (REQUEST, REQUEST), (2 * REQUEST, 1000), (2 * REQUEST + 1000, 500)]


def test_what_is_fetched_and_not_done_is_bounded() -> None:
    source = Far()
    ahead = ReadAhead(wanted(source, *[100] * 10, 500, 100), 400, threading.Event())

    def begun(unit: int) -> int:
        fetched = ahead.begin(unit)
        b"".join(fetched.parts(*ahead._wanted[unit][0]))
        return ahead._next

    assert begun(0) == 4
    assert begun(1) == 4
    ahead.end(0)
    assert begun(2) == 5
    for unit in range(1, 9):
        ahead.end(unit) if unit < 3 else (begun(unit), ahead.end(unit))
    assert begun(9) == 10  # the next is larger than all that may be held
    ahead.end(9)
    assert begun(10) == 11
    ahead.end(10)
    assert begun(11) == 12
    assert [start for start, _ in sorted(source.begun)] == [*range(0, 1100, 100), 1500]


def test_what_goes_wrong_is_raised_where_it_is_wanted() -> None:
    source = Far(size=150)
    ahead = ReadAhead(wanted(source, 100, 100), 1000, threading.Event())
    view = memoryview(bytearray(100))
    assert ahead.begin(0).fill(view, source, "x", 0)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="ends before its header says"):
        ahead.begin(1).fill(view, source, "x", 100)  # type: ignore[arg-type]


def test_nothing_is_fetched_after_a_stop() -> None:
    source, stop = Far(), threading.Event()
    stop.set()
    fetched = ReadAhead(wanted(source, 100), 1000, stop).begin(0)
    with pytest.raises(KeyboardInterrupt):
        fetched.fill(memoryview(bytearray(100)), source, "x", 0)  # type: ignore[arg-type]
    assert source.begun == []


class Recorder(FileReader):
    """Keeps which bytes were read."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: set[int] = set()

    def fill(self, view: memoryview, source: Any, file: str, start: int) -> None:
        self.bytes.update(range(start, start + len(view)))
        super().fill(view, source, file, start)


def test_expressions_name_what_they_read(tmp_path: Path) -> None:
    """Exactly, where elements keep their order; and never less."""
    names = stored(tmp_path, a=torch.randn(12, 8).bfloat16(), b=torch.randn(12, 8), c=torch.randn(4, 8).bfloat16())
    a, b, c = names["a"], names["b"], names["c"]
    exact: list[Expr] = [
        scale(a, 3.0),
        scale(cast(b, "BF16"), 3.0),
        Slice(scale(a, 3.0), 5, 9),
        scale(concat([Slice(a, 2, 4), c]), 3.0),
        reshape(scale(a, 3.0), (96,)),
        Concat((scale(a, 2.0), scale(c, 2.0)), (16, 8)),
        transpose(Slice(a, 4, 8)),
        Gather(a, tuple(reversed(range(4, 9)))),
    ]
    more: list[Expr] = [SliceLast(a, 2, 4), Gather(a, (9, 3, 6)), Gather(scale(b, 2.0), (11, 0, 5, 4))]
    for expr in [*exact, *more]:
        step = expr.chunk_multiple
        for first in range(0, expr.numel, step):
            reader = Recorder()
            expr.evaluate(first, first + step, reader)
            named = {
                at for part in expr.ranges(first, first + step) for at in range(part.start, part.start + part.nbytes)
            }
            assert reader.bytes <= named, expr
            assert reader.bytes == named or expr in more, expr
    assert list(Gather(a, (0, 11)).ranges(0, 16)) == []  # a request for each costs less than all between them
