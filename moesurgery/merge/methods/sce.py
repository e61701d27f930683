"""Select by variance, calculate weights, erase what disagrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.ties import Mask, sum_of_agreeing
from moesurgery.recipe.parameters import Param


@merge_method("sce", kind="streamed", models=(0, None), base="required")
def sce(
    inputs: MergeInputs,
    *,
    select_topk: Annotated[
        float,
        Param("share of the positions where the models differ that count: those that vary most", minimum=0, maximum=1),
    ] = 1.0,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """Weights for each tensor from the mean squares of the differences, at the positions that vary most.

    Of each position only the differences with the sign of their sum count. SCE (FuseChat, arXiv 2408.07990).
    """
    chosen = None
    if select_topk < 1 and inputs.count > 1:  # one model alone does not vary: there is nothing to select by
        varying = int(inputs.total(lambda chunk: [int(_differ(chunk).sum())])[0])
        chosen = inputs.thresholds(lambda chunk: [_variance(chunk)], [[int(select_topk * varying)]])[0][0]

    def differences(chunk: Chunk) -> list[Array]:
        if chosen is None:
            return chunk.deltas
        mask = chosen.mask(_variance(chunk), chunk.start)
        return [delta * mask for delta in chunk.deltas]

    squares = inputs.total(lambda chunk: [float((d * d).sum()) for d in differences(chunk)])
    total = float(squares.sum())
    weight = [float(square) / total if total else 1 / inputs.count for square in squares]

    def merge(chunk: Chunk) -> Array:
        kept = differences(chunk)
        positive = sum(kept[1:], kept[0]) >= 0
        return chunk.base + sum_of_agreeing([d * w for d, w in zip(kept, weight, strict=True)], weight, positive, True)

    return merge


def _differ(chunk: Chunk) -> Array:
    """Return where the models are not all the same."""
    first = chunk.models[0]
    differ = first != first
    for model in chunk.models[1:]:
        differ = differ | (model != first)
    return differ


def _variance(chunk: Chunk) -> Array:
    """Return the variance over the models, of which only the order matters."""
    deltas = chunk.deltas
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    squares = [(delta - mean) * (delta - mean) for delta in deltas]
    return sum(squares[1:], squares[0])
