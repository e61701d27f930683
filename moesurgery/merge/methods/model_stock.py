"""The point between a base and fine-tuned models that their angles suggest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.method import Axis, merge_method
from moesurgery.recipe.parameters import Param


def _axis(values: Mapping[str, Any]) -> Axis | None:
    return "rows" if values["filter_wise"] else None


@merge_method("model_stock", kind="combination", models=(2, None), base="required", axis=_axis)
def model_stock(
    gram: Array,
    *,
    filter_wise: Annotated[bool, Param("a ratio for each row instead of the whole tensor")] = False,
) -> Array:
    """`t * mean(w_i) + (1-t) * base` with `t = N c / (1 + (N-1) c)`, c the mean cosine between the differences.

    Model Stock (arXiv 2403.19522). Differences of length 0 have no direction: their cosines count as 0.
    """
    import numpy as np

    count = gram.shape[-1]
    lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    products = lengths[..., :, None] * lengths[..., None, :]
    cosines = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    pairs = np.triu_indices(count, 1)
    cosine = cosines[..., pairs[0], pairs[1]].mean(-1)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return np.asarray(np.repeat(ratio[..., None] / count, count, -1))
