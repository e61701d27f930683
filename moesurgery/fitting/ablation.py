"""Expert ablations: the loss of the model without one expert, for each (layer, expert) and each index.

Two ways to leave one out: `mask` bans it in the router, as dropping it would, and the next best is chosen instead;
`zero` keeps the routing and sets its output to zero. Layers before the one in question are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.fitting.collector import check_routing
from moesurgery.fitting.kept_losses import KeptLosses
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.device_threads import side_by_side
from moesurgery.forward.engine import Engine
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.loss import check_finite, summed_loss
from moesurgery.forward.tokens import Tokens, shared_out
from moesurgery.forward.unit_runner import Resume

if TYPE_CHECKING:
    import torch

AblationMode = Literal["mask", "zero"]
ABREAST_BYTES = 1 << 30  # hidden states of variants that go through a layer together
CHARACTERISTIC = 8


@dataclass
class Ablations:
    """Loss in nats per token: of the model, without one expert of one layer, and without an index in all layers."""

    base: float
    tokens: int
    single: dict[AblationMode, dict[str, dict[int, float]]] = field(default_factory=dict)  # by block, then expert
    index: dict[AblationMode, dict[int, float]] = field(default_factory=dict)


def without(mode: AblationMode, expert: int, where: str | None = None) -> Hooks:
    """Return hooks that leave out an expert of one block, or of all."""
    if mode == "mask":
        return Hooks(ban=lambda block: [expert] if where in (None, block.where) else [])

    def silenced(call: ExpertsCall) -> Any:
        if where not in (None, call.block.where):
            return None
        return call.run(call.hidden, call.index, call.weights * (call.index != expert))

    return Hooks(experts=silenced)


def ablate(
    engine: Engine,
    tokens: Tokens,
    wanted: Mapping[str, Sequence[int]],
    modes: Sequence[AblationMode],
    progress: Progress = lambda count: None,
    kept: KeptLosses | None = None,
) -> Ablations:
    """Measure the model without each wanted expert, by block, and without each index over all layers.

    An index is measured where it is wanted in every block. Where masking would leave a token fewer experts than it
    is routed to, only `zero` is measured. What is in `kept` is not measured again, and it gets the rest. Raises
    RefusedError for a family whose routing cannot be read.
    """
    blocks = check_routing(engine, "probe")
    top_k = engine.plan.anatomy.settings.top_k or 1
    size = engine.windows_per_batch(tokens, True)
    abreast = max(1, ABREAST_BYTES // (4 * tokens.count * engine.width))
    kept = kept or KeptLosses()
    tokens = replace(tokens, ids=tokens.ids.to(engine.device))  # for all runs: each would wait to copy them
    base = engine.start(tokens, batch=size)

    def measured(
        mode: AblationMode, experts: Sequence[int], where: str | None, resume: Resume | None
    ) -> dict[int, float]:
        """Return the loss without each expert of a block, or of all; `abreast` of them at a time."""
        names = {e: f"{mode} {where} {e}" for e in experts}
        left = [e for e in experts if names[e] not in kept.losses]
        progress((len(experts) - len(left)) * tokens.count * (len(engine.layers) - (resume.layer if resume else 0)))
        for part in _parts(left, abreast):
            nats = _losses(engine, tokens, [without(mode, e, where) for e in part], size, resume, progress)
            kept.add(dict(zip((names[e] for e in part), nats, strict=True)))
        return {e: kept.losses[names[e]] for e in experts}

    try:
        ablations = Ablations(0.0, tokens.predicted)
        for mode in modes:
            ablations.single[mode] = {b.where: {} for b in blocks}
            indices = [e for e in range(blocks[0].block.experts) if all(e in wanted[b.where] for b in blocks)]
            indices = [] if mode == "mask" and blocks[0].block.experts <= top_k else indices
            if indices:
                ablations.index[mode] = measured(mode, indices, None, None)
        for layer, unit in enumerate(engine.layers):
            base.to_layer(layer, progress)
            resume = Resume(layer, base.outputs) if layer else None
            for block in (b for b in blocks if b.unit == unit.path):
                for mode in modes:
                    if mode == "mask" and block.block.experts <= top_k:
                        continue
                    losses = measured(mode, wanted[block.where], block.where, resume)
                    ablations.single[mode][block.where] = losses
        base.to_layer(len(engine.layers), progress)
        (ablations.base,) = _means([_summed(base, engine.windows_per_head(tokens))], tokens)
    finally:
        base.close()
    return ablations


def ablate_over(
    engines: Sequence[Engine],
    tokens: Tokens,
    wanted: Mapping[str, Sequence[int]],
    modes: Sequence[AblationMode],
    progress: Progress = lambda count: None,
    kept: Sequence[KeptLosses | None] = (None,),
) -> Ablations:
    """Return what `ablate` returns, with the windows split among engines on several devices.

    The losses are means of those of the parts, weighted by their tokens: equal to those of one engine up to rounding.
    """
    parts = shared_out(tokens, len(engines))
    if len(parts) == 1:
        return ablate(engines[0], tokens, wanted, modes, progress, kept[0])
    jobs = [
        partial(ablate, engine, part, wanted, modes, progress, of_part)
        for engine, part, of_part in zip(engines, parts, kept, strict=False)
    ]
    found = side_by_side(jobs)
    first = found[0]

    def mean(values: Sequence[float]) -> float:
        return sum(nats * each.tokens for nats, each in zip(values, found, strict=True)) / tokens.predicted

    whole = Ablations(mean([each.base for each in found]), tokens.predicted)
    for mode, blocks in first.single.items():
        whole.single[mode] = {
            w: {e: mean([f.single[mode][w][e] for f in found]) for e in experts} for w, experts in blocks.items()
        }
    for mode, experts in first.index.items():
        whole.index[mode] = {e: mean([each.index[mode][e] for each in found]) for e in experts}
    return whole


def work(engine: Engine, tokens: Tokens, wanted: Mapping[str, Sequence[int]], modes: int) -> int:
    """What the progress of `ablate` counts up to, in tokens times layers."""
    depth = {unit.path: len(engine.layers) - i for i, unit in enumerate(engine.layers)}
    single = sum(len(wanted[b.where]) * depth[b.unit] for b in engine.routed)
    indices = set.intersection(*(set(experts) for experts in wanted.values()))
    return tokens.count * (modes * (single + len(indices) * len(engine.layers)) + len(engine.layers))


def _parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _losses(
    engine: Engine, tokens: Tokens, variants: Sequence[Hooks], size: int, resume: Resume | None, progress: Progress
) -> list[float]:
    """Run variants through the rest of the model together, so that each layer is loaded once for all."""
    runs: list[BatchPasses] = []
    try:
        for hooks in variants:
            runs.append(engine.start(tokens, hooks, resume=resume, batch=size))
        while (unit := runs[0].unit) is not None and runs[0].passed < len(engine.layers):
            with engine.weights.loaded(unit, pin=True):
                for run in runs:
                    run.step(progress)
            engine.weights.unpin()
        windows = engine.windows_per_head(tokens)
        return _means([_summed(run, windows) for run in runs], tokens)
    finally:
        for run in runs:
            run.close()


def _summed(run: BatchPasses, windows: int) -> torch.Tensor:
    """Return the summed loss of a run past its layers, of `windows` of logits at a time, without waiting for it."""
    parts = [summed_loss(logits, part) for i in range(len(run)) for _, part, logits in run.logits(i, windows)]
    return sum(parts[1:], parts[0])


def _means(sums: Sequence[torch.Tensor], tokens: Tokens) -> list[float]:
    """Return losses in nats per predicted token. Raises CheckpointError where one is not finite."""
    import torch

    nats: list[float] = torch.stack(list(sums)).tolist()
    check_finite(sum(nats))
    return [each / max(1, tokens.predicted) for each in nats]  # a part of the windows may have no token that counts


def takers(engines: Sequence[Engine], tokens: Tokens) -> dict[str, list[list[tuple[int, int, float]]]]:
    """Return, for each block and expert, the tokens that are characteristic of those routed to it.

    Each as (token id, times routed to the expert, share of the token's occurrences), those first whose count times
    the logarithm of how much more often they come here than elsewhere is largest. The windows are split among engines
    of one model.
    """
    import torch

    engine = engines[0]
    keys: dict[str, list[torch.Tensor]] = {block.where: [] for block in engine.routed}

    def record(call: ExpertsCall) -> None:
        ids = call.tokens.ids.reshape(-1, 1).to(call.index.device)
        index = call.index.reshape(len(ids), -1)
        keys[call.block.where].append((index * engine.vocabulary + ids).flatten().cpu())

    parts = shared_out(tokens, len(engines))
    side_by_side([partial(e.run, part, Hooks(experts=record)) for e, part in zip(engines, parts, strict=False)])
    values, counts = torch.unique(tokens.ids, return_counts=True)
    occurs = dict(zip(values.tolist(), counts.tolist(), strict=True))
    by_block: dict[str, list[list[tuple[int, int, float]]]] = {}
    for block in engine.routed:
        sent, times = torch.unique(torch.cat(keys[block.where]), return_counts=True)
        experts, ids = sent // engine.vocabulary, sent % engine.vocabulary
        by_block[block.where] = []
        for expert in range(block.block.experts):
            mine = experts == expert
            total = int(times[mine].sum())
            scored = []
            for token, count in zip(ids[mine].tolist(), times[mine].tolist(), strict=True):
                lift = (count / max(total, 1)) / (occurs[token] / tokens.ids.numel())
                scored.append((count * max(0.0, float(torch.log(torch.tensor(lift)))), token, count))
            best = sorted(scored, reverse=True)[:CHARACTERISTIC]
            by_block[block.where].append([(token, count, count / occurs[token]) for _, token, count in best])
    return by_block


def screened(block: ExpertsModule, scores: Sequence[float], every: bool, most: int = 8) -> list[int]:
    """Return the experts to probe: all, or in large blocks those of the highest and the lowest scores."""
    count = block.block.experts
    if every or count <= 2 * most:
        return list(range(count))
    order = sorted(range(count), key=lambda e: scores[e])
    return sorted({*order[:most], *order[-most:]})
