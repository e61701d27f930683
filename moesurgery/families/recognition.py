"""A model taken apart: the family table applied to names, shapes and config.

`recognise` reads no weights and imports nothing heavy. It works on the headers of a checkpoint and on the
tensors of a plan alike, so that every operation sees the model as the one before it left it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.errors import CheckpointError
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, BlockTensor, HasShape, MoeBlock, find_families
from moesurgery.families.config_keys import EXPERTS_KEYS, Settings
from moesurgery.families.family import Family, Layout
from moesurgery.families.moe_layers import layers_note
from moesurgery.families.quantised import PACKED, Outputs, count_outputs, outputs_in, packed_weights
from moesurgery.families.tensor_names import TensorRole, name_template, roles_of, router_modules


def recognise(
    config: Mapping[str, Any],
    tensors: Mapping[str, HasShape],
    broken: list[tuple[MoeBlock, CheckpointError]] | None = None,
) -> Anatomy:
    """Take a model apart by its config, tensor names, dtypes and shapes.

    Never refuses: what the table does not know is counted and listed under `unrecognised`.
    Raises CheckpointError where an MoE block is incomplete (an expert or its router is missing), or the config's
    number of layers is none; with a list `broken`, such blocks are added to it instead, and the number is not used.
    """
    families = find_families(config)
    family = families[0] if families else None
    names: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name in tensors:
        template, numbers = name_template(name)
        names.setdefault(template, []).append((name, numbers))
    places = roles_of(family, config, {t: tensors[members[0][0]].dtype for t, members in names.items()})
    anatomy = Anatomy(
        config=config,
        family=family,
        is_moe=_has_experts(config, names),
        blocks=[],
        component=dict.fromkeys(tensors, parts.OTHER),
        layer={},
        parameters=dict.fromkeys(tensors, 0),
        buffers={},
        unrecognised=[],
        notes=[],
    )
    blocks: _Blocks = {}
    try:
        layers = anatomy.settings.layers
    except CheckpointError:
        if broken is None:
            raise
        layers = None
    for template, members in names.items():
        place = places[template]
        _count(anatomy, place, members, tensors, layers)
        if family is not None and place.role is not None:
            _collect(anatomy, place, members, blocks)
    if family is not None:
        _divide(anatomy, family, blocks)
        # A dense layer of a family may have a router-like name (`mlp.gate`): only blocks with experts count.
        with_experts = (block for block in blocks.values() if any(m.part for m in block.members))
        anatomy.blocks = sorted(with_experts, key=lambda b: (b.mtp, b.root, b.layer, b.where))
        for block in anatomy.blocks:
            try:
                _choose_layout(block, family, tensors, anatomy)
            except CheckpointError as error:
                if broken is None:
                    raise
                broken.append((block, error))
        if (note := layers_note(anatomy.settings, {b.layer for b in anatomy.main_blocks})) is not None:
            anatomy.notes.append(note)
    return anatomy


_Found = list[tuple[str, tuple[int, ...]]]
_Blocks = dict[tuple[str, int, str | None], MoeBlock]


def _count(
    anatomy: Anatomy, place: TensorRole, found: _Found, tensors: Mapping[str, HasShape], layers: int | None
) -> None:
    """Enter the component, the layer and the parameters of all tensors of one template."""
    for name, numbers in found:
        component = parts.MTP if place.mtp else place.component
        if place.root is not None:
            layer = anatomy.layer[name] = numbers[place.layer_at]
            if layers is not None and layer >= layers and component != parts.VISION:
                component = parts.MTP
        anatomy.component[name] = component
        if component == parts.OTHER:
            anatomy.unrecognised.append(name)
        elements = element_count(tensors[name].shape)
        anatomy.parameters[name] = elements * place.weights
        words = place.stem.suffix in PACKED and tensors[name].dtype == "I32"
        if words or (place.stem.suffix == ".weight" and tensors[name].dtype == "U32"):
            exact = packed_weights(name, anatomy.config, lambda n: tensors[n].shape if n in tensors else None)
            anatomy.parameters[name] = anatomy.parameters[name] if exact is None else exact
        if place.buffer:
            anatomy.buffers[name] = elements


def _collect(anatomy: Anatomy, place: TensorRole, found: _Found, blocks: _Blocks) -> None:
    """Add the tensors of one template to the MoE blocks they belong to."""
    assert place.root is not None
    assert place.role is not None
    for name, numbers in found:
        root = place.root
        for number in numbers[: place.layer_at]:
            root = root.replace("#", str(number), 1)
        layer = numbers[place.layer_at]
        # Two lists of layers may begin alike: `layers.0` and `mtp.0`.
        key = (f"{root}{place.container}", layer, place.of.name if place.of else None)
        block = blocks.get(key)
        if block is None:
            block = blocks[key] = MoeBlock(root, layer, place.container, of=place.of)
            block.mtp = anatomy.component[name] == parts.MTP
        expert = numbers[place.expert_at] if place.expert_at is not None else None
        axis = place.along.axis if place.along else (0 if expert is None else None)
        block.members.append(BlockTensor(name, place.role, place.stem, place.part, place.along, expert, axis))


def _divide(anatomy: Anatomy, family: Family, blocks: _Blocks) -> None:
    """Hand the experts of a set that continues the numbers of the main one over to the block of that set."""
    following = next((s for s in family.sets if s.follows), None)
    stated = anatomy.settings.experts
    if following is None or not stated:
        return
    for (container, layer, name), block in list(blocks.items()):
        over = [m for m in block.members if m.expert is not None and m.expert >= stated]
        if name is None and over:
            key = (container, layer, following.name)
            other = blocks.setdefault(key, MoeBlock(block.root, layer, block.container, mtp=block.mtp, of=following))
            other.members.extend(m._replace(expert=m.expert - stated) for m in over if m.expert is not None)
            block.members = [m for m in block.members if m.expert is None or m.expert < stated]


def _has_experts(config: Mapping[str, Any], templates: Mapping[str, Any]) -> bool:
    """Whether a model has experts at all: by its tensors, or by a config that counts some."""
    if any(re.search(r"\bexperts?\b|\.moe\.|expert_#|_exps\b", t) for t in templates):
        return True
    counts = (Settings(Family("unknown", (), (), ()), config).first((k,)) for k in EXPERTS_KEYS)
    return any(isinstance(c, int) and c > 1 for c in counts)


def _choose_layout(block: MoeBlock, family: Family, tensors: Mapping[str, HasShape], anatomy: Anatomy) -> None:
    """Choose the block's layout, count its experts and check that none is missing."""
    weights = [m for m in block.members if m.part and m.stem.main]
    present = {m.part.path for m in weights if m.part}
    layouts = block.of.layouts if block.of else family.read_layouts
    fitting = [la for la in layouts if present == {p.path for p in la.parts}]
    if not fitting:
        wanted = " or ".join("+".join(p.path for p in la.parts) for la in layouts)
        raise CheckpointError(
            f"{block.where}: its experts have {', '.join(sorted(present))}; a {family.name} layer has {wanted}",
            "tensors are missing or belong to another model",
        )
    if len(fitting) > 1:
        fitting = _by_orientation(fitting, weights, tensors, anatomy)
        by_path = {p.path: p for p in fitting[0].parts}
        block.members = [m._replace(part=by_path[m.part.path]) if m.part else m for m in block.members]
    block.layout = fitting[0]
    stacked = block.layout.kind == "fused" and (block.of or family).along  # else an expert is one row (product keys)
    for member in weights:
        least = 3 if stacked and member.part and not member.part.rows else 2
        if len(tensors[member.name].shape) < least:
            what = f"has shape {list(tensors[member.name].shape)}"
            raise CheckpointError(f"{member.name} {what}, expected {least} dimensions or more")
    if block.layout.kind == "per-expert":
        numbers = {p.path: {m.expert for m in weights if m.part and m.part.path == p.path} for p in block.layout.parts}
        block.experts = _agreed({len(experts) for experts in numbers.values()}, anatomy)
        for path, experts in numbers.items():
            missing = set(range(block.experts)) - experts
            if missing:
                raise CheckpointError(f"{block.where}: {path} of expert {min(missing)} is missing")
    else:
        block.experts = _fused_experts(block, weights, tensors, anatomy)
    around = router_modules(block.of or family)
    block.router_modules = tuple(f"{block.layer_path}.{module}" for module in around)
    _check_quantised_router(block, tensors, anatomy)
    for member in block.members:
        if member.along is not None and member.along.role != "expert_table" and not member.quantised_router:
            shape = tensors[member.name].shape
            if len(shape) <= member.along.axis:
                raise CheckpointError(f"{member.name} has shape {list(shape)}, expected one entry for each expert")
            length = shape[member.along.axis]
            if length != block.experts and not (member.along.extra and length > block.experts):
                raise CheckpointError(f"{member.name} has {length} entries for {block.experts} experts")


