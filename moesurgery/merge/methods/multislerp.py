"""Interpolation on the sphere between any number of models, in one step from their mean."""

from __future__ import annotations

from typing import Annotated

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param


@merge_method("multislerp", kind="combination", base="optional")
def multislerp(
    gram: Array,
    *,
    weight: Annotated[tuple[float, ...], Param("the model's share")],
    normalize_weights: Annotated[bool, Param("divide the weights by their sum")] = True,
    eps: Annotated[float, Param("a length below this counts as 0", minimum=0)] = 1e-8,
) -> Array:
    """The weighted mean of directions, corrected once in the tangent plane, at the weighted mean length.

    With unit vectors u_i and m the direction of `sum(weight_i * u_i)`: the tangent is `sum(weight_i * (u_i - (u_i.m)
    m))`, and the result `(cos|v| * m + sin|v| * v/|v|) * sum(weight_i * |w_i|)`. The projections onto the plane stand
    for the logarithms, which is exact to first order, as in mergekit, where the method comes from. With a base model
    all this happens to the differences.
    """
    import numpy as np

    shares = np.array(weight, np.float64)
    if normalize_weights:
        shares = shares / shares.sum()
    lengths = np.sqrt(np.diag(gram))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > eps)
    cosines = gram * np.outer(inverse, inverse)  # inner products of the unit vectors
    mean = shares.copy()  # vectors are coefficients of the unit vectors from here
    length = np.sqrt(max(mean @ cosines @ mean, 0))
    if length <= eps:
        return np.asarray(mean * inverse * (shares @ lengths))
    mean /= length
    tangent = shares - (shares @ (cosines @ mean)) * mean
    size = np.sqrt(max(tangent @ cosines @ tangent, 0))
    turned = np.cos(size) * mean + (np.sin(size) / size * tangent if size > eps else 0)
    return np.asarray(turned * inverse * (shares @ lengths))
