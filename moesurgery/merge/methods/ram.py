"""Average what several models changed, keep what only one did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param

Least = Annotated[float, Param("a difference up to this counts as none", minimum=0)]


def _mean_of_changes(chunk: Chunk, epsilon: float, factors: Sequence[float]) -> Array:
    xp = namespace(chunk.base)
    changed = [abs(delta) > epsilon for delta in chunk.deltas]
    count = sum(changed[1:], changed[0] * 1)
    alone = count == 1
    total = None
    for delta, mask, factor in zip(chunk.deltas, changed, factors, strict=True):
        term = delta * mask
        if factor != 1:
            term = xp.where(alone, term * factor, term)
        total = term if total is None else total + term
    return chunk.base + total / xp.where(count > 0, count, xp.ones_like(count))


@merge_method("ram", kind="streamed", models=(0, None), base="required")
def ram(inputs: MergeInputs, *, epsilon: Least = 1e-5) -> Callable[[Chunk], Array]:
    """At each position, the mean of the differences that are not negligible.

    So a change that only one model made is kept whole. RAM (arXiv 2601.13572).
    """
    return lambda chunk: _mean_of_changes(chunk, epsilon, [1.0] * inputs.count)


@merge_method("ramplus_tl", kind="streamed", models=(0, None), base="required")
def ramplus_tl(
    inputs: MergeInputs,
    *,
    epsilon: Least = 1e-5,
    r: Annotated[float, Param("how much a change of one model alone is strengthened", minimum=0)] = 0.1,
    alpha: Annotated[float, Param("the largest ratio of shared to own changes that counts", minimum=0)] = 0.2,
) -> Callable[[Chunk], Array]:
    """As `ram`, with a model's own changes times `1 + r * min(shared / own, alpha)`, counted for each tensor.

    RAM+ (arXiv 2601.13572), tensor by tensor.
    """

    def counted(chunk: Chunk) -> list[float]:
        changed = [abs(delta) > epsilon for delta in chunk.deltas]
        count = sum(changed[1:], changed[0] * 1)
        return [
            float(number) for mask in changed for number in ((mask & (count > 1)).sum(), (mask & (count == 1)).sum())
        ]

    counts = inputs.total(counted).reshape(-1, 2)
    factors = [1 + r * min(shared / own if own else alpha, alpha) for shared, own in counts]
    return lambda chunk: _mean_of_changes(chunk, epsilon, factors)
