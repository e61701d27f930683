"""Drop the largest and the smallest elements of the differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.task_vectors import Densities, Keep, Lambda, Mask, Normalize, Rescale, Weights, summed
from moesurgery.recipe.parameters import Param

Gamma = Annotated[tuple[float, ...], Param("share of the largest elements that go", minimum=0, maximum=1)]


def middling(unit: MergeInputs, density: Sequence[float], gamma: Sequence[float]) -> Keep:
    """Keep the share `density` of each difference that comes after the `gamma` largest magnitudes.

    Where less than `density` comes after them, fewer of the largest go.
    """
    stay = [int(share * unit.numel) for share in density]
    go = [min(int(share * unit.numel), unit.numel - count) for share, count in zip(gamma, stay, strict=True)]
    found = unit.cuts(
        lambda chunk: [abs(delta) for delta in chunk.deltas],
        [[top, top + count] for top, count in zip(go, stay, strict=True)],
    )

    def keep(chunk: Chunk, model: int) -> Array:
        size = abs(chunk.deltas[model])
        top, all_kept = found[model]
        return all_kept.mask(size, chunk.start) & ~top.mask(size, chunk.start)

    return keep


@merge_method("breadcrumbs", kind="streamed", models=(0, None), base="required")
def breadcrumbs(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = False,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """Drop the `gamma` largest elements of each difference and the smallest down to `density`, and add up.

    Model Breadcrumbs (arXiv 2312.06795).
    """
    keep = middling(unit, density, gamma)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale)


@merge_method("breadcrumbs_ties", kind="streamed", models=(0, None), base="required")
def breadcrumbs_ties(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = False,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """As `breadcrumbs`, then elect a sign and add up what agrees with it.

    Model Breadcrumbs (arXiv 2312.06795) before the last two steps of TIES (arXiv 2306.01708).
    """
    keep = middling(unit, density, gamma)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale, elect=True)
