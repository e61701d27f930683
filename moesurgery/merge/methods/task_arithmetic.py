"""Differences to the base, added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from moesurgery.merge.compute.backend import Array
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.merge.methods.task_vectors import Lambda, Mask, Normalize, Weights, everything, summed
from moesurgery.recipe.parameters import Param

Idle = Annotated[float | bool, Param("accepted for mergekit's recipes, where it has no effect on this method either")]


@merge_method("task_arithmetic", kind="streamed", models=(0, None), base="required")
def task_arithmetic(
    unit: MergeInputs,
    *,
    weight: Weights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Idle = 1.0,
    rescale: Idle = False,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """`base + lambda * sum(weight_i * (w_i - base))`.

    Task arithmetic (arXiv 2212.04089).
    """
    return summed(unit, everything, weight, normalize=normalize, lambda_=lambda_)