def _check_quantised_router(block: MoeBlock, tensors: Mapping[str, HasShape], anatomy: Anatomy) -> None:
    """Enter where the experts are in the tensors of a quantised router. Raises CheckpointError for another number."""
    routers: dict[str, list[BlockTensor]] = {}
    for member in block.members:
        if member.quantised_router:
            routers.setdefault(member.base, []).append(member)
    places: dict[str, Outputs] = {}
    for base, members in routers.items():
        shapes = {member.stem.suffix: tensors[member.name].shape for member in members}
        outputs = count_outputs(shapes)
        along = members[0].along
        if along is None or along.axis or along.extra:
            stuck = "its router is not stored as one row for each expert"
            places |= {member.name: Outputs(None, stuck=stuck) for member in members}
            continue
        if outputs is not None and outputs != block.experts:
            raise CheckpointError(f"{base} has {outputs} outputs for {block.experts} experts")
        for member in members:
            dtype = tensors[member.name].dtype
            places[member.name] = outputs_in(member.stem.suffix, shapes, dtype, block.experts, anatomy.config)
    block.members = [
        m._replace(axis=p.axis, packed=p.order, stuck=p.stuck) if (p := places.get(m.name)) else m
        for m in block.members
    ]


def _fused_experts(
    block: MoeBlock, weights: list[BlockTensor], tensors: Mapping[str, HasShape], anatomy: Anatomy
) -> int:
    counts = set()
    for member in weights:
        assert member.part is not None
        if member.part.rows:
            stated = anatomy.settings.experts
            if not stated or tensors[member.name].shape[0] % stated:
                raise CheckpointError(f"{member.name}: its rows do not divide into {stated} experts")
            counts.add(stated)
        else:
            counts.add(tensors[member.name].shape[0])
    count = _agreed(counts, anatomy)
    if min(counts) != count:
        raise CheckpointError(
            f"{block.where}: the stacked projections hold different numbers of experts: {sorted(counts)}"
        )
    return count


