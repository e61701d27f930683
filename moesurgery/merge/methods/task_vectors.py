"""Sums of task vectors, the differences of the models to their base: thinned, weighted, and with signs agreed on.

What `task_arithmetic`, `ties`, `dare_*`, `breadcrumbs*` and `della*` have in common; they differ in which elements of
a difference they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.recipe.parameters import Param

if TYPE_CHECKING:
    import numpy as np

Keep = Callable[[Chunk, int], "Array | None"]  # which elements of one model's difference stay; None for all

Weights = Annotated[tuple[float, ...], Param("factor on the model's difference")]
Densities = Annotated[tuple[float, ...], Param("share of the elements that stay", minimum=0, maximum=1)]
Normalize = Annotated[bool, Param("divide by the sum of the weights that count")]
Lambda = Annotated[float, Param("factor on the sum of all differences")]
Rescale = Annotated[bool, Param("bring what stays to the former sum of magnitudes")]
Mask = Annotated[bool, Param("accepted for mergekit's recipes: it says how masks are stored there")]

NEGLIGIBLE = 1e-8  # a sum of weights below this counts as 1


def everything(chunk: Chunk, model: int) -> None:
    """Keep all elements."""


def summed(
    unit: MergeInputs,
    keep: Keep,
    weight: Sequence[float],
    *,
    normalize: bool,
    lambda_: float,
    rescale: bool = False,
    elect: bool = False,
) -> Callable[[Chunk], Array]:
    """Return the action `base + lambda * sum(weight_i * kept(d_i))`.

    `normalize` divides by the sum of the weights; with `elect`, only elements whose sign is that of the weighted sum
    count, in the sum and in its divisor (TIES).
    """
    factors = list(weight)
    if rescale:
        before, after = unit.total(lambda chunk: _magnitudes(chunk, keep))
        factors = [w * b / a if a else w for w, b, a in zip(weight, before, after, strict=True)]

    def merged(chunk: Chunk) -> Array:
        parts = chunk.deltas  # made for this, and changed in place
        for i, delta in enumerate(parts):
            kept = keep(chunk, i)
            if kept is not None:
                delta *= kept
            delta *= float(factors[i])
        total = _elected(parts, weight, normalize) if elect else _total(parts)
        if normalize and not elect:
            total /= _divisor(sum(weight))
        if lambda_ != 1:
            total *= lambda_
        total += chunk.base
        return total

    return merged


def _magnitudes(chunk: Chunk, keep: Keep) -> np.ndarray:
    """Return the sums of the magnitudes of all differences, and of what is kept of them: [2, models]."""
    import numpy as np

    found = np.zeros((2, len(chunk.deltas)))
    for i, delta in enumerate(chunk.deltas):
        size = abs(delta)
        kept = keep(chunk, i)
        found[0, i] = float(size.sum())
        if kept is not None:
            size *= kept
        found[1, i] = found[0, i] if kept is None else float(size.sum())
    return found


def _total(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _divisor(total: float) -> float:
    return total if abs(total) >= NEGLIGIBLE else 1.0


def _elected(parts: Sequence[Array], weight: Sequence[float], normalize: bool) -> Array:
    """Return the sum of the parts that have the sign of their whole sum; a sum of 0 counts as positive."""
    if len(parts) == 1:
        return parts[0] / _divisor(weight[0]) if normalize else parts[0]
    return agreeing(parts, weight, _total(parts) >= 0, normalize)


def agreeing(parts: Sequence[Array], weight: Sequence[float], positive: Array, normalize: bool) -> Array:
    """Return the sum of the elements with the elected sign, over the sum of their weights where `normalize` says so."""
    xp = namespace(positive)
    kind = parts[0].dtype
    sign = xp.asarray(positive, dtype=kind) * 2 - 1
    total, divisor = None, None
    for part, share in zip(parts, weight, strict=True):
        agrees = part * sign
        counts = agrees > 0
        agrees *= counts
        total = agrees if total is None else total + agrees
        if normalize:
            counted = xp.asarray(counts, dtype=kind) * share
            divisor = counted if divisor is None else divisor + counted
    total = total * sign
    if divisor is None:
        return total
    divisor[abs(divisor) < NEGLIGIBLE] = 1
    return total / divisor
