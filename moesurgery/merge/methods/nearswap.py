"""A step towards another model where the two are close."""

from __future__ import annotations

from typing import Annotated

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param


@merge_method("nearswap", kind="elementwise", models=(1, 1), base="required")
def nearswap(
    models: list[Array],
    base: Array,
    *,
    t: Annotated[float, Param("how far apart values may be to be replaced", minimum=0)],
) -> Array:
    """`base + s * (w - base)` with `s = min(t / |w - base|, 1)`: a step of at most t towards the other model.

    From the card of alchemonaut/QuartetAnemoi-70B-t0.0001.
    """
    xp = namespace(base)
    difference = models[0] - base
    apart = xp.abs(difference)
    near = apart <= t
    return xp.where(near, models[0], base + difference * (t / xp.where(near, xp.ones_like(apart), apart)))
