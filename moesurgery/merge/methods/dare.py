"""Drop elements of the differences at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.task_vectors import Densities, Keep, Lambda, Mask, Normalize, Rescale, Weights, summed


def at_random(density: Sequence[float]) -> Keep:
    """Keep each element with its model's probability."""

    def keep(chunk: Chunk, model: int) -> Array | None:
        return chunk.drawn(model, float(density[model])) if density[model] < 1 else None

    return keep


@merge_method("dare_linear", kind="streamed", models=(0, None), base="required", random=True)
def dare_linear(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """Keep each element of each difference with probability `density`, rescale, and add up.

    DARE (arXiv 2311.03099). The factor brings what stays to the difference's former sum of magnitudes: 1/density but
    for chance.
    """
    return summed(unit, at_random(density), weight, normalize=normalize, lambda_=lambda_, rescale=rescale)


@merge_method("dare_ties", kind="streamed", models=(0, None), base="required", random=True)
def dare_ties(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """As `dare_linear`, then elect a sign and add up what agrees with it.

    DARE (arXiv 2311.03099) before the last two steps of TIES (arXiv 2306.01708).
    """
    keep = at_random(density)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale, elect=True)
