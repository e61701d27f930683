"""Expressions that need values in memory: weighted sums, columns, transposes, constants, functions.

Every node is evaluated in multiples of its `chunk_multiple`, so only `Applied` ever holds a whole tensor. Interleaved
rows or columns need no node of their own: [2I, H] with gate and up alternating, seen as [I, 2H], has gate in
its first H columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.arrays import decoded, rounded
from moesurgery.checkpoint.dtypes import BITS, PLAIN_FLOATS, element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import narrowed
from moesurgery.expr.nodes import Copy, Expr, Reader, Slice, Unary, concat, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Linear(Expr):
    """The weighted sum of expressions of one shape, accumulated in float32 and rounded once to `dtype`."""

    terms: tuple[tuple[Expr, float], ...]
    dtype: str

    def __post_init__(self) -> None:
        shapes = {expr.shape for expr, _ in self.terms}
        if len(shapes) != 1 or not {expr.dtype for expr, _ in self.terms} <= PLAIN_FLOATS:
            kinds = dict.fromkeys(f"{expr.dtype} {list(expr.shape)}" for expr, _ in self.terms)
            raise RefusedError(
                f"tensors of different shapes or types cannot be averaged: {' and '.join(list(kinds)[:4])}",
                "`moesurgery inspect` shows which of the model's tensors differ",
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.terms[0][0].shape

    @property
    def chunk_multiple(self) -> int:
        return math.lcm(*(expr.chunk_multiple for expr, _ in self.terms))

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return tuple(expr for expr, _ in self.terms)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        total: torch.Tensor | None = None
        for expr, weight in self.terms:
            value = expr.evaluate(start, stop, reader)
            if total is None:
                total = value.to(torch.float32).mul_(weight) if value.dtype != torch.float32 else value.mul_(weight)
            else:
                total.add_(value.to(torch.float32), alpha=weight)
        assert total is not None
        return narrowed(total, self.dtype)


def mean(parts: list[Expr]) -> Expr:
    """Return the mean of expressions of one dtype and shape, in that dtype."""
    if len(parts) == 1:
        return parts[0]
    return Linear(tuple((part, 1 / len(parts)) for part in parts), parts[0].dtype)


def _rows_multiple(of: Expr) -> int:
    """Return the least number of rows (of the last axis) of `of` that can be evaluated separately."""
    width = of.shape[-1]
    return of.chunk_multiple // math.gcd(of.chunk_multiple, width) if width else 1


@dataclass(frozen=True)
class SliceLast(Unary):
    """Entries `start:stop` of the last axis of `of`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.of.shape[-1]:
            raise ValueError(f"columns {self.start}:{self.stop} of {self.of.shape}")

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.of.shape[:-1], self.stop - self.start)

    @property
    def chunk_multiple(self) -> int:
        return (self.stop - self.start) * _rows_multiple(self.of)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        width, whole = self.stop - self.start, self.of.shape[-1]
        rows = self.of.evaluate(start // width * whole, stop // width * whole, reader)
        return rows.view(-1, whole)[:, self.start : self.stop].reshape(-1)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        width, whole = self.stop - self.start, self.of.shape[-1]
        rows = self.of.array(start // width * whole, stop // width * whole, reader)
        return rows.reshape(-1, whole)[:, self.start : self.stop].reshape(-1)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        import numpy as np

        width, whole, size = self.stop - self.start, self.of.shape[-1], BITS[self.dtype] // 8
        data = self.of.raw(start // width * whole, stop // width * whole, reader)
        rows = np.frombuffer(data, np.uint8).reshape(-1, whole * size)
        return np.ascontiguousarray(rows[:, self.start * size : self.stop * size]).reshape(-1).data


def slice_last(of: Expr, start: int, stop: int) -> Expr:
    """Select entries of the last axis; all of them is `of` itself."""
    return of if (start, stop) == (0, of.shape[-1]) else SliceLast(of, start, stop)


@dataclass(frozen=True)
class TakeLast(Unary):
    """Entries of the last axis in any order, as for the neurons of a down-projection. Build with `take_last`."""

    indices: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.of.shape[:-1], len(self.indices))

    @property
    def chunk_multiple(self) -> int:
        return len(self.indices) * _rows_multiple(self.of)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        width, whole = len(self.indices), self.of.shape[-1]
        rows = self.of.evaluate(start // width * whole, stop // width * whole, reader)
        # As bytes where an entry is one: torch does not select among all of these types.
        plain = rows.view(torch.uint8) if rows.element_size() == 1 else rows
        return plain.view(-1, whole)[:, list(self.indices)].reshape(-1).view(rows.dtype)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        width, whole = len(self.indices), self.of.shape[-1]
        rows = self.of.array(start // width * whole, stop // width * whole, reader)
        return rows.reshape(-1, whole)[:, list(self.indices)].reshape(-1)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        import numpy as np

        width, whole, size = len(self.indices), self.of.shape[-1], BITS[self.dtype] // 8
        data = self.of.raw(start // width * whole, stop // width * whole, reader)
        rows = np.frombuffer(data, f"V{size}").reshape(-1, whole)
        return np.ascontiguousarray(rows[:, list(self.indices)]).reshape(-1).view(np.uint8).data


def take_last(of: Expr, indices: list[int]) -> Expr:
    """Select entries of the last axis, in the given order; all of them is `of` itself."""
    return of if indices == list(range(of.shape[-1])) else TakeLast(of, tuple(indices))


@dataclass(frozen=True)
class ConcatLast(Expr):
    """Expressions joined along the last axis. Build with `concat_last`."""

    parts: tuple[Expr, ...]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.parts[0].shape[:-1], sum(part.shape[-1] for part in self.parts))

    @property
    def chunk_multiple(self) -> int:
        return self.shape[-1] * math.lcm(*(_rows_multiple(part) for part in self.parts))

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        width = self.shape[-1]
        first, last = start // width, stop // width
        columns = []
        for part in self.parts:
            w = part.shape[-1]
            columns.append(part.evaluate(first * w, last * w, reader).view(last - first, w))
        return torch.cat(columns, dim=1).view(-1)


def concat_last(parts: list[Expr]) -> Expr:
    """Join along the last axis. All parts have one dtype and equal other axes."""
    first = parts[0]
    if any(p.dtype != first.dtype or p.shape[:-1] != first.shape[:-1] for p in parts):
        raise ValueError(f"cannot join columns of {[(p.dtype, p.shape) for p in parts]}")
    return first if len(parts) == 1 else ConcatLast(tuple(parts))


@dataclass(frozen=True)
class Transposed(Unary):
    """The last two axes of `of` exchanged, one matrix at a time."""

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.of.shape[:-2], self.of.shape[-1], self.of.shape[-2])

    @property
    def chunk_multiple(self) -> int:
        return math.lcm(self.of.chunk_multiple, self.shape[-1] * self.shape[-2])

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        matrices = self.of.evaluate(start, stop, reader).view(-1, *self.of.shape[-2:])
        return matrices.transpose(1, 2).reshape(-1)


def transpose(of: Expr) -> Expr:
    """Exchange the last two axes; twice is `of` itself."""
    return of.of if isinstance(of, Transposed) else Transposed(of)


def take(of: Expr, indices: list[int]) -> Expr:
    """Select entries of the first axis, in the given order; neighbours become one byte range."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    if runs == [[0, of.shape[0]]]:
        return of
    return concat([Slice(of, first, last) for first, last in runs])


@dataclass(frozen=True)
class Gather(Unary):
    """Rows of the first axis in any order, as for a permutation of neurons. For few, long runs use `take`."""

    indices: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.indices), *self.of.shape[1:])

    @property
    def row(self) -> int:
        return element_count(self.of.shape[1:])

    @property
    def chunk_multiple(self) -> int:
        # Where single rows of `of` cannot be evaluated separately, all of it is evaluated.
        return self.row if self.row % self.of.chunk_multiple == 0 else self.numel

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        row = self.row
        chosen = self.indices[start // row : stop // row]
        if self.chunk_multiple != row:
            whole = self.of.evaluate(0, self.of.numel, reader).view(-1, row)
            return whole[list(chosen)].reshape(-1)
        kind = torch_dtype(self.dtype)
        out = torch.empty(len(chosen), row, dtype=kind)
        at = 0
        while at < len(chosen):
            run = 1
            while at + run < len(chosen) and chosen[at + run] == chosen[at] + run:
                run += 1
            first = chosen[at]
            out[at : at + run] = self.of.evaluate(first * row, (first + run) * row, reader).view(run, row)
            at += run
        return out.view(-1)

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        chosen = self.indices[start // self.row : -(-stop // self.row)]
        first, last = min(chosen), max(chosen) + 1
        if last - first <= 4 * len(chosen):  # a request for each row takes longer than what lies between them
            yield from Slice(self.of, first, last).ranges(0, (last - first) * self.row)


@dataclass(frozen=True)
class Full(Expr):
    """A tensor filled with one number."""

    value: float
    dtype: str
    shape: tuple[int, ...]

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.full((stop - start,), self.value, dtype=torch_dtype(self.dtype))

    @property
    def numpy_only(self) -> bool:
        return self.dtype in PLAIN_FLOATS

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        import numpy as np

        return rounded(np.full(stop - start, self.value), self.dtype)


@dataclass(frozen=True)
class Constant(Expr):
    """Values computed while planning, such as a measured router. The plan holds their bytes, so they must be small."""

    data: bytes = field(repr=False)
    dtype: str
    shape: tuple[int, ...]
    digest: str = field(init=False)  # used in place of `data` in the plan's digest

    def __post_init__(self) -> None:
        import hashlib

        object.__setattr__(self, "digest", hashlib.sha256(self.data).hexdigest())

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.frombuffer(bytearray(self.data), dtype=torch_dtype(self.dtype))[start:stop]

    @property
    def numpy_only(self) -> bool:
        return self.dtype in PLAIN_FLOATS

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        return decoded(self.raw(start, stop, reader), self.dtype)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        size = BITS[self.dtype] // 8
        return memoryview(self.data)[start * size : stop * size]


def function_name(function: Callable[..., Any]) -> str:
    """Return what stands for a module-level function in the digest of a plan: its own text has its address in it."""
    return f"{function.__module__}.{function.__qualname__}"


@dataclass(frozen=True)
class Applied(Expr):
    """`function(*values, **parameters)` on whole tensors: for what cannot be done in parts.

    `function` is a module-level function of torch tensors in the shapes and dtypes of `of`, returning one
    tensor; it is rounded to `dtype`. Memory: all inputs and the result at once, in every thread.
    """

    function: Callable[..., Any]
    of: tuple[Expr, ...]
    dtype: str
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, Any], ...] = field(default=())

    def __repr__(self) -> str:
        return (
            f"Applied({function_name(self.function)}, {self.of!r}, {self.dtype!r}, {self.shape!r}, {self.parameters!r})"
        )

    @property
    def chunk_multiple(self) -> int:
        return max(self.numel, 1)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.of

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        values = [expr.evaluate(0, expr.numel, reader).view(expr.shape) for expr in self.of]
        result: torch.Tensor = self.function(*values, **dict(self.parameters))
        if tuple(result.shape) != self.shape:
            raise AssertionError(f"{self.function.__name__} returned {tuple(result.shape)}, planned {self.shape}")
        return narrowed(result, self.dtype).reshape(-1)
