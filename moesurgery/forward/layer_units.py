"""The units of a model: the modules whose weights are loaded and freed together.

A unit is a decoder layer, or a module outside the layers that owns weights: the embedding, the final norm, the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.plan.plan import Plan


@dataclass
class LayerUnit:
    """A module whose weights are loaded and freed together. `layer` is its index in the list of decoder layers, `stage`
    the number of the device that runs it."""

    path: str
    module: Any
    layer: int | None = None
    stage: int = 0
    groups: list[TensorGroup] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class TensorGroup:
    """The tensors that become one parameter (or, through one converter, several)."""

    target: str
    converter: Any
    names: list[tuple[str, str]] = field(default_factory=list)  # (pattern of the converter, name in the plan)


def find_units(model: Any) -> Iterator[LayerUnit]:
    """Yield the elements of module lists, and the largest modules that hold no such list."""
    import torch

    def walk(path: str, module: Any) -> Iterator[LayerUnit]:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if isinstance(child, torch.nn.ModuleList):
                yield from (LayerUnit(f"{where}.{i}", element) for i, element in enumerate(child))
            elif any(isinstance(m, torch.nn.ModuleList) for m in child.modules()):
                yield from walk(where, child)
            elif next(child.parameters(), None) is not None:
                yield LayerUnit(where, child)

    return walk("", model)


def modules_without_weights(model: Any) -> Iterator[Any]:
    """Yield the largest modules outside of units: those that run between them."""
    import torch

    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            continue
        if any(isinstance(m, torch.nn.ModuleList) for m in child.modules()):
            yield from modules_without_weights(child)
        elif next(child.parameters(), None) is None:
            yield child


def decoder_layers(units: dict[str, LayerUnit], target: dict[str, str], plan: Plan) -> list[LayerUnit]:
    """Return the list of units that holds the MoE blocks, or the largest list of a dense model."""
    weight: dict[str, int] = {}
    lists: dict[str, list[LayerUnit]] = {}
    routers = {m.name for block in plan.anatomy.main_blocks for m in block.members}
    for path, unit in units.items():
        parent, _, number = path.rpartition(".")
        if number.isdigit():
            lists.setdefault(parent, []).append(unit)
    for name, place in target.items():
        for parent in lists:
            if place.startswith(parent + ".") and name in plan.tensors:
                weight[parent] = weight.get(parent, 0) + plan.tensors[name].nbytes * (1000 if name in routers else 1)
    if not weight:
        raise RefusedError("the model has no list of layers, so it cannot be run layer by layer")
    chosen = lists[max(weight, key=lambda parent: weight[parent])]
    for i, unit in enumerate(chosen):
        unit.layer = i
    return chosen


def place_units(units: dict[str, LayerUnit], layers: list[LayerUnit], devices: int) -> None:
    """Spread units over devices: layer i of L on device floor(i G / L) of G, what comes before them on the first, what
    comes after them on the last."""
    after = False
    for unit in units.values():
        if unit.layer is not None and layers[unit.layer] is unit:
            after = True
            unit.stage = unit.layer * devices // len(layers)
        else:
            unit.stage = devices - 1 if after else 0
