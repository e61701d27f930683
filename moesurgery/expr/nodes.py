"""Lazy tensor expressions: dtype and shape now, values later.

An expression that only selects or joins stored tensors compiles to byte ranges of the source files
(`Copy`), which the kernel copies. All arithmetic compiles to `Compute`: flat element ranges, evaluated chunk
by chunk, the common kinds by numpy alone. Every node rounds to its own dtype, so a recipe of several steps
gives the bytes that the same steps give one by one with files between them.

Expressions are immutable and picklable. torch is imported only to evaluate those that need it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moesurgery.checkpoint.arrays import decoded, encoded
from moesurgery.checkpoint.dtypes import (
    BITS,
    BLOCKS,
    CONFIG_NAMES,
    PLAIN_FLOATS,
    block_elements,
    byte_count,
    element_count,
)
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.checkpoint.source import Source

if TYPE_CHECKING:
    import numpy as np
    import torch


class Copy(NamedTuple):
    """Bytes to copy as they are."""

    source: Source
    file: str
    start: int
    nbytes: int


class Compute(NamedTuple):
    """Elements `start:stop` of `expr` (flattened) to evaluate. Cut only at multiples of `expr.chunk_multiple`."""

    expr: Expr
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return int((self.stop - self.start) * BITS[self.expr.dtype] // 8)


Piece = Copy | Compute


class Reader(Protocol):
    """Reads the bytes of the sources for an evaluation."""

    def read(self, source: Source, file: str, start: int, nbytes: int) -> torch.Tensor:
        """Return the bytes as a uint8 tensor that the caller owns until the chunk is written."""

    def passing(self, source: Source, file: str, start: int, nbytes: int) -> memoryview:
        """Return the bytes, valid until the next call."""


class Expr:
    """Base of all expressions. `chunk_multiple` is the smallest number of elements that can be evaluated separately."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return element_count(self.shape)

    @property
    def nbytes(self) -> int:
        return byte_count(self.dtype, self.shape)

    @property
    def memory(self) -> int:
        """About how many bytes one thread needs to evaluate a part."""
        return self.chunk_multiple * 4 * (1 + len(list(self.stored())))

    @property
    def chunk_multiple(self) -> int:
        return 1

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return ()

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces that make up the tensor's bytes, in order."""
        if self.numel:
            yield Compute(self, 0, self.numel)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        """Return elements `start:stop` (flattened), in this node's dtype, owned by the caller."""
        raise NotImplementedError

    @property
    def numpy_only(self) -> bool:
        """Whether `array` needs no torch: the node has one of its own, and so have its inputs."""
        return type(self).array is not Expr.array and all(part.numpy_only for part in self.inputs)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        """Return elements `start:stop` (flattened) as float32, or float64 for F64, owned by the caller."""
        import torch

        values = self.evaluate(start, stop, reader)
        return values.to(torch.float64 if self.dtype == "F64" else torch.float32, copy=True).numpy()

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        """Return the bytes of elements `start:stop` of a `numpy_only` expression."""
        return encoded(self.array(start, stop, reader), self.dtype)

    def stored(self) -> Iterator[Stored]:
        """Yield the stored tensors that the expression reads."""
        for part in self.inputs:
            yield from part.stored()

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        """Yield about what is read to evaluate elements `start:stop`, so that it can be fetched ahead.

        The same share of every input, unless a node knows better: what is missing is read when it is wanted.
        """
        for part in self.inputs:
            first, last = start * part.numel // self.numel, -(-stop * part.numel // self.numel)
            yield from part.ranges(*_in_multiples(part, first, last))


