"""Forms of quantised matrices: the numbers that a code stands for, the block that shares a scale, and rounding.

Rounding is to the nearest code, ties to even, with the scale of the block's largest number: no scale clips, so that the
error is at most half a step. A block that was quantised before keeps its scale while its numbers lie on the scale's
steps, or fit it and need more than half of it: codes of numbers that did not change stay as they are.

Sources: OCP 8-bit floating point 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0 (E2M1, E8M0); compressed-tensors,
whose scales these are (range / (2^bits - 1) for integers; a power of two from 7/4 on for E2M1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Numbers = Literal["e4m3", "e5m2", "e2m1", "int"]
EXPONENTS = ("F8_E8M0", "U8")  # dtypes of scales that are powers of two
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by its three lower bits
LARGEST_SCALE = 448.0  # of E4M3, in which first scales are where there are second ones
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
# What the scale of a block's largest number is multiplied by where the error is weighed.
_SCALES_NEAR = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05)
_POWERS_NEAR = (0.5, 2.0)
_HALF_STEP_ABOVE = {"e4m3": 464.0, "e5m2": 61440.0, "e2m1": 7.0}  # the largest numbers, and half a step


@dataclass(frozen=True)
class Form:
    """How matrices [..., out, in] are stored.

    `numbers`: what a code of `bits` is; integers count from 0 on, or, `signed`, from half their range below. `tall` by
    `wide`: the block that shares a scale of `scale_dtype`; with `powers` scales are powers of two in any dtype.
    `zeros`: each block has a zero point of its own, stored less `less`, else it is half the range, and so are new ones
    where it is `fixed`. `overall`: what a second scale, for the whole matrix, does to the first.
    """

    numbers: Numbers
    bits: int
    tall: int
    wide: int
    scale_dtype: str
    zeros: bool = False
    less: int = 0
    fixed: bool = False
    powers: bool = False
    signed: bool = False
    overall: Literal["", "times", "over"] = ""

    def __str__(self) -> str:
        what = {"e4m3": "FP8", "e5m2": "FP8 (E5M2)", "e2m1": "FP4"}.get(self.numbers, f"INT{self.bits}")
        return f"{what} in {f'blocks of {self.tall} x {self.wide}' if self.tall > 1 else f'groups of {self.wide}'}"

    @cached_property
    def middle(self) -> int:
        """The code of zero where no zero points are stored."""
        return 1 << (self.bits - 1) if self.numbers == "int" else 0

    @property
    def largest(self) -> float:
        """What a scale maps the largest number of a block to."""
        return self.middle - 0.5 if self.numbers == "int" else _LARGEST[self.numbers]

    @property
    def limit(self) -> float:
        """The largest number, in scales, that is half a step from a code."""
        return self.largest if self.numbers == "int" else _HALF_STEP_ABOVE[self.numbers]

    def limits(self, zero: torch.Tensor | float) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Return how far below and above zero, in scales, the nearest code is half a step away at most."""
        if self.numbers != "int":
            return self.limit, self.limit
        return zero + 0.5, self.most + 0.5 - zero

    @property
    def most(self) -> int:
        return (1 << self.bits) - 1

    def codes(self, scaled: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest codes of numbers in units of their scales, which are overwritten."""
        import torch

        if self.numbers == "int":
            return scaled.round_().add_(zero).clamp_(0, self.most).to(torch.uint8)
        if self.numbers == "e2m1":
            return _e2m1(scaled)
        most = _LARGEST[self.numbers]
        return scaled.clamp_(-most, most).to(torch.float8_e4m3fn if self.numbers == "e4m3" else torch.float8_e5m2)

    def numbers_of(self, codes: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        """Return what codes stand for, in units of their scales, as float32."""
        import torch

        if self.numbers == "int":
            return codes.float() - zero
        return torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])[codes.long()] if self.bits == 4 else codes.float()


def _e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Return the codes of E2M1: its steps are 1/2 up to 2, 1 up to 4, and 2 up to 6.

    2^23 steps are added, so that float32 itself rounds, and the last bits count the steps: 2 to a power of two.
    """
    import torch

    bits = scaled.view(torch.int32)
    size = scaled.abs().clamp_(max=_LARGEST["e2m1"])
    power = (size.view(torch.int32) & (255 << 23)).clamp_(min=127 << 23)
    power += 22 << 23
    code = size.add_(power.view(torch.float32)).view(torch.int32)
    torch.bitwise_right_shift(code, 22, out=power)
    code &= 7
    code += power
    code -= (127 + 22) << 1
    bits >>= 28
    bits &= 8
    return code.bitwise_or_(bits).to(torch.int16).to(torch.uint8)


def as_floats(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32: E8M0 exponents, as such or as bytes, are powers of two; 255 is NaN."""
    import math

    import torch

    if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return scale.float()
    exponents = scale.view(torch.uint8)
    return torch.exp2(exponents.float() - 127).masked_fill_(exponents == 255, math.nan)


class Quantities(NamedTuple):
    """A quantised part of a matrix: codes [rows, in], scales and zero points [rows / tall, in / wide]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


class OldScales(NamedTuple):
    """The scales that a part of a matrix had, as stored, and its zero points."""

    scale: torch.Tensor
    zero: torch.Tensor | None


def quantise(
    values: torch.Tensor,
    form: Form,
    old: OldScales | None = None,
    overall: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> Quantities:
    """Quantise float32 values [rows, in], whole blocks of them. `overall` is the second scale where the form has one.

    With `weights` [in], such as the mean squares of the inputs, a block takes that of a few scales which has the least
    sum of weight times squared error; numbers may then be clipped. Raises ValueError where a value is not finite.
    """
    blocks, scale, zero = _scaled(values, form, old, overall, weights)
    codes = _codes(form, blocks, _effective(scale, form, overall), zero)
    flat = codes.view(codes.shape[0] * form.tall, -1)
    whole = flat.shape == values.shape
    return Quantities(flat if whole else flat[: values.shape[0], : values.shape[1]].contiguous(), scale, zero)


def scales(
    values: torch.Tensor,
    form: Form,
    old: OldScales | None = None,
    overall: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points that `quantise` gives, without codes."""
    return _scaled(values, form, old, overall, weights)[1:]


def squared_error(
    values: torch.Tensor, form: Form, found: Quantities, overall: torch.Tensor | None
) -> tuple[float, float]:
    """Return the sums of squares of the rounding of values [rows, in] and of themselves, in float64.

    `found` has the scales of each of these rows: [rows, in / wide].
    """
    blocks, codes = _blocks(values, 1, form.wide), _blocks(found.codes, 1, form.wide)
    read = _read(form, codes, _effective(found.scale, form, overall), found.zero)
    return float((read - blocks).double().square_().sum()), float(blocks.double().square_().sum())


def _scaled(
    values: torch.Tensor,
    form: Form,
    old: OldScales | None,
    overall: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return values in blocks [rows / tall, tall, in / wide, wide], their scales and zero points."""
    import torch

    blocks = _blocks(values, form.tall, form.wide)
    if old is None and not form.zeros:
        high = blocks.abs().amax((1, 3))
        low = -high
    else:
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if not bool(torch.maximum(high, -low).isfinite().all()):
        raise ValueError("holds numbers that are not finite")
    scale, zero = _fresh(form, low, high, overall)
    if old is not None:
        kept_scale, kept_zero = old.scale.view(scale.shape), None if old.zero is None else old.zero.view(scale.shape)
        keep = _kept(form, blocks, (low, high), scale, OldScales(kept_scale, kept_zero), overall)
        scale = _chosen(keep, kept_scale, scale)
        if zero is not None and kept_zero is not None:
            zero = torch.where(keep, kept_zero, zero)
    if weights is not None:
        scale = _of_least_error(form, blocks, scale, zero, overall, weights)
    return blocks, scale, zero


def _of_least_error(
    form: Form,
    blocks: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    overall: torch.Tensor | None,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return for each block its scale or one near it, by the sum of weight times squared error."""
    import torch

    weighed = _blocks(weights[None], 1, form.wide)

    def error(tried: torch.Tensor) -> torch.Tensor:
        effective = _effective(tried, form, overall)
        read = _read(form, _codes(form, blocks, effective, zero), effective, zero)
        return (read.sub_(blocks).square_() * weighed).sum((1, 3))

    least = error(scale)
    best = scale
    for factor in _POWERS_NEAR if form.powers or form.scale_dtype in EXPONENTS else _SCALES_NEAR:
        tried = _near(scale, factor, form)
        found = error(tried)
        better = found < least
        best, least = _chosen(better, tried, best), torch.where(better, found, least)
    return best


def _near(scale: torch.Tensor, factor: float, form: Form) -> torch.Tensor:
    """Return scales times a factor, in their dtype; themselves where that is none."""
    import torch

    if form.scale_dtype in EXPONENTS:
        exponents = scale.view(torch.uint8).int() + (1 if factor > 1 else -1)
        return exponents.clamp_(0, 254).to(torch.uint8).view(scale.dtype)
    most = torch.finfo(scale.dtype).max
    near = (scale.float() * factor).clamp_(max=most).to(scale.dtype)
    return _chosen(near.float() > 0, near, scale)


def overall_scale(form: Form, most: float) -> torch.Tensor:
    """Return the second scale (float32) of matrices whose largest number is `most`, for a form that has one."""
    import torch

    needed = torch.tensor([most / (form.largest * LARGEST_SCALE) or 2.0**-23])
    return 1 / needed if form.overall == "over" else needed


def rounding_squares(values: torch.Tensor, form: Form) -> tuple[float, float]:
    """Return what `squared_error` does for float32 values [rows, in] that are quantised in a form, whole blocks."""
    overall = overall_scale(form, float(values.abs().max())) if form.overall else None
    found = quantise(values, form, None, overall)
    if form.tall > 1:
        found = found._replace(scale=found.scale.repeat_interleave(form.tall, 0)[: len(values)])
    return squared_error(values, form, found, overall)


def _chosen(keep: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    import torch

    if new.element_size() > 1:
        return torch.where(keep, old, new)
    return torch.where(keep, old.view(torch.uint8), new.view(torch.uint8)).view(new.dtype)  # no floats of 8 bits


def _blocks(values: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
    """Return [rows, in] as [rows / tall, tall, in / wide, wide], padded with zeros."""
    import torch

    rows, width = values.shape
    down, across = -(-rows // tall), -(-width // wide)
    if (down * tall, across * wide) != (rows, width):
        values = torch.nn.functional.pad(values, (0, across * wide - width, 0, down * tall - rows))
    return values.view(down, tall, across, wide)


def _fresh(
    form: Form, low: torch.Tensor, high: torch.Tensor, overall: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales, and zero points, for blocks of numbers from `low` to `high`."""
    import torch

    most = torch.maximum(high, -low)
    apart = form.zeros and not form.fixed
    if apart:
        low, high = low.clamp(max=0), high.clamp(min=0)
        # The code of zero is `less` at least, as what is stored is not negative.
        exact = torch.maximum((high - low) / form.most, high / (form.most - form.less))
    elif form.scale_dtype in EXPONENTS:
        # The least power of two above the number over the limit; that of blocks of zeros is the least there is.
        _, exponent = torch.frexp(most / form.limit)
        exponent = (exponent + 127).clamp_(0, 254).masked_fill_(most == 0, 0).to(torch.uint8)
        return exponent.view(torch.float8_e8m0fnu) if form.scale_dtype == "F8_E8M0" else exponent, None
    elif form.powers:
        mantissa, exponent = torch.frexp(most / form.limit)
        exact = torch.ldexp(torch.where(mantissa == 0, 0.0, 1.0), exponent)
    else:
        exact = most / form.largest
    if overall is not None:
        exact = exact * overall.float() if form.overall == "over" else exact / overall.float()
    scale = _rounded(exact, form, 1.0 if apart else form.largest / form.limit)
    if not form.zeros:
        return scale, None
    if form.fixed:
        return scale, torch.full_like(scale, form.middle - form.less, dtype=torch.uint8)
    zero = (-low / scale.float()).round_().clamp_(form.less, form.most) - form.less
    return scale, zero.to(torch.uint8)


def _rounded(exact: torch.Tensor, form: Form, slack: float) -> torch.Tensor:
    """Return scales in their dtype, the next larger ones where the nearest is below `slack` of what is needed."""
    import torch

    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
    dtype = kind[form.scale_dtype]
    if dtype == torch.float8_e4m3fn:
        exact = exact.clamp(max=448.0)
    scale = exact.to(dtype)
    bits = scale.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.element_size()])
    if dtype != torch.float32:
        bits += scale.float() < exact * slack  # positive floats are ordered as their bits
    least = torch.tensor(torch.finfo(dtype).eps).to(dtype).view(bits.dtype)
    return bits.masked_fill_(exact == 0, int(least)).view(dtype)


def _effective(scale: torch.Tensor, form: Form, overall: torch.Tensor | None) -> torch.Tensor:
    """Return what a number of each block is multiplied by when it is read, as float32."""
    factor = as_floats(scale)
    if overall is None:
        return factor
    return factor / overall.float() if form.overall == "over" else factor * overall.float()


def _codes(form: Form, blocks: torch.Tensor, effective: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return form.codes(blocks / effective[:, None, :, None], _zero(form, zero))


def _read(form: Form, codes: torch.Tensor, effective: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return what codes in blocks stand for, as float32."""
    return form.numbers_of(codes, _zero(form, zero)).mul_(effective[:, None, :, None])


def _zero(form: Form, zero: torch.Tensor | None) -> torch.Tensor | float:
    return float(form.middle) if zero is None else zero.float()[:, None, :, None] + form.less


def _kept(
    form: Form,
    blocks: torch.Tensor,
    span: tuple[torch.Tensor, torch.Tensor],
    fresh: torch.Tensor,
    old: OldScales,
    overall: torch.Tensor | None,
) -> torch.Tensor:
    """Return which blocks keep their old scale: they fit it and need more than half of it, or lie on its steps."""
    effective = _effective(old.scale, form, overall)
    below, above = form.limits(float(form.middle) if old.zero is None else old.zero.float() + form.less)
    keep = (-span[0] <= below * effective) & (span[1] <= above * effective)
    keep &= 2 * _effective(fresh, form, overall) > effective
    if not bool(keep.all()):
        keep |= _on_steps(form, blocks, effective, old.zero).all(3).all(1)
    return keep


def _on_steps(form: Form, blocks: torch.Tensor, effective: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return which numbers are what their nearest codes stand for."""
    return _read(form, _codes(form, blocks, effective, zero), effective, zero) == blocks


def on_steps(values: torch.Tensor, form: Form, scale: torch.Tensor, overall: torch.Tensor) -> bool:
    """Whether all values [rows, in] are numbers that there are with these scales [rows, in / wide]."""
    blocks = _blocks(values, 1, form.wide)
    return bool(_on_steps(form, blocks, _effective(scale, form, overall), None).all())
