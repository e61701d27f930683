"""Trim, elect signs, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.task_vectors import Densities, Keep, Lambda, Mask, Normalize, Rescale, Weights, summed


@merge_method("ties", kind="streamed", models=(0, None), base="required")
def ties(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    rescale: Rescale = False,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """Keep the `density` largest elements of each difference, elect a sign, and average what agrees with it.

    The sign is that of the weighted sum. TIES (arXiv 2306.01708).
    """
    keep = largest(unit, density)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale, elect=True)


def largest(unit: MergeInputs, density: Sequence[float]) -> Keep:
    """Keep the share `density` of largest magnitude of each difference, at least one element unless it is 0.

    Of equal magnitudes the later ones are kept.
    """
    counts = [max(int(share * unit.numel), 1) if share > 0 else 0 for share in density]
    trimmed = [i for i, count in enumerate(counts) if count < unit.numel]
    found = unit.cuts(lambda chunk: [abs(chunk.deltas[i]) for i in trimmed], [[counts[i]] for i in trimmed])
    cuts = {i: cut for i, (cut,) in zip(trimmed, found, strict=True)}

    def keep(chunk: Chunk, model: int) -> Array | None:
        return cuts[model].mask(abs(chunk.deltas[model]), chunk.start) if model in cuts else None

    return keep
