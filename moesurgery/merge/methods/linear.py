"""Weighted sums of the models themselves: `passthrough` of one, `linear` of any number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param


@merge_method("passthrough", kind="elementwise", models=(1, 1))
def passthrough(
    models: list[Array], *, scale: Annotated[tuple[float, ...], Param("a factor on the tensor")] = (1.0,)
) -> Array:
    """Take tensors from one model: `scale * w`.

    What is not scaled is copied byte for byte. For stacking layers, and for factors on chosen tensors.
    """
    return models[0] * scale[0]


def _no_sum(values: Mapping[str, Any]) -> str | None:
    if values["normalize"] and abs(sum(values["weight"])) < 1e-12:
        return "the weights sum to 0, so they cannot be normalised: give normalize: false, or other weights"
    return None


@merge_method("linear", kind="elementwise", refuse=_no_sum)
def linear(
    models: list[Array],
    *,
    weight: Annotated[tuple[float, ...], Param("the model's share")],
    normalize: Annotated[bool, Param("divide by the sum of the weights")] = True,
) -> Array:
    """The weighted mean: `sum(weight_i * w_i) / sum(weight_i)`.

    Model soups (arXiv 2203.05482).
    """
    divisor = sum(weight) if normalize else 1.0
    total, *others = models  # a chunk of its own, used once: no temporaries
    total *= weight[0] / divisor
    for model, share in zip(others, weight[1:], strict=True):
        model *= share / divisor
        total += model
    return total
