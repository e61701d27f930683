"""Interpolation along the arc between two models: `slerp` and `nuslerp`.

Both are weighted sums of the two tensors, with weights that depend only on their lengths and the angle between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.method import Axis, merge_method
from moesurgery.recipe.parameters import Param

STRAIGHT = 0.9995  # at a cosine beyond this (either way) `slerp` interpolates along the line


def _arc(gram: Array, t: float) -> tuple[Array, Array]:
    """Return the weights [..., 2] of two vectors at `t` on the arc between their directions, and the cosine [...].

    `gram` is [..., 2, 2]. A vector of length 0 counts as at a right angle. Where the directions are the same or
    opposite there is no arc: the weights are those of the line.
    """
    import numpy as np

    lengths = np.sqrt(gram[..., 0, 0] * gram[..., 1, 1])
    cosine = np.divide(gram[..., 0, 1], lengths, out=np.zeros_like(lengths), where=lengths > 0).clip(-1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    line = sine < 1e-7
    safe = np.where(line, 1, sine)
    first = np.where(line, 1 - t, np.sin((1 - t) * angle) / safe)
    second = np.where(line, t, np.sin(t * angle) / safe)
    return np.stack([first, second], -1), cosine


@merge_method("slerp", kind="combination", models=(2, 2), base="first")
def slerp(gram: Array, *, t: Annotated[float, Param("0 is the base model, 1 the other")]) -> Array:
    """Spherical interpolation: `sin((1-t)a)/sin(a) * w_0 + sin(t*a)/sin(a) * w_1` with a the angle between them.

    Nearly parallel tensors (cosine beyond 0.9995) are interpolated along the line. Shoemake, SIGGRAPH 1985.
    """
    import numpy as np

    weights, cosine = _arc(gram, t)
    return np.array([1 - t, t]) if abs(cosine) > STRAIGHT else weights


def _nuslerp_axis(values: Mapping[str, Any]) -> Axis | None:
    if values["nuslerp_flatten"]:
        return None
    return "columns" if values["nuslerp_row_wise"] else "rows"


@merge_method("nuslerp", kind="combination", models=(2, 2), base="optional", axis=_nuslerp_axis)
def nuslerp(
    gram: Array,
    *,
    weight: Annotated[tuple[float, ...], Param("the model's share: t is the second over the sum")],
    nuslerp_flatten: Annotated[bool, Param("one angle for the whole tensor")] = True,
    nuslerp_row_wise: Annotated[
        bool, Param("without flatten: an angle for each column; false is one for each row (mergekit's meaning)")
    ] = False,
) -> Array:
    """Spherical interpolation by weights, of the models or, with a base model, of their differences to it.

    As `slerp` at `t = weight_1 / (weight_0 + weight_1)`, on the arc however short it is.
    """
    total = sum(weight)
    return _arc(gram, weight[1] / total if total else 0.5)[0]
