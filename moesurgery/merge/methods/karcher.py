"""The Riemannian centre of mass of the models' directions."""

from __future__ import annotations

from typing import Annotated

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param


@merge_method("karcher", kind="combination")
def karcher(
    gram: Array,
    *,
    max_iter: Annotated[int, Param("iterations at most", minimum=0)] = 10,
    tol: Annotated[float, Param("stop when a step is shorter than this", minimum=0)] = 1e-5,
) -> Array:
    """The Karcher mean of the directions on the sphere, at the mean length; all models count the same.

    From the mean direction u, repeat: v is the mean of the logarithms of all directions at u, and u becomes
    `cos|v| * u + sin|v| * v/|v|` (Karcher 1977; Krakowski and others, AFRICRYPT 2007). A tensor of length 0 has no
    direction: it only shortens the mean.
    """
    import numpy as np

    lengths = np.sqrt(np.diag(gram))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosines = gram * np.outer(inverse, inverse)
    there = (lengths > 0).astype(np.float64)
    count = there.sum()
    if count == 0:
        return np.zeros(len(lengths))
    centre = there / count
    size = np.sqrt(max(centre @ cosines @ centre, 0))
    if size < 1e-12:  # they cancel: any direction will do to start from
        centre = np.eye(len(lengths))[int(np.argmax(there))]
    else:
        centre /= size
    for _ in range(max_iter):
        along = (cosines @ centre).clip(-1, 1)
        angle = np.arccos(along)
        stretch = np.where(angle > 1e-8, angle / np.where(angle > 1e-8, np.sin(angle), 1), 1) * there / count
        step = stretch - (stretch @ along) * centre
        size = np.sqrt(max(step @ cosines @ step, 0))
        if size < tol:
            break
        centre = np.cos(size) * centre + np.sin(size) / size * step
        centre /= np.sqrt(centre @ cosines @ centre)
    return np.asarray(centre * inverse * lengths.mean())
