"""Elementwise expressions of one tensor: a factor, another dtype, a shift of exponents. Each rounds once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import multiplied, rounded
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Reader, Unary, torch_dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

_F16_END = 65520.0  # what rounds to infinity from here


@dataclass(frozen=True)
class Scale(Unary):
    """`of * factor`, rounded once to the stored dtype. Build with `scale`."""

    factor: float

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        # A Python float multiplies bf16 and f16 in float32 with one rounding; a tensor would round first.
        return self.of.evaluate(start, stop, reader).mul_(self.factor)

    @property
    def numpy_only(self) -> bool:
        return self.of.numpy_only

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
        fixed = (wide == 255) | (wide == 0)  # NaN stays NaN, and 2^-127 is what all-zero blocks carry
        moved[fixed] = wide[fixed]
        if bool(((moved < 0) | (moved > 254))[~fixed].any()):
            raise RefusedError(
                f"a factor of 2^{self.shift} takes a scale of {next(self.stored()).info.name} out of the E8M0 range",
                "use a smaller factor",
            )
        return moved.to(torch.uint8).view(torch_dtype(self.dtype))


@dataclass(frozen=True)
class Cast(Unary):
    """`of` rounded to another floating dtype. Raises RefusedError for finite numbers that F16 cannot hold."""

    to: str

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.to

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        wide = self.of.evaluate(start, stop, reader)
        if self.to == "F16" and bool((wide.isfinite() & (wide.abs() >= _F16_END)).any()):
            raise self._too_large()
        return wide.to(torch_dtype(self.to))

    @property
    def numpy_only(self) -> bool:
        return self.of.numpy_only

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        import numpy as np

        wide = self.of.array(start, stop, reader)
        if self.to == "F16" and bool((np.isfinite(wide) & (abs(wide) >= _F16_END)).any()):
            raise self._too_large()
        return rounded(wide, self.to)

    def _too_large(self) -> Exception:
        name = next((stored.info.name for stored in self.stored()), "a tensor")
        return RefusedError(f"{name} holds numbers that float16 cannot: beyond 65504", "use bfloat16 or float32")


def cast(of: Expr, dtype: str) -> Expr:
    """Return `of` in `dtype`; itself where that is its dtype."""
    if of.dtype == dtype:
        return of
    if not {of.dtype, dtype} <= PLAIN_FLOATS:
        raise ValueError(f"cannot cast {of.dtype} to {dtype}")
    return Cast(of, dtype)
