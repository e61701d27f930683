"""Collect expert statistics (`stats.statistics_file`) in one pass over the calibration tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RecipeError, RefusedError, SurgeryError
from moesurgery.families.config_keys import Settings
from moesurgery.fitting.imatrix_sums import ImatrixSums
from moesurgery.fitting.keep_search import best_kept
from moesurgery.fitting.neuron_moments import NeuronMoments, neuron_sums
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.device_threads import side_by_side
from moesurgery.forward.engine import Engine
from moesurgery.forward.expert_outputs import (
    ExpertOutputs,
    by_expert,
    expert_outputs,
    gram_by_expert,
    is_grouped,
    one_expert,
    summed_by_expert,
)
from moesurgery.forward.experts_module import ExpertsModule, RoutingTensors
from moesurgery.forward.hooks import BlockCall, ExpertsCall, Hooks
from moesurgery.forward.paired_run import PairedRun
from moesurgery.forward.prediction_blocks import longer_engine, prediction_blocks, prediction_inputs, with_next
from moesurgery.forward.scratch import Scratch
from moesurgery.forward.tokens import Tokens, shared_out
from moesurgery.forward.unit_runner import Resume
from moesurgery.moe.expert_counts import check_remaining
from moesurgery.moe.neuron_axis import neurons_together
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
    neurons: bool = False,
    scratch: Scratch | None = None,
    imatrix: ImatrixSums | None = None,
) -> Stats:
    """Return the statistics of every MoE block, also for routing to other numbers of experts.

    Those of prediction (MTP) layers are run on the trunk's last hidden states (`forward.prediction_blocks`).
    For each number of experts in `keep`, also which of them reproduce a block best, on the first batch of windows.
    With `every_expert`, also each expert's outputs for tokens that are not routed to it. With `neurons`, also which
    neurons of each expert of the trunk matter: the inputs of one layer's experts are held for all tokens, and one
    expert's moments. With `scratch`, resumes from the state saved there by a killed run. What llama-imatrix would see
    is added to `imatrix`. Raises RefusedError for a family whose routing cannot be read, or for `neurons` or `imatrix`
    whose activations cannot.
    """
    stats, hidden, batch = _collect_run(
        engine, tokens, other_top_k, keep, progress, every_expert, neurons=neurons, scratch=scratch, imatrix=imatrix
    )
    for number, block in enumerate(prediction_blocks(engine, hidden), 1):
        try:
            longer = longer_engine(engine, number)
        except SurgeryError:
            break  # its config or code is of another form: no statistics, as for a layer in a module of its own
        begin = Resume(block.layer, prediction_inputs(engine, block, number, tokens, hidden))
        part, hidden, _ = _collect_run(
            longer, with_next(tokens, number), other_top_k, keep, every_expert=every_expert, begin=begin, batch=batch
        )
        stats.prediction |= part.blocks
    stats.about["prediction"] = list(stats.prediction)
    return stats


def _collect_run(
    engine: Engine,
    tokens: Tokens,
    other_top_k: Sequence[int],
    keep: Sequence[int],
    progress: Progress = lambda count: None,
    every_expert: bool = False,
    *,
    neurons: bool = False,
    scratch: Scratch | None = None,
    imatrix: ImatrixSums | None = None,
    begin: Resume | None = None,
    batch: int | None = None,
) -> tuple[Stats, list[Any], int]:
    """Return the statistics of one model's layers, from `begin` on, of `batch` windows at a time where that is given.

    Also what the last layer returned for each batch, and the windows of a batch.
    """
    import torch

    first = begin.layer if begin is not None else 0
    run = [layer.path for layer in engine.layers[first:]]
    blocks = [block for block in check_routing(engine, "collect") if not first or block.unit in run]
    for r in keep:
        check_remaining(engine.plan.anatomy, "collect --recon", r)
    settings = engine.plan.anatomy.settings
    top_k = settings.top_k
    others = [k for k in dict.fromkeys(other_top_k) if k != top_k]
    paired_runs = {k: PairedRun(engine, plan_with_top_k(engine, k)) for k in others}
    sums: dict[str, dict[str, Any]] = {}

    def sums_of(call: ExpertsCall) -> dict[str, Any]:
        where = call.block.where
        if where not in sums:
            sums[where] = empty_sums(call.block.block.experts, call.hidden.shape[-1], others, call.hidden.device)
        return sums[where]

    seen: dict[str, ExpertsCall] = {}
    for block_of_experts in blocks if neurons else ():
        neurons_together(block_of_experts.block, engine.plan.tensors)  # raises before anything is run
    moments = NeuronMoments(engine) if neurons else None
    routings: dict[str, dict[str, RoutingTensors]] = {}

    def experts(call: ExpertsCall) -> torch.Tensor | None:
        where = call.block.where
        seen[where] = call
        if imatrix is not None:
            imatrix.add_experts(call)
        routed = add(sums_of(call), call, {"": (call.index, call.weights), **routings.pop(where, {})}, settings)
        if every_expert:
            add_every_expert(sums_of(call), call, settings)
        if moments is not None:
            moments.see(call)
        return routed

    def block(around: BlockCall) -> Any:
        where = around.block.where
        routings[where] = {f"@{k}": paired.routing(around) for k, paired in paired_runs.items()}
        result = around.run()
        call = seen.pop(where)
        if call.first == 0:
            for r in keep:
                with moments.paused() if moments is not None else nullcontext():
                    kept = torch.tensor(best_kept(engine, around, call, r))
                sums[where][f"recon@{r}"] = torch.zeros(call.block.block.experts, dtype=torch.float64).index_fill_(
                    0, kept, 1
                )
        return result

    batch, resume = batch or engine.windows_per_batch(tokens, False), begin
    if scratch is not None and (state := scratch.load([engine])) is not None:
        resume, batch, sums = state.resume(0), state.batch, state.sums
        progress(state.layer * tokens.count)
    passes: BatchPasses | None = None
    try:
        hooks = Hooks(experts=experts, block=block, router_logits=True)
        passes = engine.start(tokens, hooks, resume=resume, batch=batch)
        with imatrix.watching(engine, tokens) if imatrix is not None else nullcontext():
            if scratch is None and moments is None:
                passes.to_layer(len(engine.layers), progress)
            while passes.unit is not None and passes.passed < len(engine.layers):
                unit = passes.unit
                with engine.weights.loaded(unit, pin=neurons):
                    passes.step(progress)
                    for found in moments.of_layer(unit, passes) if moments is not None else ():
                        for name, values in neuron_sums(engine, found).items():
                            own = sums.setdefault(found.where, {})
                            own[name] = torch.cat([own[name], values[None]]) if name in own else values[None]
                if neurons:
                    engine.weights.unpin()
                if scratch is not None:
                    scratch.keep([passes], batch, sums)
        hidden = passes.outputs
    finally:
        if moments is not None:
            moments.close()
        for paired in paired_runs.values():
            paired.close()
        if passes is not None:
            passes.close()
    ffns = [where for where in sums if all(block.where != where for block in blocks)]
    about = {
        "model": engine.plan.checkpoint.source.identity,
        "model_type": engine.plan.anatomy.model_type,
        "blocks": [block.where for block in blocks],
        "unread": {block.where: block.unread for block in engine.blocks if block.experts is None},
        "top_k": top_k,
        "other_top_k": others,
        "recon": list(keep),
        "every_expert": every_expert,
        "neurons": neurons,
        "ffns": ffns,
        "tokens": tokens.count,
        "windows": len(tokens),
    }
    by_where = {where: BlockStats(where, as_numpy(values)) for where, values in sums.items()}
    stats = Stats({b.where: by_where[b.where] for b in blocks}, about, ffns={w: by_where[w] for w in ffns})
    return stats, hidden, batch


def collect_over(
    engines: Sequence[Engine],
    tokens: Tokens,
    other_top_k: Sequence[int] = (),
    keep: Sequence[int] = (),
    progress: Progress = lambda count: None,
    *,
    every_expert: bool = False,
    neurons: bool = False,
    scratch: Sequence[Scratch | None] = (None,),
    imatrix: ImatrixSums | None = None,
) -> Stats:
    """Return what `collect` returns, with the windows split among engines on several devices.

    The sums equal those of one engine up to rounding: batches hold other windows, and float64 sums are added in another
    order. `keep` is decided by the first engine, on its first batch. Raises RefusedError for `neurons`, which need all
    tokens on one device.
    """
    if len(engines) == 1:
        return collect(
            engines[0],
            tokens,
            other_top_k,
            keep,
            progress,
            every_expert=every_expert,
            neurons=neurons,
            scratch=scratch[0] if imatrix is None else None,  # its sums are not in there
            imatrix=imatrix,
        )
    if neurons:
        raise RefusedError("collect: --neurons needs all tokens of an expert on one device", "name one with --device")
    if imatrix is not None:
        raise RecipeError("--imatrix is collected on one device", "use --device cpu or --device cuda:0")
    parts = shared_out(tokens, len(engines))

    def one(number: int) -> Stats:
        return collect(
            engines[number],
            parts[number],
            other_top_k,
            keep if number == 0 else (),
            progress,
            every_expert=every_expert,
            scratch=scratch[number],
        )

    return added(side_by_side([partial(one, number) for number in range(len(parts))]))


def added(parts: Sequence[Stats]) -> Stats:
    """Return the statistics of all windows from those of parts of them."""
    import numpy as np

    first = parts[0]
    about = first.about | {name: sum(p.about[name] for p in parts) for name in ("tokens", "windows")}

    def summed(by_part: Sequence[Mapping[str, BlockStats]]) -> dict[str, BlockStats]:
        blocks = {}
        for where, block in by_part[0].items():
            sums: dict[str, np.ndarray] = {}
            for name, values in block.sums.items():
                each = [part[where].sums[name] for part in by_part if name in part[where].sums]
                sums[name] = (
                    np.max(each, axis=0) if name == "peak" else np.sum(each, axis=0) if len(each) > 1 else values
                )
            blocks[where] = BlockStats(where, sums)
        return blocks

    return Stats(summed([p.blocks for p in parts]), about, prediction=summed([p.prediction for p in parts]))


def check_routing(engine: Engine, operation: str) -> list[ExpertsModule]:
    """Return the MoE blocks whose routing can be read; raise RefusedError where there are none."""
    engine.plan.anatomy.require_family(operation)
    if not engine.routed:
        unread = engine.blocks[0]
        raise RefusedError(
            f"{operation}: {unread.where}: its routing cannot be read: {unread.unread}", "perplexity and compare work"
        )
    return engine.routed


def plan_with_top_k(engine: Engine, top_k: int) -> Plan:
    return apply(engine.plan, "rescale", top_k=top_k, scale="none")


def add(
    sums: dict[str, Any], call: ExpertsCall, routings: Mapping[str, RoutingTensors], settings: Settings
) -> torch.Tensor | None:
    """Add one call's tokens to the sums of its block. `routings` has the block's own under the name "".

    Returns the routed output [T, H], where it can be computed from the same expert outputs; else None.
    """
    import torch

    experts = call.block.block.experts
    for half, count in enumerate(_tokens_of_halves(call)):
        sums["tokens"][half] += count
    if call.logits is not None:
        _add_logits(sums, call, call.logits[:, :experts], settings.score)
    routed = torch.empty_like(call.hidden) if is_grouped(call.module) else None
    for part in expert_outputs(call, experts, routings):
        half, index, weights, chosen = part.half, part.index, part.weights[""], part.chosen[""]
        if routed is not None:
            # The module's own arithmetic, for experts of its own routing.
            own, mine = (values[part.rows] for values in (call.index, call.weights))
            outputs = part.outputs if len(routings) == 1 else _outputs_of(part, own)
            routed[part.rows] = (outputs * mine[..., None]).sum(dim=1).to(routed.dtype)
        norm = torch.linalg.vector_norm(part.outputs, dim=-1, dtype=torch.float32)
        values = torch.stack([chosen.float(), weights, norm * chosen, weights * norm], dim=-1)
        totals = by_expert(index, values, experts).sum(0, dtype=torch.float64)
        for i, name in enumerate(("count", "gate", "norm", "gate_norm")):
            sums[name][half] += totals[:, i]
        sizes = norm.double()
        sums["norm2"][half] += by_expert(index, sizes**2 * chosen, experts).sum(0)
        contributed = by_expert(index, weights * sizes, experts)
        sums["pair_norms"][half] += contributed.T @ contributed
        peak = torch.linalg.vector_norm(part.outputs, ord=torch.inf, dim=-1, dtype=torch.float32) * chosen
        sums["peak"][half] = torch.maximum(sums["peak"][half], by_expert(index, peak, experts).amax(0).double())
        counted = torch.where(chosen, index, experts)
        sums["output"] += summed_by_expert(counted.reshape(-1), part.outputs.flatten(0, 1), experts).double()
        target = part.routed("") if len(routings) > 1 else None
        for name in routings:
            _add_routing(sums, part, name)
            if target is not None and name:
                along = part.along(target) * part.weights[name]
                sums["cross" + name][half] += by_expert(part.index, along, experts).sum(0, dtype=torch.float64)
    return routed


def _outputs_of(part: ExpertOutputs, index: torch.Tensor) -> torch.Tensor:
    """Return the outputs [t, k, H] of the experts `index` [t, k] among those of a part."""
    slots = (part.index[:, None, :] == index[:, :, None]).float().argmax(dim=-1)
    return part.outputs.gather(1, slots[..., None].expand(-1, -1, part.outputs.shape[-1]))


def _tokens_of_halves(call: ExpertsCall) -> list[float]:
    """Return how many real tokens of even and of odd windows a call has."""
    counts = call.tokens.counts
    each = [call.tokens.length] * len(call.tokens) if counts is None else counts.sum(dim=1).tolist()
    return [float(sum(each[(call.first + half) % 2 :: 2])) for half in (0, 1)]


def _add_routing(sums: dict[str, Any], part: ExpertOutputs, name: str) -> None:
    """Add what depends on a routing alone: second moments of weights and of contributions."""
    import torch

    experts, weights = sums["gram" + name].shape[-1], part.weights[name]
    sums["gate2" + name][part.half] += by_expert(part.index, weights**2, experts).sum(0, dtype=torch.float64)
    sums["mass" + name][part.half] += (weights.double().sum(-1) ** 2).sum()
    sums["gram" + name][part.half] += gram_by_expert(part, name, experts).double()


def add_every_expert(sums: dict[str, Any], call: ExpertsCall, settings: Settings) -> None:
    """Add the outputs of every expert for every token of a call, also where it was not chosen."""
    import torch

    experts, width = call.block.block.experts, call.hidden.shape[-1]
    hidden = call.rows(call.hidden)
    logits = call.rows(call.logits)[:, :experts].float() if call.logits is not None else None
    for name in ("output_all", "gated_all") if logits is not None else ("output_all",):
        sums.setdefault(name, torch.zeros(experts, width, dtype=torch.float64, device=hidden.device))
    for expert in range(experts):
        outputs = one_expert(call, expert, hidden).float()
        sums["output_all"][expert] += outputs.sum(0, dtype=torch.float64)
        if logits is not None:
            share = shares(logits, settings.score)[:, expert]
            sums["gated_all"][expert] += (outputs * share[:, None]).sum(0, dtype=torch.float64)


def _add_logits(sums: dict[str, Any], call: ExpertsCall, logits: torch.Tensor, score: str) -> None:
    import torch

    for half in (0, 1):
        rows = call.half(half)
        z = logits[rows].float()
        scores = shares(z, score)
        if call.real is not None:
            real = call.real[rows][:, None]
            z, scores = z * real, scores * real
        sums["probability"][half] += scores.sum(0, dtype=torch.float64)
        sums["entropy"][half] -= (scores * scores.clamp(min=1e-30).log()).sum(dtype=torch.float64)
        sums["logits"][half] += (z.T @ z).double()


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
