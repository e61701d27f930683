"""Which experts to keep so that a block's output changes least: a search over sets of experts, not a score of each.

NAEE (arXiv 2402.14800): of all sets C of r experts, the one with the least error between the block's routed output
and its output when the router may choose from C alone; here squared and pooled over tokens. Every set is routed by
the model's own router. All sets are tried while they are at most `EXHAUSTIVE`; above, experts are removed one by one,
each time the one whose removal adds the least error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from moesurgery.forward.engine import Engine
from moesurgery.forward.expert_outputs import one_expert
from moesurgery.forward.experts_module import RoutingTensors
from moesurgery.forward.hooks import BlockCall, ExpertsCall, Hooks

if TYPE_CHECKING:
    import torch

EXHAUSTIVE = 5000  # sets
OUTPUT_BYTES = 512 << 20  # bounds the number of tokens: all experts' outputs are held at once


def best_kept(engine: Engine, around: BlockCall, call: ExpertsCall, keep: int) -> list[int]:
    """Return the `keep` experts, in ascending order, that reproduce the block's output best on one batch.

    `call` is the block's call of its experts. As many are kept in each of the router's groups.
    """
    import torch

    experts = call.block.block.experts
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    rows = torch.arange(len(hidden), device=hidden.device)
    if call.real is not None:
        rows = rows[call.real]
    rows = rows[: max(1, OUTPUT_BYTES // (4 * experts * hidden.shape[1]))]
    outputs = torch.stack([one_expert(call, e, hidden[rows]).float() for e in range(experts)], dim=1)

    def output(routing: RoutingTensors) -> torch.Tensor:
        index, weights = (part.reshape(len(hidden), -1)[rows] for part in routing)
        known = index < experts  # an identity expert is no expert of the block
        at = index.clamp(max=experts - 1)
        chosen = outputs.gather(1, at[..., None].expand(-1, -1, outputs.shape[-1]))
        return (chosen * (weights * known).float()[..., None]).sum(dim=1)

    target = output((call.index, call.weights))

    def error(kept: Iterable[int]) -> float:
        kept = set(kept)
        banned = [e for e in range(experts) if e not in kept]
        return float((output(routing_without(engine, around, banned)) - target).double().pow(2).sum())

    groups = engine.plan.anatomy.settings.groups
    size = experts // (groups[0] if groups else 1)
    if comb(experts, keep) <= EXHAUSTIVE:
        return list(min(_even(combinations(range(experts), keep), size, experts), key=error))
    kept = list(range(experts))
    while len(kept) > keep:
        fullest = max(sum(e // size == g for e in kept) for g in range(experts // size))
        loose = [e for e in kept if sum(o // size == e // size for o in kept) == fullest]
        gone = min(loose, key=lambda e: error([o for o in kept if o != e]))
        kept.remove(gone)
    return kept


def _even(sets: Iterable[tuple[int, ...]], size: int, experts: int) -> Iterable[tuple[int, ...]]:
    """Leave out the sets that do not hold as many experts of each group of `size`."""
    for kept in sets:
        if len({sum(e // size == g for e in kept) for g in range(experts // size)}) == 1:
            yield kept


def routing_without(engine: Engine, around: BlockCall, banned: Sequence[int]) -> RoutingTensors:
    """Return the experts [T, k] and weights [T, k] that a block's router chooses without some experts."""
    import torch

    routings: list[RoutingTensors] = []

    def experts(seen: ExpertsCall) -> torch.Tensor:
        routings.append((seen.index, seen.weights))
        return torch.zeros_like(seen.hidden)

    unit = engine.meta_model.units[around.block.unit]
    module = engine.meta_model.model.get_submodule(around.block.path)
    hooks = Hooks(experts=experts, ban=lambda block: banned if block.where == around.block.where else [])
    with torch.no_grad(), engine.hooked(hooks, around.tokens, around.first, unit):
        module(*around.args, **around.kwargs)
    return routings[0]
