"""Elementwise expressions of one tensor: a factor, another dtype or GGUF's blocks, a shift of exponents.

Each rounds once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import LARGEST_FINITE, NotFiniteError, beyond, decoded, encoded, multiplied, rounded
from moesurgery.checkpoint.block_values import REQUANTISED, multiplied_blocks
from moesurgery.checkpoint.dtypes import BLOCKS, PLAIN_FLOATS, block_elements
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Reader, Unary, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch


def _largest(kind: torch.dtype) -> float:
    """Return the largest finite number of a floating dtype of torch; infinity for integers."""
    import torch

    return torch.finfo(kind).max if kind.is_floating_point else math.inf


def narrowed(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a tensor rounded to `dtype`, itself where that is its dtype.

    Raises NotFiniteError where a finite number would become infinite.
    """
    import torch

    rounded = values.to(torch_dtype(dtype))
    if dtype not in LARGEST_FINITE or torch.finfo(rounded.dtype).max >= _largest(values.dtype):
        return rounded
    infinite = rounded.isinf()
    if bool(infinite.any()) and bool((infinite & values.isfinite()).any()):
        raise beyond(dtype)
    return rounded


@dataclass(frozen=True)
class Scale(Unary):
    """`of * factor`, rounded once to the stored dtype. Build with `scale`."""

    factor: float

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        # A Python float multiplies bf16 and f16 in float32 with one rounding; a tensor would round first.
        return self.of.evaluate(start, stop, reader).mul_(self.factor)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        values = self.of.array(start, stop, reader)
        values *= self.factor
        return rounded(values, self.dtype)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        return multiplied(self.of.raw(start, stop, reader), self.dtype, self.factor)


def scale(of: Expr, factor: float) -> Expr:
    """Return `of * factor`; a factor of 1 is `of` itself, since x * 1.0 changes the bits of NaN."""
    if of.dtype not in PLAIN_FLOATS:
        raise ValueError(f"cannot multiply {of.dtype}")
    return of if factor == 1.0 else Scale(of, factor)


@dataclass(frozen=True)
class Exponent(Unary):
    """E8M0 exponents (as F8_E8M0 or U8) plus `shift`: an exact factor of 2**shift on what they scale."""

    shift: int

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        data = self.of.evaluate(start, stop, reader).view(torch.uint8)
        wide = data.to(torch.int16)
        moved = wide + self.shift
        fixed = (wide == 255) | (wide == 0)  # NaN stays NaN, and 2^-127 is the exponent of all-zero blocks
        moved[fixed] = wide[fixed]
        if bool(((moved < 0) | (moved > 254))[~fixed].any()):
            raise RefusedError(
                f"a factor of 2^{self.shift} takes a scale of {next(self.stored()).info.name} out of the E8M0 range",
                "use a smaller factor",
            )
        return moved.to(torch.uint8).view(torch_dtype(self.dtype))


@dataclass(frozen=True)
class BlockScale(Unary):
    """GGUF blocks times `factor`: the factors that each of them holds are multiplied and rounded once."""

    factor: float

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array(start, stop, reader))

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        return decoded(self.raw(start, stop, reader), self.dtype)

    def raw(self, start: int, stop: int, reader: Reader) -> memoryview:
        return multiplied_blocks(self.of.raw(start, stop, reader), self.dtype, self.factor)


def _name(expr: Expr) -> str:
    return next((stored.info.name for stored in expr.stored()), "a tensor")


@dataclass(frozen=True)
class Cast(Unary):
    """`of` rounded to another floating dtype, or GGUF's blocks of it: of these, or to them.

    Raises NotFiniteError for finite numbers that it cannot hold.
    """

    to: str

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.to

    @property
    def chunk_multiple(self) -> int:
        return math.lcm(self.of.chunk_multiple, block_elements(self.to))

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        if self.to in BLOCKS or self.of.dtype in BLOCKS:
            import torch

            values = self.of.array(start, stop, reader)
            if self.to not in BLOCKS:
                return narrowed(torch.from_numpy(values), self.to)
            return torch.frombuffer(bytearray(encoded(values, self.to)), dtype=torch.uint8)
        try:
            return narrowed(self.of.evaluate(start, stop, reader), self.to)
        except NotFiniteError:
            raise beyond(self.to, _name(self)) from None

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        try:
            return rounded(self.of.array(start, stop, reader), self.to, strict=True)
        except NotFiniteError:
            raise beyond(self.to, _name(self)) from None


def cast(of: Expr, dtype: str) -> Expr:
    """Return `of` in `dtype`; itself where that is its dtype."""
    if of.dtype == dtype:
        return of
    if not {of.dtype, dtype} <= PLAIN_FLOATS | BLOCKS.keys() or (dtype in BLOCKS and dtype not in REQUANTISED):
        raise ValueError(f"cannot cast {of.dtype} to {dtype}")
    return Cast(of, dtype)
