"""Shared experts and dense FFNs as MoE blocks of one expert: what is done with neurons is done with all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moesurgery.expr.nodes import Expr
from moesurgery.families import components
from moesurgery.families.anatomy import Anatomy, BlockTensor, MoeBlock
from moesurgery.families.family import ExpertRole, Layout, Projection
from moesurgery.families.quantised import split_name
from moesurgery.families.tensor_names import containers_of, find_layer

# What the projections of an FFN are called, by the last part of their modules' names.
_ROLES: Mapping[str, ExpertRole] = {
    **dict.fromkeys(("gate_proj", "w1", "gate"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "up", "fc1", "wi"), "up"),
    **dict.fromkeys(("down_proj", "w2", "down", "fc2", "wo", "output_linear", "shared_w2_weight"), "down"),
    **dict.fromkeys(("gate_up_proj", "input_linear", "shared_w13_weight"), "gate_up"),
}


def shared_experts(anatomy: Anatomy, tensors: Mapping[str, Expr]) -> dict[str, MoeBlock]:
    """Return the shared experts beside the main set of experts by module, those of prediction layers too."""
    beside = tuple(
        f"{block.where}.{path}."
        for block in anatomy.blocks
        if block.of is None
        for path in anatomy.settings.family.shared
    )
    return _ffns(anatomy, tensors, (name for name in tensors if name.startswith(beside)) if beside else ())


def dense_ffns(anatomy: Anatomy, tensors: Mapping[str, Expr]) -> dict[str, MoeBlock]:
    """Return the FFNs of the layers without experts by module."""
    return _ffns(anatomy, tensors, (n for n, part in anatomy.component.items() if part == components.DENSE_FFN))


def _ffns(anatomy: Anatomy, tensors: Mapping[str, Expr], names: Iterable[str]) -> dict[str, MoeBlock]:
    """Return the modules among `names` that have an up- and a down-projection."""
    blocks: dict[str, MoeBlock] = {}
    for name in names:
        stem = split_name(name, tensors.__contains__, lambda n: tensors[n].dtype)
        module, _, leaf = stem.base.rpartition(".")
        at = find_layer(name, containers_of(anatomy.family))
        if at is None or leaf not in _ROLES:
            continue
        prefix, layer, _ = at
        root, _, container = prefix.removesuffix(".").rpartition(".")
        # Inkling has several side by side, stacked and with gate and up alternating as its experts' are.
        shape = tensors[name].shape
        stacked = stem.suffix == "" and len(shape) == 3
        experts = shape[0] if stacked else 1
        block = blocks.setdefault(module, MoeBlock(f"{root}." if root else "", layer, container, experts=experts))
        path = f"{module.removeprefix(f'{block.layer_path}.')}.{leaf}"
        part = Projection(path, _ROLES[leaf], interleaved=leaf == "shared_w13_weight")
        member = (None, 0) if stacked else (0, None)
        block.members.append(BlockTensor(name, part.role, stem, part, None, *member))
    whole = {module: block for module, block in blocks.items() if {"down"} < {m.role for m in block.members}}
    for block in whole.values():
        block.layout = Layout("per-expert", tuple({m.part.path: m.part for m in block.members if m.part}.values()))
    return whole
