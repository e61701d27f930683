"""What the stored codes of quantised weights stand for, row by row, in float32: functions of torch tensors.

Each takes the width of the rows, the codes, the scales and what else belongs to them, one row per output row, and
returns [rows, width]. `wide`: how many neighbouring columns share a scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.plan.quantised_form import MAGNITUDES, as_floats

if TYPE_CHECKING:
    import torch


def _spread(scale: torch.Tensor, width: int, wide: int) -> torch.Tensor:
    """Return scales [rows, columns/wide] as float32 [rows, columns], or [rows, 1] where one holds for a row."""
    factor = as_floats(scale)
    return factor if factor.shape[1] == 1 else factor.repeat_interleave(wide, 1)[:, :width]


def float_values(width: int, weight: torch.Tensor, scale: torch.Tensor, wide: int) -> torch.Tensor:
    """Return FP8 or int8 weights [rows, width] times their scales."""
    return weight.float().mul_(_spread(scale, width, wide))


def fp4_values(
    width: int,
    packed: torch.Tensor,
    scale: torch.Tensor,
    overall: torch.Tensor | None = None,
    wide: int = 32,
    divide: bool = False,
) -> torch.Tensor:
    """Return 4-bit floats [rows, width / 2] bytes times their scales, times or divided by the overall one."""
    import torch

    table = torch.tensor([*MAGNITUDES, *(-v for v in MAGNITUDES)], device=packed.device)
    nibbles = packed.view(torch.uint8)
    values = torch.stack([table[(nibbles & 15).long()], table[(nibbles >> 4).long()]], dim=-1).flatten(1)
    factor = _spread(scale, width, wide)
    if overall is not None:
        factor = factor / overall.float() if divide else factor * overall.float()
    return values.mul_(factor)


def packed_values(width: int, packed: torch.Tensor, scale: torch.Tensor, bits: int, wide: int) -> torch.Tensor:
    """Return integers packed into 32-bit words, the first in the lowest bits, offset by half their range."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = (packed.view(torch.int32)[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (values.flatten(1) - (1 << (bits - 1))).float().mul_(_spread(scale, width, wide))


def integer_values(
    width: int,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *more: torch.Tensor,
    wide: int,
    middle: int,
    zeros: bool,
    less: int,
) -> torch.Tensor:
    """Return integers [rows, width] (U8) less their zero points, times their scales [rows, width / wide].

    `more` are the zero points where there are some, stored less `less`; then the group of each input where groups are
    not neighbours.
    """
    zero = more[0].float() + less if zeros else scale.new_full((1, 1), middle).float()
    factor = scale.float()
    if len(more) > zeros:
        order = more[-1].view(-1).long()
        return (codes.float() - (zero[:, order] if zeros else zero)).mul_(factor[:, order])
    wide_zero = zero.repeat_interleave(wide, 1) if zeros else zero
    return (codes.float() - wide_zero).mul_(factor.repeat_interleave(wide, 1))
