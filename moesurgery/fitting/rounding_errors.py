"""How far experts' weights move when they are quantised: a sample of every MoE layer, rounded.

Where the errors of weights are independent of what is multiplied, the squared error of a product over its square is
that of the weights over theirs; an expert is two products one after the other, whose errors add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moesurgery.expr.evaluate import finite_values
from moesurgery.expr.nodes import Slice
from moesurgery.expr.tensors import transpose
from moesurgery.families.anatomy import MoeBlock
from moesurgery.moe.neurons import expert_tensors
from moesurgery.plan.plan import Plan
from moesurgery.plan.written_forms import WRITTEN_FORMS

if TYPE_CHECKING:
    import numpy as np

_EXPERTS = 2  # of a layer that are looked at
_ROWS = 128  # of each weight: as many as share a scale at most


def rounding_errors(plan: Plan, forms: Sequence[str]) -> dict[str, np.ndarray]:
    """Return for each quantised form and MoE layer the expected error of the routed output over its square [layers].

    Experts are to be plain. Raises RefusedError for weights that are not finite.
    """
    import numpy as np

    if not forms:
        return {}
    layers = [_of_block(plan, block, forms) for block in plan.anatomy.main_blocks]
    return {form: np.array([errors[form] for errors in layers]) for form in forms}


def _of_block(plan: Plan, block: MoeBlock, forms: Sequence[str]) -> Mapping[str, float]:
    import torch

    from moesurgery.plan.quantised_form import rounding_squares

    moved = {form: [0.0, 0.0] for form in forms}  # of the first and of the second product
    whole = {form: [0.0, 0.0] for form in forms}
    for expert in range(0, block.experts, max(1, block.experts // _EXPERTS))[:_EXPERTS]:
        for member, expr in expert_tensors(block, plan.tensors, expert):
            if not member.stem.main or member.part is None or len(expr.shape) != 2:
                continue
            matrix = expr if member.part.order == "oi" else transpose(expr)
            sample = Slice(matrix, 0, min(_ROWS, matrix.shape[0]))
            values = torch.from_numpy(finite_values(member.name, sample)).float()
            product = int(member.role == "down")
            for form in forms:
                error, size = rounding_squares(values, WRITTEN_FORMS[form].form_of(values.shape[1]))
                moved[form][product] += error
                whole[form][product] += size
    shares = {form: [m / max(w, 1e-30) for m, w in zip(moved[form], whole[form], strict=True)] for form in forms}
    return {form: sum(products) for form, products in shares.items()}