_TORCH_NAMES = {
    **CONFIG_NAMES,
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    "U8": "uint8",
    "BOOL": "bool",
}


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's name for a safetensors dtype. Raises ValueError for types torch cannot hold."""
    import torch

    if dtype not in _TORCH_NAMES:
        raise ValueError(f"no arithmetic on {dtype}")
    return getattr(torch, _TORCH_NAMES[dtype])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stored(Expr):
    """A tensor as stored in a source file."""

    source: Source
    info: TensorInfo

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.info.shape

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    @property
    def chunk_multiple(self) -> int:
        return block_elements(self.dtype)

    def pieces(self) -> Iterator[Piece]:
        if self.info.nbytes:
            yield Copy(self.source, self.info.file, self.info.start, self.info.nbytes)

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        """Return where in the file elements `start:stop` are, and how many bytes they take."""
        bits = BITS[self.dtype]
        return self.info.start + int(start * bits // 8), int((stop - start) * bits // 8)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        return reader.read(self.source, self.info.file, *self._range(start, stop)).view(torch_dtype(self.dtype))

    @property
    def numpy_only(self) -> bool:
        return self.dtype in PLAIN_FLOATS or self.dtype in BLOCKS

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        if not self.numpy_only:
            return super().array(start, stop, reader)
        return decoded(self.raw(start, stop, reader), self.dtype)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        return reader.passing(self.source, self.info.file, *self._range(start, stop))

    def stored(self) -> Iterator[Stored]:
        yield self

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        yield Copy(self.source, self.info.file, *self._range(start, stop))


def _in_multiples(of: Expr, start: int, stop: int) -> tuple[int, int]:
    """Return the elements of the multiples of `chunk_multiple` that `start:stop` lie in."""
    return start // of.chunk_multiple * of.chunk_multiple, min(
        of.numel, -(-stop // of.chunk_multiple) * of.chunk_multiple
    )


def evaluated(of: Expr, start: int, stop: int, reader: Reader) -> torch.Tensor:
    """Evaluate any elements: a part of a tensor need not begin where a part of the whole that can be evaluated does."""
    first, last = _in_multiples(of, start, stop)
    return of.evaluate(first, last, reader)[start - first : stop - first]


def _array(of: Expr, start: int, stop: int, reader: Reader) -> np.ndarray:
    first, last = _in_multiples(of, start, stop)
    return of.array(first, last, reader)[start - first : stop - first]


def _raw(of: Expr, start: int, stop: int, reader: Reader) -> memoryview:
    first, last = _in_multiples(of, start, stop)
    bits = BITS[of.dtype]
    return of.raw(first, last, reader)[int((start - first) * bits // 8) : int((stop - first) * bits // 8)]


@dataclass(frozen=True)
class Unary(Expr):
    """An expression of one other, with its dtype, shape and `chunk_multiple` unless overridden."""

    of: Expr

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def chunk_multiple(self) -> int:
        return self.of.chunk_multiple

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Slice(Unary):
    """Entries `start:stop` of the first axis of `of`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.of.shape[0]:
            raise ValueError(f"rows {self.start}:{self.stop} of {self.of.shape}")

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.stop - self.start, *self.of.shape[1:])

    @property
    def offset(self) -> int:
        """The element of `of` that is the first of these."""
        return self.start * element_count(self.of.shape[1:])

    def pieces(self) -> Iterator[Piece]:
        return window(self.of.pieces(), self.offset, self.offset + self.numel, BITS[self.dtype])

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        return evaluated(self.of, self.offset + start, self.offset + stop, reader)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        return _array(self.of, self.offset + start, self.offset + stop, reader)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        return _raw(self.of, self.offset + start, self.offset + stop, reader)

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        yield from self.of.ranges(*_in_multiples(self.of, self.offset + start, self.offset + stop))


@dataclass(frozen=True)
class Concat(Expr):
    """Expressions one after the other in memory, seen as one tensor of `shape`: see `concat` and `stack`."""

    parts: tuple[Expr, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def chunk_multiple(self) -> int:
        return math.lcm(*(part.chunk_multiple for part in self.parts))

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts

    def pieces(self) -> Iterator[Piece]:
        for part in self.parts:
            yield from part.pieces()

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        tensors = [evaluated(part, first, last, reader) for part, first, last in self.within(start, stop)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        import numpy as np

        arrays = [_array(part, first, last, reader) for part, first, last in self.within(start, stop)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        # Joined at once: the bytes of a part are valid only until the next call.
        return memoryview(b"".join(bytes(_raw(p, first, last, reader)) for p, first, last in self.within(start, stop)))

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        for part, first, last in self.within(start, stop):
            yield from part.ranges(*_in_multiples(part, first, last))

    def within(self, start: int, stop: int) -> Iterator[tuple[Expr, int, int]]:
        """Yield the parts that elements `start:stop` are in, with the elements of each."""
        at = 0
        for part in self.parts:
            first, last = max(start - at, 0), min(stop - at, part.numel)
            if first < last:
                yield part, first, last
            at += part.numel


def concat(parts: list[Expr]) -> Expr:
    """Concatenate along the first axis. All parts have one dtype and equal other axes."""
    first = parts[0]
    if any(p.dtype != first.dtype or p.shape[1:] != first.shape[1:] for p in parts):
        raise ValueError(f"cannot join {[(p.dtype, p.shape) for p in parts]}")
    if len(parts) == 1:
        return first
    return Concat(tuple(parts), (sum(p.shape[0] for p in parts), *first.shape[1:]))


def stack(parts: list[Expr]) -> Expr:
    """Stack along a new first axis. All parts have one dtype and shape."""
    first = parts[0]
    if any(p.dtype != first.dtype or p.shape != first.shape for p in parts):
        raise ValueError(f"cannot stack {[(p.dtype, p.shape) for p in parts]}")
    return Concat(tuple(parts), (len(parts), *first.shape))


def reshape(of: Expr, shape: tuple[int, ...]) -> Expr:
    """View the same elements in another shape."""
    if element_count(shape) != of.numel:
        raise ValueError(f"cannot see {of.shape} as {shape}")
    return of if of.shape == shape else Concat((of,), shape)


def window(pieces: Iterator[Piece], start: int, stop: int, bits: int | Fraction) -> Iterator[Piece]:
    """Cut elements `start:stop` out of consecutive pieces of elements of `bits` bits."""
    at = 0
    for piece in pieces:
        count = int(piece.nbytes * 8 // bits)
        first, last = max(start - at, 0), min(stop - at, count)
        at += count
        if first >= last:
            continue
        if isinstance(piece, Copy):
            offset, length = int(first * bits // 8), int((last - first) * bits // 8)
            yield piece._replace(start=piece.start + offset, nbytes=length)
            continue
        first, last = piece.start + first, piece.start + last
        if _in_multiples(piece.expr, first, last) == (first, last):
            yield piece._replace(start=first, stop=last)
        else:
            flat = reshape(piece.expr, (piece.expr.numel,))
            yield Compute(Slice(flat, first, last), 0, last - first)
