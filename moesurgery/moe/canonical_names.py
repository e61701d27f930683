"""The parts of a model under names that do not depend on how it is stored.

`block_sparse_moe.experts.3.w1.weight` of one checkpoint and a slice of `mlp.experts.gate_up_proj` of another are the
same part, (layer, "experts.3.gate.weight"). So models of both layouts merge with each other, and norms and angles are
taken over one projection of one expert in either.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.families import components
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.families.family import Projection
from moesurgery.families.tensor_names import containers_of, split_layer
from moesurgery.plan.plan import Plan

_EXPERT = re.compile(r"([^/]+/)?experts\.\d+\.")


def is_expert(path: str) -> bool:
    """Whether a part belongs to one routed expert, of the main set or of a further one."""
    return _EXPERT.match(path) is not None


class CanonicalName(NamedTuple):
    """A part: its layer (None outside of the language model's layers) and its name in there."""

    layer: int | None
    path: str


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor as one part, or as the equal parts of all experts one after the other in memory.

    `rest` is its name within the layer, the whole name outside of layers. `split` is the shape of each part; None
    where the tensor is one.
    """

    name: str
    layer: int | None
    rest: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    split: tuple[int, ...] | None = None

    def part(self, whole: Expr, index: int) -> Expr:
        """Return one part of the tensor."""
        if self.split is None:
            return whole
        length = self.split[0]
        flat = reshape(whole, (length * len(self.paths), *self.split[1:]))
        return Slice(flat, index * length, (index + 1) * length)

    def assemble(self, parts: list[Expr]) -> Expr:
        """Return the tensor of its parts, in the order of `paths`."""
        return parts[0] if self.split is None else reshape(concat(parts), self.shape)


class CanonicalTensors:
    """A plan taken apart. `prefix` is the part before the layer number in the language model's names.

    `plain_dtype`: what a quantised model, here in float32, is in by its config.
    """

    def __init__(self, plan: Plan, label: str, plain_dtype: str | None = None) -> None:
        self.plan, self.label, self.plain_dtype = plan, label, plain_dtype
        self.anatomy = plan.anatomy
        split = {name: self._split(name, layer) for name, layer in self.anatomy.layer.items()}
        counted = Counter(
            prefix for name, (prefix, _) in split.items() if self.anatomy.component[name] != components.VISION
        )
        self.prefix = counted.most_common(1)[0][0] if counted else ""
        self._rest = {name: rest for name, (prefix, rest) in split.items() if prefix == self.prefix}
        self._by_expert: dict[int, dict[int, list[CanonicalName]]] = {}
        self._members = {m.name: (block, m) for block in self.anatomy.blocks for m in block.members}

    def _split(self, name: str, layer: int) -> tuple[str, str]:
        parts = split_layer(name, layer, containers_of(self.anatomy.family))
        return (f"{parts[0]}{parts[1]}.", parts[2]) if parts is not None else ("", name)

    @cached_property
    def layers(self) -> int:
        """The number of layers of the language model, without those for multi-token prediction."""
        stated = self.anatomy.settings.layers
        held = 1 + max((self.anatomy.layer[name] for name in self._rest), default=-1)
        return held if stated is None else min(stated, held)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors in the plan's order."""
        return {name: self._holder(name) for name in self.plan.tensors}

    @cached_property
    def by_layer(self) -> dict[int | None, list[StoredTensor]]:
        """The tensors of each layer, and those outside of layers under None."""
        grouped: dict[int | None, list[StoredTensor]] = {}
        for holder in self.tensors.values():
            grouped.setdefault(holder.layer, []).append(holder)
        return grouped

    @cached_property
    def paths(self) -> dict[int | None, frozenset[str]]:
        """The parts that each layer has."""
        return {layer: frozenset(p for h in holders for p in h.paths) for layer, holders in self.by_layer.items()}

    @cached_property
    def stored_in(self) -> dict[CanonicalName, tuple[StoredTensor, int]]:
        """The tensor that holds each part, and which of its parts it is."""
        return {CanonicalName(h.layer, path): (h, i) for h in self.tensors.values() for i, path in enumerate(h.paths)}

    def part(self, key: CanonicalName) -> Expr:
        """Return a part's values."""
        holder, index = self.stored_in[key]
        return holder.part(self.plan.tensors[holder.name], index)

    def experts(self, layer: int) -> dict[int, list[CanonicalName]]:
        """Return the parts of each expert of a layer, without identity experts, of which some hold empty tensors."""
        if layer in self._by_expert:
            return self._by_expert[layer]
        count = next((b.experts for b in self.anatomy.blocks if b.layer == layer and self._is_main(b)), 0)
        by_expert: dict[int, list[CanonicalName]] = {number: [] for number in range(count)}
        self._by_expert[layer] = by_expert
        for path in (path for holder in self.by_layer.get(layer, []) for path in holder.paths):
            if path.startswith("experts.") and (number := int(path.split(".")[1])) < count:
                by_expert[number].append(CanonicalName(layer, path))
        return by_expert

    def _is_main(self, block: MoeBlock) -> bool:
        return block.of is None and f"{block.root}{block.container}." == self.prefix

    def kind(self, key: CanonicalName) -> str:
        """Return the kind of a part: "experts", "router" or, with everything else, "rest"."""
        _, member = self._members.get(self.stored_in[key][0].name, (None, None))
        return "rest" if member is None else "router" if member.along is not None else "experts"

    def follows_experts(self, key: CanonicalName) -> bool:
        """Whether a part is one expert's, or has an entry of the router for each, of the main set of experts."""
        block, _ = self._members.get(self.stored_in[key][0].name, (None, None))
        return block is not None and block.of is None and key.layer is not None

    def member(self, key: CanonicalName) -> BlockTensor:
        """Return the tensor of an MoE block that holds a part; of a half of it, as if that were stored alone."""
        holder, _ = self.stored_in[key]
        _, member = self._members[holder.name]
        role = key.path.split(".")[2] if key.path.startswith("experts.") else member.role
        if member.part is not None and role in ("gate", "up") and member.role == "gate_up":
            return member._replace(role=role, part=replace(member.part, role=role))  # type: ignore[arg-type]
        return member

    def name_of(self, layer: int | None, rest: str) -> str:
        return rest if layer is None else f"{self.prefix}{layer}.{rest}"

    def names(self, key: CanonicalName, layer: int | None) -> tuple[str, tuple[str, ...]]:
        """Return the name of the tensor that holds a part, and its names in the family's other layouts.

        `layer` is the number to put into the names.
        """
        holder, _ = self.stored_in[key]
        own = self.name_of(layer, holder.rest)
        if holder.name not in self._members:
            return own, ()
        block, member = self._members[holder.name]
        others: list[str] = []
        family = self.anatomy.family
        assert family is not None
        if member.quantised_router:
            return own, ()
        if member.along is not None:
            around = block.of.along if block.of else family.along
            others = [along.path for along in around if along.role == member.role]
        else:
            _, expert, role, suffix = key.path.split(".", 3)
            layouts = block.of.layouts if block.of else family.layouts
            for part in (part for layout in layouts for part in layout.parts):
                if role.partition("~")[0] in part.role or part.role in role:
                    per_expert = "#" in part.path
                    others.append(part.path.replace("#", expert) + _suffix(suffix, per_expert))
        return own, tuple(name for rest in dict.fromkeys(others) if (name := self.name_of(layer, rest)) != own)

    def _holder(self, name: str) -> StoredTensor:
        rest = self._rest.get(name)
        layer = None if rest is None else self.anatomy.layer[name]
        rest = name if rest is None else rest
        shape = self.plan.tensors[name].shape
        if layer is None or name not in self._members:
            return StoredTensor(name, layer, rest, shape, (rest,))
        block, member = self._members[name]
        of = f"{block.of.name}/" if block.of else ""  # a further set of experts in the same layer
        if member.along is not None:
            alone = len(block.named(member.role)) == 1
            return StoredTensor(name, layer, rest, shape, (f"{of}router.{member.role}" if alone else rest,))
        assert member.part is not None
        paths, split = _experts(shape, block, member, member.part)
        return StoredTensor(name, layer, rest, shape, tuple(of + path for path in paths), split)


def _experts(
    shape: tuple[int, ...], block: MoeBlock, member: BlockTensor, part: Projection
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the parts in a tensor of expert weights, and the shape of each where there are several.

    Gate and up are parts of their own where each is contiguous. Other forms get names of their own.
    """
    stem = member.stem
    suffix = "bias" if stem.bias else stem.suffix.removeprefix(".") if stem.companion else "weight"
    columns = part.order == "io" and not stem.bias
    role = part.role + ("~io" if columns else "") + ("~interleaved" if part.interleaved else "")
    if member.expert is not None:
        return (f"experts.{member.expert}.{role}.{suffix}",), None
    own = (shape[0] // block.experts, *shape[1:]) if part.rows else shape[1:]
    experts = range(block.experts)
    if role == "gate_up" and stem.companion is None and own[0] % 2 == 0:
        halves = tuple(f"experts.{e}.{half}.{suffix}" for e in experts for half in ("gate", "up"))
        return halves, (own[0] // 2, *own[1:])
    return tuple(f"experts.{e}.{role}.{suffix}" for e in experts), own or (1,)


def _suffix(suffix: str, per_expert: bool) -> str:
    """Return what follows the base of a name: hub tensors are `….weight`, fused parameters have no such ending."""
    if per_expert:
        return f".{suffix}"
    return "" if suffix == "weight" else f"_{suffix}"
