"""Several models over the same windows in lockstep: a layer of all of them before the next layer of any.

What edits of one checkpoint have in common is read from storage once: of each layer the first model reads it, and the
others right after that, from the page cache, or they use what the first has loaded (`Engine.sharing`). And as long as
two models compute the same, one computes it for both: from the embedding to the first unit that differs, in its
weights, its code, its config, or in what the model's own code passes to it. From there on each has hidden states of its
own.

Memory: one layer, or one and what others have in its place where the first keeps it; hidden states of each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesurgery.families.config_keys import LAYERS_KEYS
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.forward.meta_model import MetaModel
from moesurgery.forward.unit_runner import UnitRunner

# What config.json says of the stack, and of no single layer.
_OF_STACK = {*LAYERS_KEYS, "architectures", "auto_map", "model_type", "layer_tie_map", "layer_tie_exclude"}


def run_layers(runs: Sequence[BatchPasses], progress: Progress = lambda count: None) -> None:
    """Run passes without hooks, each of another model over the same windows, until the decoder layers of all are done.

    Each gets what it would compute alone, to the bit. `progress` counts tokens times layers of each model.
    """
    if len(runs) == 1:
        return runs[0].to_layer(len(runs[0].runner.layers), progress)
    same = [0] * len(runs)  # for each run the first that has computed the same so far
    while going := [i for i, run in enumerate(runs) if run.unit is not None and run.passed < len(run.runner.layers)]:
        before = list(same)
        for i in going:
            known = (j for j in going if j < i and same[j] == j and before[j] == before[i])
            same[i] = next((j for j in known if _computes_the_same(runs[j], runs[i])), i)
        for i in going:
            if same[i] == i:
                runs[i].step(progress)
            else:
                runs[i].take(runs[same[i]].outputs, progress)


def _computes_the_same(first: BatchPasses, second: BatchPasses) -> bool:
    """Whether the next units of two runs, which have computed the same so far, return the same for every batch."""
    one, other = first.unit, second.unit
    assert one is not None
    assert other is not None
    a, b = first.runner, second.runner
    if (one.path, one.layer, one.stage) != (other.path, other.layer, other.stage):
        return False
    if (a.meta_model.devices, a.meta_model.dtype) != (b.meta_model.devices, b.meta_model.dtype):
        return False
    return (
        _weights(a.meta_model, one) == _weights(b.meta_model, other)
        and _code(one) == _code(other)
        and _same(_computed(one), _computed(other))
        and (not _has_experts(a, one) or _same_settings(a.plan.config, b.plan.config, one.layer or 0))
        and len(first) == len(second)
        and all(_same(p.arguments, q.arguments) for p, q in zip(first.passes, second.passes, strict=True))
    )


def _weights(model: MetaModel, unit: LayerUnit) -> dict[str, Any]:
    """Return what a unit's parameters are made of, and their shapes."""
    return {g.target: (tuple(model.tensor(g.target).shape), model.made_of(g)) for g in unit.groups}


def _code(unit: LayerUnit) -> list[Any]:
    """Return the classes of a unit's modules and the plain values that they hold."""
    return [
        (name, type(part), {key: v for key, v in vars(part).items() if key[0] != "_" and _is_plain(v)})
        for name, part in unit.module.named_modules()
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _computed(unit: LayerUnit) -> tuple[Any, ...]:
    """Return the buffers that a unit's code has computed, which are in no checkpoint, with their names."""
    stored = {group.target for group in unit.groups}
    return tuple((n, b) for n, b in unit.module.named_buffers() if f"{unit.path}.{n}" not in stored)


def _has_experts(runner: UnitRunner, unit: LayerUnit) -> bool:
    return any(block.unit == unit.path for block in runner.blocks)


def _same_settings(first: Mapping[str, Any], second: Mapping[str, Any], layer: int) -> bool:
    """Whether two configs say the same of a layer. Code of experts reads the config when it runs, so all of it counts
    but what is of the stack; of lists with an entry for each layer the entries up to this one."""
    for key in (first.keys() | second.keys()) - _OF_STACK:
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if not _same_settings(a, b, layer):
                return False
        elif isinstance(a, list) and isinstance(b, list) and min(len(a), len(b)) > layer:
            if a[: layer + 1] != b[: layer + 1]:
                return False
        elif a != b:
            return False
    return True


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments of units are equal. What a layer may write to, and what is not known, never is."""
    import torch

    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        known = first.dtype == second.dtype and not (first.is_meta or second.is_meta)
        return first is second or (known and torch.equal(first, second))
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return _is_plain(first) and not isinstance(first, list) and bool(first == second)
