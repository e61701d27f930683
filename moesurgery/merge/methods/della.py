"""Drop elements of the differences at random, the small ones of each row more often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.task_vectors import Densities, Keep, Lambda, Mask, Normalize, Rescale, Weights, summed
from moesurgery.recipe.parameters import Param

Epsilon = Annotated[tuple[float, ...], Param("half of the range of the probabilities", minimum=0, maximum=1)]


def _out_of_range(values: Mapping[str, Any]) -> str | None:
    for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return f"density {density:g} and epsilon {epsilon:g}: their sum and difference must lie between 0 and 1"
    return None


def by_magnitude(density: Sequence[float], epsilon: Sequence[float]) -> Keep:
    """Keep elements with a probability that grows with their rank in the row, from density - epsilon to + epsilon."""

    def keep(chunk: Chunk, model: int) -> Array | None:
        if density[model] >= 1:
            return None
        size = abs(chunk.deltas[model])
        width = size.shape[-1]
        steps = max(width - 1, 1)
        lowest = density[model] - (epsilon[model] if width > 1 else 0)
        return chunk.drawn(model, _ranks(size) * (2 * epsilon[model] / steps) + lowest)

    return keep


def _ranks(rows: Array) -> Array:
    """Return the rank of each element in its row, 0 for the smallest, as floats; equal ones in their order."""
    xp = namespace(rows)
    stable = {"kind": "stable"} if xp.__name__ == "numpy" else {"stable": True}
    order = xp.argsort(rows, **stable)
    ranks = xp.empty_like(rows)
    numbers = xp.zeros_like(rows) + xp.arange(rows.shape[-1], dtype=rows.dtype, **_where(rows))
    if xp.__name__ == "numpy":
        xp.put_along_axis(ranks, order, numbers, -1)
        return ranks
    return ranks.scatter_(-1, order, numbers)


def _where(array: Array) -> dict[str, Any]:
    return {"device": array.device} if hasattr(array, "is_cuda") else {}


@merge_method("della", kind="streamed", models=(0, None), base="required", rows=True, random=True, refuse=_out_of_range)
def della(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """As `della_linear`, then elect a sign and average what agrees with it.

    DELLA (arXiv 2406.11617).
    """
    keep = by_magnitude(density, epsilon)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale, elect=True)


@merge_method(
    "della_linear", kind="streamed", models=(0, None), base="required", rows=True, random=True, refuse=_out_of_range
)
def della_linear(
    unit: MergeInputs,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    rescale: Rescale = True,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """Keep elements of each difference with a probability that grows with their rank in the row, rescale, add up.

    The probabilities go evenly from density - epsilon for a row's smallest element to density + epsilon for its
    largest. DELLA (arXiv 2406.11617). The factor brings what stays to the former sum of magnitudes.
    """
    keep = by_magnitude(density, epsilon)
    return summed(unit, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale)
