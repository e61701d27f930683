"""What every tensor of a model is: the family table applied to names, shapes and config.

`recognise` reads no weights and imports nothing heavy. It works on the headers of a checkpoint and on the
tensors of a plan alike, so that every operation sees the model as the one before it left it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from moesurgery.checkpoint.dtypes import INTEGERS, element_count
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families import components as parts
from moesurgery.families.family import EXPERTS_KEYS, Along, ExpertSet, Family, Layout, Part
from moesurgery.families.layers import layers_note
from moesurgery.families.quantised import Stem, packed_bits, packed_weights, take_apart, weights_per_element
from moesurgery.families.settings import Settings
from moesurgery.families.table import by_architecture, by_model_type

TIED = "tied_"  # before the model_type of a model with tied blocks (`moesurgery tie-blocks`)
_NUMBER = re.compile(r"(?:(?<=\.)|(?<=\bexpert_)|^)(\d+)(?=\.|$)")


class HasShape(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class Member(NamedTuple):
    """One tensor of an MoE block.

    `role` is a projection ("down") or a router tensor ("correction_bias"). `stem` tells weight from bias and
    companion (of the name's template: use `base` for the name itself). `expert` is the number in the name
    (per-expert layouts); `axis` is the expert axis (all others).
    """

    name: str
    role: str
    stem: Stem
    part: Part | None
    along: Along | None
    expert: int | None
    axis: int | None

    @property
    def base(self) -> str:
        """The name without its suffix: what a weight, its bias and its companions have in common."""
        return self.name[: len(self.name) - len(self.stem.suffix)]

    def renumbered(self, expert: int) -> str:
        """The name that the tensor would have as part of another expert (per-expert layouts)."""
        assert self.part is not None
        after = self.part.path.rsplit("#", 1)[1]  # the expert's number is the last of a path
        head = self.base.removesuffix(f"{self.expert}{after}")
        return f"{head}{expert}{after}{self.stem.suffix}"


@dataclass
class MoeBlock:
    """The routed experts of one layer and everything that follows them.

    `of` is the further set of experts that the block is (image experts, attention experts); None for the main one.
    """

    root: str
    layer: int
    container: str
    members: list[Member] = field(default_factory=list)
    layout: Layout | None = None
    experts: int = 0
    mtp: bool = False
    of: ExpertSet | None = None

    @property
    def layer_path(self) -> str:
        return f"{self.root}{self.container}.{self.layer}"

    @property
    def where(self) -> str:
        return f"{self.layer_path}.{self.of.name}" if self.of else self.layer_path

    def named(self, role: str) -> list[Member]:
        return [m for m in self.members if m.role == role]

    @cached_property
    def router(self) -> Member | None:
        return next((m for m in self.members if m.role == "router" and m.stem.main), None)


@dataclass
class Anatomy:
    """A model taken apart. `component` and `parameters` have an entry for every tensor.

    `parameters[name]` is the number of weights that the tensor stands for: 0 for companions of quantised
    weights, for buffers and for integer tables (those are listed in `buffers` with their elements).
    """

    config: Mapping[str, Any]
    family: Family | None
    is_moe: bool
    blocks: list[MoeBlock]
    component: dict[str, str]
    layer: dict[str, int]
    parameters: dict[str, int]
    buffers: dict[str, int]
    unrecognised: list[str]
    notes: list[str]

    @cached_property
    def settings(self) -> Settings:
        return Settings(self.family or Family("unknown", (), (), ()), self.config)

    @property
    def model_type(self) -> str:
        return model_type_of(self.config)

    @property
    def main_blocks(self) -> list[MoeBlock]:
        """The MoE blocks of the language model, without multi-token-prediction layers."""
        return [block for block in self.blocks if not block.mtp]

    def require_family(self, operation: str) -> Family:
        """Return the family; raise RefusedError where the model is dense, unknown, or refuses `operation`."""
        if self.family is None or not self.blocks:
            if not self.is_moe:
                raise RefusedError(
                    f"{operation}: this is a dense model ({self.model_type}): it has no experts",
                    "`moesurgery upcycle` makes a mixture of experts of it",
                )
            raise RefusedError(
                f"{operation}: the family of model_type {self.model_type!r} is not in the table, so its experts"
                " cannot be told from other tensors",
                "`moesurgery families` lists what is known; docs/families.md shows how to add one",
            )
        reason = self.family.refuses.get(operation)
        if reason:
            raise RefusedError(f"{operation}: {self.family.name}: {reason}")
        return self.family

    @cached_property
    def experts(self) -> int:
        """The number of routed experts per layer. Raises CheckpointError where tensors and config disagree."""
        counts = {block.experts for block in self.main_blocks}
        if len(counts) != 1:
            raise CheckpointError(f"the layers have different numbers of experts: {sorted(counts)}")
        (count,) = counts
        stated = self.settings.experts
        if stated is not None and stated != count:
            raise CheckpointError(f"config.json says {stated} experts, the tensors hold {count}")
        return count


def model_type_of(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", "")) or "?"


def find_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the table entries that `config` may mean, by model_type (nested ones too) and architectures."""
    stated = config.get("architectures")
    architectures = {a for a in stated if isinstance(a, str)} if isinstance(stated, list) else set()
    for place in (config, config.get("text_config"), config.get("llm_config"), config.get("thinker_config")):
        if not isinstance(place, Mapping):
            continue
        found = by_model_type(str(place.get("model_type", "")).removeprefix(TIED))
        exact = tuple(f for f in found if architectures.intersection(f.architectures))
        if found:
            return exact or tuple(f for f in found if not f.architectures) or found
    return by_architecture(architectures)


def template_of(name: str) -> tuple[str, tuple[int, ...]]:
    """Return `name` with its numbers as `#`, and the numbers."""
    pieces = _NUMBER.split(name)
    return "#".join(pieces[::2]), tuple(map(int, pieces[1::2]))


@dataclass(slots=True)
class _Place:
    """What a name template means; the numbers of a name then say which layer and expert."""

    component: str
    stem: Stem
    root: str | None  # before `layers.#`; None outside layers
    layer_at: int = 0  # position of the layer number among the numbers
    part: Part | None = None
    along: Along | None = None
    of: ExpertSet | None = None
    container: str = "layers"
    expert_at: int | None = None
    mtp: bool = False  # in a module of its own for multi-token prediction
    buffer: bool = False  # no parameter, though it has values of its own
    weights: int = 0  # how many weights one element stands for

    @property
    def role(self) -> str | None:
        return self.part.role if self.part else self.along.role if self.along else None


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
        template, numbers = template_of(name)
        names.setdefault(template, []).append((name, numbers))
    places = _places(family, config, {t: tensors[found[0][0]].dtype for t, found in names.items()})
    anatomy = Anatomy(
        config=config,
        family=family,
        is_moe=_looks_moe(config, names),
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
    for template, found in names.items():
        place = places[template]
        _count(anatomy, place, found, tensors, layers)
        if family is not None and place.role is not None:
            _collect(anatomy, place, found, blocks)
    if family is not None:
        _divide(anatomy, family, blocks)
        # A dense layer of a family may have a router-like name (`mlp.gate`): only blocks with experts count.
        with_experts = (block for block in blocks.values() if any(m.part for m in block.members))
        anatomy.blocks = sorted(with_experts, key=lambda b: (b.mtp, b.root, b.layer, b.where))
        for block in anatomy.blocks:
            try:
                _settle(block, family, tensors, anatomy)
            except CheckpointError as error:
                if broken is None:
                    raise
                broken.append((block, error))
        if (note := layers_note(anatomy.settings, {b.layer for b in anatomy.main_blocks})) is not None:
            anatomy.notes.append(note)
    return anatomy


_Found = list[tuple[str, tuple[int, ...]]]
_Blocks = dict[tuple[str, int, str | None], MoeBlock]


def _places(family: Family | None, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, _Place]:
    """Decide what each template means, and how many weights its elements stand for."""
    places = {template: _place(family, template, dtypes) for template in dtypes}
    beside: dict[str, list[str]] = {template: [] for template in dtypes}
    for place in places.values():
        if place.stem.companion is not None:
            beside[place.stem.base + place.stem.companion.of].append(place.stem.suffix)
    bits = packed_bits(config)
    for template, place in places.items():
        place.mtp = parts.is_mtp(template)
        place.buffer = place.buffer or _is_table(dtypes[template], place)
        if place.stem.companion is None and not place.buffer:
            place.weights = weights_per_element(dtypes[template], place.stem.suffix, beside[template], bits)
    return places


def _count(anatomy: Anatomy, place: _Place, found: _Found, tensors: Mapping[str, HasShape], layers: int | None) -> None:
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
        if place.stem.suffix in (".qweight", ".weight_packed") and tensors[name].dtype == "I32":
            exact = packed_weights(name, anatomy.config, lambda n: tensors[n].shape if n in tensors else None)
            anatomy.parameters[name] = anatomy.parameters[name] if exact is None else exact
        if place.buffer:
            anatomy.buffers[name] = elements


def _collect(anatomy: Anatomy, place: _Place, found: _Found, blocks: _Blocks) -> None:
    """Add the tensors of one template to the MoE blocks they belong to."""
    assert place.root is not None
    assert place.role is not None
    for name, numbers in found:
        root = place.root
        for number in numbers[: place.layer_at]:
            root = root.replace("#", str(number), 1)
        layer = numbers[place.layer_at]
        key = (root, layer, place.of.name if place.of else None)
        block = blocks.get(key)
        if block is None:
            block = blocks[key] = MoeBlock(root, layer, place.container, of=place.of)
            block.mtp = anatomy.component[name] == parts.MTP
        expert = numbers[place.expert_at] if place.expert_at is not None else None
        axis = place.along.axis if place.along else (0 if expert is None else None)
        block.members.append(Member(name, place.role, place.stem, place.part, place.along, expert, axis))


def _divide(anatomy: Anatomy, family: Family, blocks: _Blocks) -> None:
    """Hand the experts of a set that continues the numbers of the main one over to the block of that set."""
    following = next((s for s in family.sets if s.follows), None)
    stated = anatomy.settings.experts
    if following is None or not stated:
        return
    for (root, layer, name), block in list(blocks.items()):
        over = [m for m in block.members if m.expert is not None and m.expert >= stated]
        if name is None and over:
            key = (root, layer, following.name)
            other = blocks.setdefault(key, MoeBlock(root, layer, block.container, mtp=block.mtp, of=following))
            other.members.extend(m._replace(expert=m.expert - stated) for m in over if m.expert is not None)
            block.members = [m for m in block.members if m.expert is None or m.expert < stated]


def _looks_moe(config: Mapping[str, Any], templates: Mapping[str, Any]) -> bool:
    """Whether a model has experts at all: by its tensors, or by a config that counts some."""
    if any(re.search(r"\bexperts?\b|\.moe\.|expert_#", t) for t in templates):
        return True
    counts = (Settings(Family("unknown", (), (), ()), config).first((k,)) for k in EXPERTS_KEYS)
    return any(isinstance(c, int) and c > 1 for c in counts)


def _is_table(dtype: str, place: _Place) -> bool:
    """Integer tensors that hold no packed weights: token-to-expert tables, position ids."""
    packed = (".qweight", ".weight_packed", "_blocks", ".weight")
    return dtype in INTEGERS and place.stem.companion is None and place.stem.suffix not in packed


def _place(family: Family | None, template: str, dtypes: Mapping[str, str]) -> _Place:
    """Decide what a name template means."""
    stem = take_apart(template, dtypes.__contains__, dtypes.__getitem__)
    lists = (family.layers, *family.also_layers) if family else ("layers", "blocks", "h", "block")
    for container in lists:
        root, rest = _split_layer(template, container)
        if root is not None:
            break
    components = template.split(".")
    place = _Place(parts.VISION, stem, root, root.count("#") if root is not None else 0, container=container)
    place.buffer = rest.endswith(_ALWAYS_BUFFERS) or (family is not None and rest.endswith(family.buffers))
    if parts.is_vision(components):
        return place
    if family is not None and root is not None:
        base = stem.base[len(template) - len(rest) :]
        for of in (None, *family.sets):
            if _in_set(place, of or family, base, rest):
                place.of = of
                if place.part is not None and "#" in place.part.path:
                    place.expert_at = template[: len(template) - len(rest) + len(place.part.path)].count("#") - 1
                return place
        if _begins(rest, base, family.router_parts):
            place.component = parts.ROUTER
            return place
        if _begins(rest, base, family.shared):
            place.component = parts.SHARED
            return place
    place.component = parts.component_of(rest.split("."), root is not None)
    return place


def _in_set(place: _Place, of: ExpertSet | Family, base: str, rest: str) -> bool:
    """Whether the tensor `rest` of a layer belongs to a set of experts; then enter its part there."""
    for part in (p for layout in of.layouts for p in layout.parts):
        if part.path == base:
            place.component, place.part = parts.ROUTED, part
            return True
    for along in of.along:
        if rest == along.path:
            place.component, place.along = parts.ROUTER, along
            place.stem = Stem(place.stem.base + place.stem.suffix, "")
            place.buffer = place.buffer or not along.parameter
            return True
    return False


def _begins(rest: str, base: str, paths: tuple[str, ...]) -> bool:
    return any(base == path or rest == path or rest.startswith(path + ".") for path in paths)


_ALWAYS_BUFFERS = ("inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "masked_bias")


def _split_layer(template: str, container: str) -> tuple[str | None, str]:
    """Split `model.layers.#.mlp.gate` into ("model.", "mlp.gate"); (None, template) outside layers."""
    mark = f"{container}.#."
    at = 0 if template.startswith(mark) else template.find("." + mark) + 1
    if at == 0 and not template.startswith(mark):
        return None, template
    return template[:at], template[at + len(mark) :]


def _settle(block: MoeBlock, family: Family, tensors: Mapping[str, HasShape], anatomy: Anatomy) -> None:
    """Choose the block's layout, count its experts and check that none is missing."""
    weights = [m for m in block.members if m.part and m.stem.main]
    present = {m.part.path for m in weights if m.part}
    layouts = (block.of or family).layouts
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
    if block.layout.kind == "per-expert":
        numbers = {p.path: {m.expert for m in weights if m.part and m.part.path == p.path} for p in block.layout.parts}
        block.experts = _agreed({len(found) for found in numbers.values()}, anatomy)
        for path, found in numbers.items():
            missing = set(range(block.experts)) - found
            if missing:
                raise CheckpointError(f"{block.where}: {path} of expert {min(missing)} is missing")
    else:
        block.experts = _fused_experts(block, weights, tensors, anatomy)
    for member in block.members:
        if member.along is not None and member.along.role != "expert_table":
            length = tensors[member.name].shape[member.along.axis]
            if length != block.experts and not (member.along.extra and length > block.experts):
                raise CheckpointError(f"{member.name} has {length} entries for {block.experts} experts")


def _fused_experts(block: MoeBlock, weights: list[Member], tensors: Mapping[str, HasShape], anatomy: Anatomy) -> int:
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
    layouts: list[Layout], weights: list[Member], tensors: Mapping[str, HasShape], anatomy: Anatomy
) -> list[Layout]:
    """Tell [E, out, in] from [E, in, out] under the same names, by where the hidden size stands."""
    hidden = anatomy.settings.hidden

    def fits(layout: Layout) -> bool:
        for member in weights:
            part = next(p for p in layout.parts if member.part and p.path == member.part.path)
            shape = tensors[member.name].shape
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
