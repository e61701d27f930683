"""Multiplying the routed experts' output of one layer: which tensors are multiplied, and how exactly.

The output of an expert is linear in its down-projection and that projection's bias, and in nothing else:
scaling gate or up would pass through the activation. Of a quantised down-projection one companion is
multiplied: a floating-point scale (exact to its rounding), or an exponent (exact, powers of two only). Where none can
take the factor, the weights are opened, multiplied, and quantised again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from moesurgery.checkpoint.block_values import FACTORS
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import BlockScale, Exponent, scale
from moesurgery.expr.nodes import Expr, Slice, concat
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.plan.dequantise import UnknownFormError
from moesurgery.plan.plan import Plan
from moesurgery.plan.requantise import Requantize, SquaresOf, with_experts_opened

EXPONENT_TYPES = frozenset({"F8_E8M0", "U8"})


class CoarseScaleError(RefusedError):
    """A factor that no scale of quantised weights can take; the weights themselves may."""


def by_scales_or_weights(
    plan: Plan, requantize: Requantize, edit: Callable[[Plan], Plan], squares: SquaresOf = lambda opened: {}
) -> Plan:
    """Return `edit(plan)`, which multiplies outputs: where scales cannot take the factors, on weights opened for it.

    `squares`: see `plan.requantise.written_back`. Raises CoarseScaleError where the weights are of a form that cannot
    be opened either.
    """
    coarse: CoarseScaleError | None = None
    if requantize == "as-source":
        try:
            return edit(plan)
        except CoarseScaleError as error:
            coarse = error
    try:
        return with_experts_opened(plan, requantize, edit, squares)
    except UnknownFormError:
        if coarse is None:
            raise
        raise coarse from None


def is_quantised(block: MoeBlock, tensors: Mapping[str, Expr]) -> bool:
    """Whether the block's down-projections need companions to have a value."""
    return any(m.stem.main and tensors[m.name].dtype not in PLAIN_FLOATS for m in block.named("down"))


_FACTOR_HINT = "`moesurgery validate --level values` finds NaN and infinity; --scale NUMBER needs no estimate"


def check_factors(where: str, factors: Sequence[float], hint: str = _FACTOR_HINT) -> None:
    """Raise RefusedError, with `hint`, where a factor of block `where` is not a finite, positive number."""
    for expert, factor in enumerate(factors):
        if not (math.isfinite(factor) and factor > 0):
            which = f", expert {expert}" if len(factors) > 1 else ""
            raise RefusedError(
                f"{where}{which}: the factor on the output is {factor:.6g}, not a finite and positive number",
                hint,
            )


def scaled_output(block: MoeBlock, tensors: Mapping[str, Expr], factor: float | Sequence[float]) -> dict[str, Expr]:
    """Return the changed tensors that multiply each expert's output by `factor` (one, or one per expert).

    Raises RefusedError where the stored form cannot hold the factor, or the factor is not finite and positive.
    """
    factors = [float(factor)] * block.experts if isinstance(factor, (int, float)) else list(factor)
    check_factors(block.where, factors)
    down = block.named("down")
    changed: dict[str, Expr] = {}
    for member in down:
        expr = tensors[member.name]
        if member.stem.bias or (member.stem.main and expr.dtype in PLAIN_FLOATS):
            changed[member.name] = _apply(member, expr, factors, lambda e, f: scale(e, f))
    quantised = [m for m in down if m.stem.main and tensors[m.name].dtype not in PLAIN_FLOATS]
    companions: dict[str, list[BlockTensor]] = {}
    for member in down:
        if member.stem.companion is not None and member.stem.companion.kind in ("scale", "divisor"):
            companions.setdefault(member.base, []).append(member)
    for member in quantised:
        chosen = min(companions.get(member.base, []), key=_rank, default=None)
        expr = tensors[member.name]
        if chosen is None and expr.dtype in FACTORS:
            changed[member.name] = _apply(member, expr, factors, lambda e, f: e if f == 1 else BlockScale(e, f))
            continue
        offsets = [m for m in down if m.base == member.base and m.stem.suffix == ".biases"]
        if chosen is None or chosen.stem.suffix == ".weight.nested_absmax":
            why = "and has no scale tensor that could take a factor"
            if chosen is not None:
                why = "with doubly quantised scales, whose common offset no tensor holds"
            raise CoarseScaleError(
                f"{member.name} is {tensors[member.name].dtype} {why}",
                "use --scale none, or dequantise first with the tool that made it",
            )
        for taker in (chosen, *offsets):  # MLX: w = scale * q + bias
            changed[taker.name] = _scaled_companion(taker, tensors[taker.name], factors)
    return changed


def _rank(member: BlockTensor) -> int:
    return member.stem.companion.rank if member.stem.companion else 0


def _scaled_companion(member: BlockTensor, expr: Expr, factors: list[float]) -> Expr:
    assert member.stem.companion is not None
    if member.stem.companion.kind == "divisor":
        factors = [1 / f for f in factors]
    if expr.dtype in PLAIN_FLOATS:
        return _apply(member, expr, factors, lambda e, f: scale(e, f))
    if expr.dtype in EXPONENT_TYPES:
        shifts = [_power_of_two(f, member) for f in factors]
        return _apply(member, expr, [float(s) for s in shifts], lambda e, s: Exponent(e, int(s)) if s else e)
    raise CoarseScaleError(
        f"{member.name} is {expr.dtype}, too coarse to take a factor",
        "use --scale none, or dequantise first with `moesurgery convert --dequantize`",
    )


def _power_of_two(factor: float, member: BlockTensor) -> int:
    mantissa, exponent = math.frexp(factor)
    if factor <= 0 or mantissa != 0.5:
        nearest = 2.0 ** round(math.log2(factor)) if factor > 0 else 1.0
        raise CoarseScaleError(
            f"{member.name} holds exponents: only powers of two are exact factors, and this one is {factor:.6g}",
            f"use --scale none or --scale {nearest:g}, or dequantise first with `moesurgery convert --dequantize`",
        )
    return exponent - 1


def _apply(member: BlockTensor, expr: Expr, factors: list[float], change) -> Expr:  # type: ignore[no-untyped-def]
    """Apply `change(expr, factor)` with each expert's own factor along the expert axis."""
    if member.expert is not None:
        return change(expr, factors[member.expert])  # type: ignore[no-any-return]
    if all(f == factors[0] for f in factors):
        return change(expr, factors[0])  # type: ignore[no-any-return]
    rows = expr.shape[0] // len(factors)
    return concat([change(Slice(expr, e * rows, (e + 1) * rows), f) for e, f in enumerate(factors)])