def _agreed(counts: set[int], anatomy: Anatomy) -> int:
    """Return the number of experts: the largest count, unless it only adds empty tensors for identity experts."""
    key = anatomy.settings.family.zero_experts
    zero = anatomy.settings.integer((key,)) if key else None
    return min(counts) if zero and max(counts) - min(counts) == zero else max(counts)


def _by_orientation(
    layouts: list[Layout], weights: list[BlockTensor], tensors: Mapping[str, HasShape], anatomy: Anatomy
) -> list[Layout]:
    """Tell [E, out, in] from [E, in, out] under the same names, by where the hidden size stands."""
    hidden = anatomy.settings.hidden

    def fits(layout: Layout) -> bool:
        for member in weights:
            part = next(p for p in layout.parts if member.part and p.path == member.part.path)
            shape = tensors[member.name].shape
            if len(shape) < 2:
                return False
            into, out = (shape[-1], shape[-2]) if part.order == "oi" else (shape[-2], shape[-1])
            if hidden not in (out if part.role == "down" else into,):
                return False
        return True

    chosen = [layout for layout in layouts if fits(layout)]
    if len(chosen) > 1:
        anatomy.notes.append(
            "the orientation of the fused experts cannot be told from their shapes; [E, out, in] assumed"
        )
        chosen.sort(key=lambda la: la.parts[0].order != "oi")
    return chosen or layouts
