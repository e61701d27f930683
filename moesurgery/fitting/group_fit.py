"""Data for merging groups of experts, from tokens: neuron orders for each member, and one router row per group.

The original model runs once. In every MoE block, for each group of experts that are to become one:

    order        the neurons of each member that match those of the dominant one. Two neurons are alike by the cosine of
                 their activations over the tokens that are routed to either expert, and by the cosine of their weights
                 (gate, up, down and biases); the assignment with the greatest sum of both is taken. REAM (arXiv
                 2604.04356) adds the distances that belong to these cosines
    router       the row w, with a bias b where the router has one, that minimises the sum over all tokens of
                 (log sum over members of exp z_e - w x - b)^2 + lambda |w - w_d|^2, z being the router's logits and w_d
                 the dominant member's row: the logit that gives the group the probability of all its members

With few tokens the result stays close to the original: an expert without tokens is matched by its weights, and lambda,
`RIDGE` times the mean diagonal of sum x x^T, regularises towards the dominant member's row.

Memory beside the forward pass: the inputs of one block for all tokens, two experts, two square matrices of their width,
one of the hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.errors import RefusedError
from moesurgery.expr.evaluate import finite_values
from moesurgery.families.anatomy import MoeBlock
from moesurgery.fitting.collector import check_routing
from moesurgery.forward.activations import activations, check_form
from moesurgery.forward.batch_passes import Progress
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.tokens import Tokens
from moesurgery.moe.neuron_matching import neuron_features, optimal_assignment, products
from moesurgery.moe.neurons import expert_tensors
from moesurgery.plan.plan import Plan
from moesurgery.plan.requantise import opened, quantised_experts
from moesurgery.stats.group_fit_file import GroupFit
from moesurgery.surgery.choose_experts import router_rows
from moesurgery.surgery.group_experts import NAME, Merger

if TYPE_CHECKING:
    import numpy as np
    import torch

RIDGE = 1e-3
LOGITS_CLOSE = 0.02  # of the largest logit: rounding error of bfloat16


def fit_groups(
    engine: Engine, tokens: Tokens, merger: Merger, progress: Progress = lambda count: None
) -> list[GroupFit]:
    """Return the fit of every block that is run, for the groups of `merger`.

    Raises RefusedError where experts' activations cannot be read, or a router's logits are no linear map of its
    experts' inputs.
    """
    import torch

    check_routing(engine, NAME)
    plan = opened(engine.plan, quantised_experts(engine.plan))
    seen: dict[str, list[ExpertsCall]] = {}
    hooks = Hooks(experts=lambda call: seen.setdefault(call.block.where, []).append(call), router_logits=True)
    passes = engine.start(tokens, hooks, batch=engine.windows_per_batch(tokens, False))
    fits = []
    try:
        for layer, unit in enumerate(engine.layers):
            passes.to_layer(layer)
            with engine.weights.loaded(unit, pin=True), torch.no_grad():
                passes.step(progress)
                fits += [_fit(plan, seen.pop(b.where), merger) for b in engine.blocks if b.unit == unit.path]
            engine.weights.unpin()
    finally:
        passes.close()
    return fits


def _fit(plan: Plan, calls: Sequence[ExpertsCall], merger: Merger) -> GroupFit:
    block = calls[0].block.block
    groups = [
        (group, dominant)
        for group, dominant in zip(merger.groups[block.where], merger.dominant[block.where], strict=True)
        if len(group) > 1
    ]
    fit = GroupFit(block.where)
    if merger.align == "activations":
        check_form(calls[0], "use --align weights, which needs none")
        for group, dominant in groups:
            for expert in group:
                if expert != dominant:
                    fit.orders[expert] = _order(plan, calls, dominant, expert)
    if merger.router == "lse" and groups:
        fit.router = _router(plan, calls, groups)
    return fit


def _order(plan: Plan, calls: Sequence[ExpertsCall], reference: int, other: int) -> np.ndarray:
    """Return the neurons [I] of expert `other` that match those of `reference`."""
    import torch

    block = plan.anatomy.block(calls[0].block.where)
    features = (_features(plan, block, expert) for expert in (reference, other))
    first, second = (torch.nn.functional.normalize(rows, dim=-1, eps=1e-30) for rows in features)
    similarity = products(first, second)
    cross: Any = 0
    energy: list[Any] = [0, 0]
    for call in calls:
        hidden, index = call.rows(call.hidden), call.rows(call.index)
        rows = ((index == reference) | (index == other)).any(dim=-1)
        pair = [activations(call.module, e, hidden[rows]).float() for e in (reference, other)]
        cross = cross + pair[0].T @ pair[1]
        energy = [e + h.square().sum(dim=0) for e, h in zip(energy, pair, strict=True)]
    lengths = [e.clamp(min=torch.finfo(torch.float32).tiny).sqrt() for e in energy]
    similarity += (cross / lengths[0][:, None] / lengths[1]).cpu().numpy()
    return optimal_assignment(similarity)


def _features(plan: Plan, block: MoeBlock, expert: int) -> torch.Tensor:
    """Return the weights [I, F] of an expert, in float32."""
    expr = neuron_features(expert_tensors(block, plan.tensors, expert))
    reader = FileReader()
    try:
        values = expr.evaluate(0, expr.numel, reader).view(expr.shape).float()
        reader.check()
        return values
    finally:
        reader.close()


def _router(plan: Plan, calls: Sequence[ExpertsCall], groups: Sequence[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """Return the router's entries for `groups`, each given with its dominant member."""
    import torch

    block = calls[0].block.block
    device = calls[0].hidden.device
    rows = torch.from_numpy(router_rows(plan, block).copy()).to(device).double()
    bias = next(
        (finite_values(m.name, plan.tensors[m.name])[: block.experts] for m in block.named("router_bias")), None
    )
    shift = torch.zeros(len(rows), dtype=torch.float64, device=device)
    if bias is not None:
        shift += torch.from_numpy(bias).to(device)
    width = rows.shape[1] + (bias is not None)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, len(groups), dtype=torch.float64, device=device)
    for call in calls:
        x = call.rows(call.hidden).double()
        linear = x @ rows.T
        _check_logits(call, linear, shift)
        logits = linear + shift
        missing = torch.stack([logits[:, g].logsumexp(dim=1) - logits[:, dominant] for g, dominant in groups], dim=1)
        if bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        gram += x.T @ x
        cross += x.T @ missing
    diagonal = gram.diagonal()[: rows.shape[1]]
    diagonal.add_(max(RIDGE * float(diagonal.mean()), 1e-30))
    change = torch.linalg.solve(gram, cross).T
    dominants = [dominant for _, dominant in groups]
    entries = {"router": (rows[dominants] + change[:, : rows.shape[1]]).cpu().numpy()}
    if bias is not None:
        entries["router_bias"] = (shift[dominants] + change[:, -1]).cpu().numpy()
    return entries


def _check_logits(call: ExpertsCall, linear: torch.Tensor, shift: torch.Tensor) -> None:
    """Raise RefusedError unless the router's logits are its rows times the experts' inputs, with or without bias."""
    if call.logits is not None:
        logits = call.rows(call.logits)[:, : linear.shape[1]].double()
        limit = LOGITS_CLOSE * float(logits.abs().max())
        if min(float((logits - linear).abs().max()), float((logits - linear - shift).abs().max())) <= limit:
            return
    raise RefusedError(
        f"{NAME}: {call.block.where}: its router reads something else than its experts do, so no row can be fitted",
        "use --router dominant",
    )
