"""Which neuron of one expert is which of another: the permutation that brings their weights closest.

The neurons of an FFN have no order, so two experts are averaged neuron by neuron only after matching them. The
assignment minimises the squared distance between the experts' weights (gate, up, down and biases together), which
is the error of their mean: Hungarian matching as in weight matching of arXiv 2209.04836 and MC-SMoE, arXiv
2310.01334.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import BLOCKS
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr
from moesurgery.expr.shared import SharedComputation, SharedResult
from moesurgery.expr.tensors import concat_last
from moesurgery.families.anatomy import BlockTensor
from moesurgery.moe.neurons import has_neurons, neuron_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

_BLOCK = 1024  # rows of the similarity matrix made at a time: no second float32 copy of an expert


def neuron_order(reference: list[tuple[BlockTensor, Expr]], other: list[tuple[BlockTensor, Expr]]) -> Expr:
    """Return the order [I] in which the neurons of the expert `other` match those of `reference`.

    Nothing is read now. One order serves all tensors of the expert: it is computed once, when one of them is written.
    """
    first, second = (neuron_features(expert) for expert in (reference, other))
    return SharedResult(SharedComputation(matched_rows, (first, second)), 0, "I64", (first.shape[0],))


def neuron_features(expert: list[tuple[BlockTensor, Expr]]) -> Expr:
    """Return all weights of each neuron [I, F]: its rows of gate and up, its column of down, its biases."""
    plain = [(member, cast(expr, "F32") if expr.dtype in BLOCKS else expr) for member, expr in expert]
    features = [neuron_rows(member, expr) for member, expr in plain if has_neurons(member)]
    same = len({expr.dtype for expr in features}) == 1
    return concat_last(features if same else [cast(expr, "F32") for expr in features])


def matched_rows(reference: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the order of the rows of `other` [I, F] that minimises its squared distance to `reference` [I, F].

    O(I^3) in the worst case, and 8 I^2 bytes: 2 s and 0.1 GB for I = 4096. Raises RefusedError for NaN or infinity.
    """
    import torch

    # The norms of the rows are the same in every order, so the inner products decide.
    return (torch.from_numpy(optimal_assignment(products(reference, other))),)


def products(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Return the inner products [I, J] of the rows of two matrices, in float64 from float32."""
    import numpy as np

    inner_products = np.empty((len(first), len(second)))
    turned = second.float().t()
    for start in range(0, len(first), _BLOCK):
        inner_products[start : start + _BLOCK] = (first[start : start + _BLOCK].float() @ turned).numpy()
    return inner_products


def optimal_assignment(similarity: np.ndarray) -> np.ndarray:
    """Return for each row of `similarity` [I, I] a column of its own, so that the sum is the greatest.

    Raises RefusedError for NaN or infinity.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    if not np.isfinite(similarity).all():
        raise RefusedError(
            "the neurons of two experts cannot be matched: their weights hold NaN, infinity or huge numbers",
            "`moesurgery validate` finds them; --align none does not look at them",
        )
    columns: np.ndarray = linear_sum_assignment(similarity, maximize=True)[1]
    return columns
