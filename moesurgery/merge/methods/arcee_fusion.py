"""Take over the changes that stand out."""

from __future__ import annotations

from collections.abc import Callable

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method


@merge_method("arcee_fusion", kind="streamed", models=(1, 1), base="required", rows=True)
def arcee_fusion(inputs: MergeInputs) -> Callable[[Chunk], Array]:
    """Take an element from the model where its importance is an outlier, else from the base.

    Importance is `|w - base|` times the divergence KL(softmax(row of w) || softmax(row of base)); an outlier is at
    least the median plus 1.5 times the distance of the quartiles. Arcee Fusion (MergeKit 0.1).
    """
    count = inputs.numel

    def from_top(share: float) -> int:
        return count - int(share * (count - 1))

    ranks = [[from_top(0.75), count - (count - 1) // 2, from_top(0.25)]]
    upper, median, lower = (t.value for t in inputs.thresholds(lambda chunk: [_importance(chunk)], ranks)[0])
    threshold = median + 1.5 * (upper - lower)

    def merge(chunk: Chunk) -> Array:
        return namespace(chunk.base).where(_importance(chunk) >= threshold, chunk.models[0], chunk.base)

    return merge


def _importance(chunk: Chunk) -> Array:
    xp = namespace(chunk.base)
    new, old = _log_softmax(chunk.models[0]), _log_softmax(chunk.base)
    divergence = (xp.exp(new) * (new - old)).sum(-1)[:, None]
    return xp.abs(chunk.deltas[0] * divergence)


def _log_softmax(rows: Array) -> Array:
    xp = namespace(rows)
    shifted = rows - xp.amax(rows, -1)[:, None]
    return shifted - xp.log(xp.exp(shifted).sum(-1))[:, None]
