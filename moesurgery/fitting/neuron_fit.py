"""Which neurons of each expert matter, and the down-projections without the others, from the moments of one expert.

The original model runs once. When the inputs of a block's experts are there for all tokens, each expert in turn has its
moments summed, sum g^2 h h^T in float64, h being the input of its down-projection and g its weight; they are freed
before the next. `--refit down` solves with the same moments, on the edited model's inputs and towards its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesurgery.fitting.expert_fit import RoutedTokens, moments, weighted_activations
from moesurgery.fitting.neuron_order import removal_order
from moesurgery.forward.activations import check_form, down
from moesurgery.forward.hooks import ExpertsCall
from moesurgery.moe.neuron_axis import neurons_together
from moesurgery.plan.plan import Plan

_HINT = "leave --neurons out; `slim-experts --by weights` needs none"


def neuron_sums(plan: Plan, calls: Sequence[ExpertsCall]) -> dict[str, Any]:
    """Return the sums of neurons (`stats.statistics_file`) of a block that is loaded, as torch tensors [E, I].

    Raises RefusedError where its activations cannot be read, or its stored form does not tell neurons apart.
    """
    import torch

    block, module = calls[0].block.block, calls[0].module
    check_form(calls[0], _HINT)
    size, routed = neurons_together(block, plan.tensors), RoutedTokens(calls, block.experts)
    rows = []
    for expert in range(block.experts):
        weight, mine = down(module, expert), routed.of(expert)
        gram = moments(weighted_activations(module, expert, mine), mine, weight).sum(0)
        outputs = weight.double().T @ weight.double()
        order, errors = removal_order(gram, outputs, 0, size)
        if size > 1:
            order = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
            before = torch.cat([errors.new_zeros(1), errors[:-1]])
            parts = torch.arange(1, size + 1, device=order.device) / size
            errors = (before[:, None] + (errors - before)[:, None] * parts).flatten()
        rows.append((gram.diagonal() * outputs.diagonal(), order, errors))
    saliency, order, errors = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"neuron_saliency": saliency, "neuron_order": order.double(), "neuron_error": errors}
