"""Quantised weights as the numbers they stand for, expert by expert, while a layer is read.

FP8 with one scale per tensor, channel or block (floats, or powers of two as E8M0), and MXFP4 (OCP Microscaling
Formats 1.0: two 4-bit floats per byte, low nibble first, one exponent per 32 values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.families.quantised import method, quantisation_config, take_apart
from moesurgery.plan.expr import Expr, Rows, reshape, stack
from moesurgery.plan.plan import Plan
from moesurgery.plan.tensors import Applied, transpose

if TYPE_CHECKING:
    import torch

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantised(plan: Plan) -> tuple[dict[str, Expr], dict[str, str]]:
    """Return the plan's tensors as plain floats, and the new name of each main tensor whose name changed.

    Raises RefusedError for a form that is not known here.
    """
    names = plan.tensors
    stems = {name: take_apart(name, names.__contains__, lambda n: names[n].dtype) for name in names}
    companions: dict[str, dict[str, Expr]] = {}  # by the name without suffix
    for name, stem in stems.items():
        if stem.companion is not None:
            companions.setdefault(stem.base, {})[stem.suffix] = names[name]
    if not companions:
        return dict(names), {}
    found: dict[str, Expr] = {}
    renamed: dict[str, str] = {}
    for name, expr in names.items():
        if stems[name].companion is not None:
            continue
        beside = companions.get(stems[name].base, {})
        if not beside or stems[name].bias or expr.dtype in PLAIN_FLOATS:
            found[name] = expr
        elif expr.dtype in FP8:
            found[name] = _fp8(plan, name, expr, beside)
        elif stems[name].suffix == "_blocks" and "_scales" in beside:
            renamed[name] = stems[name].base
            found[stems[name].base] = _mxfp4(expr, beside["_scales"])
        else:
            raise RefusedError(
                f"{name} is stored as {method(plan.config) or expr.dtype}, which cannot be run here",
                "dequantise it first with the tool that made it; FP8 and MXFP4 are read as they are",
            )
    return found, renamed


def _fp8(plan: Plan, name: str, expr: Expr, beside: Mapping[str, Expr]) -> Expr:
    scales = [
        e
        for suffix, e in beside.items()
        if suffix.endswith(("scale_inv", "scale")) and "input" not in suffix and "activation" not in suffix
    ]
    if len(scales) != 1:
        raise RefusedError(f"{name} is FP8 with {len(scales)} scales, expected one")
    block = quantisation_config(plan.config).get("weight_block_size")
    parameters = (("block", tuple(block) if isinstance(block, (list, tuple)) else None),)
    return _each(fp8_values, (expr, scales[0]), expr.shape, parameters)


def _mxfp4(blocks: Expr, scales: Expr) -> Expr:
    out, into = blocks.shape[-3], blocks.shape[-2] * blocks.shape[-1] * 2
    return transpose(_each(mxfp4_values, (blocks, scales), (*blocks.shape[:-3], out, into), ()))


def _each(function: Callable[..., Any], of: tuple[Expr, ...], shape: tuple[int, ...], parameters: Any) -> Expr:
    """Apply a function to whole matrices; to each entry of the first axis where there are three axes."""
    if len(shape) < 3 or of[1].shape[:1] != shape[:1]:
        return Applied(function, of, "F32", shape, parameters)
    parts = [
        Applied(function, tuple(reshape(Rows(e, i, i + 1), e.shape[1:]) for e in of), "F32", shape[1:], parameters)
        for i in range(shape[0])
    ]
    return stack(list(parts))


def fp8_values(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """Return float32 values of FP8 [..., R, C] times scales: one, [..., R, 1], or one per `block`."""
    import torch

    scale = torch.exp2(scale.view(torch.uint8).float() - 127) if scale.element_size() == 1 else scale.float()
    values = weight.float()
    rows, width = values.shape[-2:]
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    if scale.ndim < values.ndim:
        scale = scale.reshape(*scale.shape, *(1,) * (values.ndim - scale.ndim))
    if scale.shape[-1] != 1 or scale.shape[-2] not in (1, rows):
        tall, wide = block or (-(-rows // scale.shape[-2]), -(-width // scale.shape[-1]))
        scale = scale.repeat_interleave(tall, -2)[..., :rows, :].repeat_interleave(wide, -1)[..., :width]
    return values.mul_(scale)


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [out, in] of MXFP4 blocks [out, in/32, 16] and exponents [out, in/32]."""
    import torch

    table = torch.tensor([*FP4, *(-v for v in FP4)])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)
