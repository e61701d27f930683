"""Fill the statistics of `stats.py`: one streamed pass over the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.families.config_keys import Settings
from moesurgery.fitting.keep_search import best_kept
from moesurgery.forward.engine import Engine, Progress
from moesurgery.forward.expert_outputs import ExpertOutputs, expert_outputs, one_expert
from moesurgery.forward.experts_module import ExpertsModule, RoutingTensors
from moesurgery.forward.hooks import BlockCall, ExpertsCall, Hooks
from moesurgery.forward.paired_run import PairedRun
from moesurgery.forward.tokens import Tokens
from moesurgery.moe.expert_counts import check_remaining
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import apply
from moesurgery.stats.statistics_file import BlockStats, Stats, as_numpy, empty_sums

if TYPE_CHECKING:
    import torch


def collect(
    engine: Engine,
    tokens: Tokens,
    other_top_k: Sequence[int] = (),
    keep: Sequence[int] = (),
    progress: Progress = lambda count: None,
    *,
    every_expert: bool = False,
) -> Stats:
    """Return the statistics of every MoE block, also for routing to other numbers of experts.

    For each number of experts in `keep`, also which of them reproduce a block best, on the first batch of windows.
    With `every_expert`, also what each expert says to tokens that are not routed to it. Raises RefusedError for a
    family whose code shows no routing.
    """
    import torch

    blocks = check_routing(engine, "collect")
    for r in keep:
        check_remaining(engine.plan.anatomy, "collect --recon", r)
    top_k = engine.plan.anatomy.settings.top_k
    others = [k for k in dict.fromkeys(other_top_k) if k != top_k]
    twins = {k: PairedRun(engine, plan_with_top_k(engine, k)) for k in others}
    sums: dict[str, dict[str, Any]] = {}

    def sums_of(call: ExpertsCall) -> dict[str, Any]:
        where = call.block.where
        if where not in sums:
            sums[where] = empty_sums(call.block.block.experts, call.hidden.shape[-1], others)
        return sums[where]

    calls: dict[str, ExpertsCall] = {}

    def experts(call: ExpertsCall) -> None:
        calls[call.block.where] = call

    def block(around: BlockCall) -> Any:
        result = around.run()
        call = calls.pop(around.block.where)
        routings = {"": (call.index, call.weights)}
        for k, twin in twins.items():
            routings[f"@{k}"] = twin.routing(around)
        sums = sums_of(call)
        add(sums, call, routings, engine.plan.anatomy.settings)
        if every_expert:
            add_every_expert(sums, call, engine.plan.anatomy.settings)
        if call.first == 0:
            for r in keep:
                kept = torch.tensor(best_kept(engine, around, call, r))
                sums[f"recon@{r}"] = torch.zeros(call.block.block.experts, dtype=torch.float64).index_fill_(0, kept, 1)
        return result

    try:
        engine.run(tokens, Hooks(experts=experts, block=block, router_logits=True), progress=progress)
    finally:
        for twin in twins.values():
            twin.close()
    about = {
        "model": engine.plan.checkpoint.source.identity,
        "model_type": engine.plan.anatomy.model_type,
        "blocks": [block.where for block in blocks],
        "unread": {block.where: block.unread for block in engine.blocks if block.experts is None},
        "top_k": top_k,
        "other_top_k": others,
        "recon": list(keep),
        "every_expert": every_expert,
        "tokens": tokens.count,
        "windows": len(tokens),
    }
    return Stats({b.where: BlockStats(b.where, as_numpy(sums[b.where])) for b in blocks}, about)


def check_routing(engine: Engine, operation: str) -> list[ExpertsModule]:
    """Return the MoE blocks whose routing is seen; raise RefusedError where there are none."""
    engine.plan.anatomy.require_family(operation)
    if not engine.routed:
        unread = engine.blocks[0]
        raise RefusedError(
            f"{operation}: {unread.where}: its routing cannot be read: {unread.unread}", "perplexity and compare work"
        )
    return engine.routed


def plan_with_top_k(engine: Engine, top_k: int) -> Plan:
    return apply(engine.plan, "rescale", top_k=top_k, scale="none")


def add(sums: dict[str, Any], call: ExpertsCall, routings: Mapping[str, RoutingTensors], settings: Settings) -> None:
    """Add one call's tokens to the sums of its block. `routings` has the block's own under the name ""."""
    import torch

    experts = call.block.block.experts
    window = call.window % 2
    real = torch.ones_like(window, dtype=torch.bool) if call.real is None else call.real
    sums["tokens"] += torch.bincount(window[real], minlength=2).cpu()
    if call.logits is not None:
        _add_logits(sums, call.logits[:, :experts].float(), window, real, settings.score)
    for part in expert_outputs(call, experts, routings):
        half = window[part.rows]
        chosen = part.chosen[""]
        key = _keys(part, half, chosen, experts)
        outputs, weights = part.outputs[chosen], part.weights[""][chosen]
        norm = outputs.norm(dim=-1)
        sums["count"] += _binned(key, torch.ones_like(weights), experts)
        sums["gate"] += _binned(key, weights, experts)
        sums["norm"] += _binned(key, norm, experts)
        sums["norm2"] += _binned(key, norm.double() ** 2, experts)
        sums["gate_norm"] += _binned(key, weights * norm, experts)
        peak = outputs.abs().amax(dim=-1).double().cpu()
        sums["peak"].view(-1).scatter_reduce_(0, key.cpu(), peak, "amax")
        _add_pair_norms(sums, part, half)
        said = outputs.new_zeros(experts, outputs.shape[-1])
        sums["output"] += said.index_add_(0, part.index[chosen], outputs).double().cpu()
        target = part.routed("")
        for name in routings:
            _add_routing(sums, part, half, name)
            if name:
                key = _keys(part, half, part.chosen[name], experts)
                along = (part.outputs @ target[..., None])[..., 0] * part.weights[name]
                sums["cross" + name] += _binned(key, along[part.chosen[name]], experts)


def _add_routing(sums: dict[str, Any], part: ExpertOutputs, half: torch.Tensor, name: str) -> None:
    """Add what depends on a routing alone: second moments of weights and of contributions."""
    import torch

    experts = sums["gram" + name].shape[-1]
    weights, chosen = part.weights[name], part.chosen[name]
    sums["gate2" + name] += _binned(_keys(part, half, chosen, experts), weights[chosen] ** 2, experts)
    sums["mass" + name] += torch.bincount(half, weights=weights.double().sum(-1) ** 2, minlength=2).cpu()
    both = chosen[:, :, None] & chosen[:, None, :]
    key = (half[:, None, None] * experts + part.index[:, :, None]) * experts + part.index[:, None, :]
    products = (part.products * weights[:, :, None] * weights[:, None, :])[both].double()
    found = torch.bincount(key[both], weights=products, minlength=2 * experts**2)
    sums["gram" + name] += found.view(2, experts, experts).cpu()


def _add_pair_norms(sums: dict[str, Any], part: ExpertOutputs, half: torch.Tensor) -> None:
    """Add the products of what every two chosen experts contribute in size."""
    experts = sums["pair_norms"].shape[-1]
    sizes = (part.outputs.norm(dim=-1) * part.weights[""] * part.chosen[""]).double()
    by_expert = sizes.new_zeros(len(sizes), experts).scatter_add_(1, part.index.clamp(min=0), sizes)
    for h in (0, 1):
        rows = by_expert[half == h]
        sums["pair_norms"][h] += (rows.T @ rows).cpu()


def add_every_expert(sums: dict[str, Any], call: ExpertsCall, settings: Settings) -> None:
    """Add what every expert says to every token of a call, also where it was not chosen."""
    import torch

    experts, width = call.block.block.experts, call.hidden.shape[-1]
    hidden = call.rows(call.hidden)
    logits = call.rows(call.logits)[:, :experts].float() if call.logits is not None else None
    for name in ("output_all", "gated_all") if logits is not None else ("output_all",):
        sums.setdefault(name, torch.zeros(experts, width, dtype=torch.float64))
    for expert in range(experts):
        outputs = one_expert(call, expert, hidden).float()
        sums["output_all"][expert] += outputs.double().sum(0).cpu()
        if logits is not None:
            share = shares(logits, settings.score)[:, expert]
            sums["gated_all"][expert] += (outputs * share[:, None]).double().sum(0).cpu()


def _add_logits(sums: dict[str, Any], logits: torch.Tensor, half: torch.Tensor, real: torch.Tensor, score: str) -> None:
    scores = shares(logits, score)
    entropy = -(scores * scores.clamp(min=1e-30).log()).sum(-1)
    for h in (0, 1):
        rows = real & (half == h)
        sums["probability"][h] += scores[rows].double().sum(0).cpu()
        sums["entropy"][h] += entropy[rows].double().sum().cpu()
        sums["logits"][h] += (logits[rows].T @ logits[rows]).double().cpu()


def shares(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Return each expert's share [T, E] of the scores that a router gives, summing to 1."""
    import torch

    if score == "sigmoid":
        scores = logits.sigmoid()
    elif score == "sqrt-softplus":
        scores = torch.nn.functional.softplus(logits).sqrt()
    else:
        return logits.softmax(dim=-1)
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def _keys(part: ExpertOutputs, half: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Return half * E + expert for every slot that is chosen."""
    return (half[:, None] * experts + part.index)[chosen]


def _binned(key: torch.Tensor, values: torch.Tensor, experts: int) -> torch.Tensor:
    import torch

    return torch.bincount(key, weights=values.double(), minlength=2 * experts).view(2, experts).cpu()
