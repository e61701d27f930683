"""What a tensor's name means: the family table applied to names with `#` for numbers, `layers.#.mlp.experts.#.up_proj`.

The numbers of a name then say which layer and which expert it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.dtypes import INTEGERS, PLAIN_FLOATS
from moesurgery.families import components as parts
from moesurgery.families.family import ExpertAxisTensor, ExpertSet, Family, Projection
from moesurgery.families.quantised import PACKED, TensorName, packed_bits, split_name, weights_per_element

# As models number their parts: `00` is no number, and neither is one of more digits than any count has.
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,6})(?![^.])")
_NUMBER_OR_EXPERT = re.compile(r"(?:(?<=\.)|(?<=\bexpert_)|^)(0|[1-9][0-9]{0,6})(?=\.|$)")  # takes three times as long
OWN_MARK = "\0"  # in a template, for a `#` that a name has itself: no header may hold a name with this
LAYER_CONTAINERS = ("layers", "blocks", "h", "block", "blk")  # what models call the list of their layers
_ALWAYS_BUFFERS = ("inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "masked_bias")


def name_template(name: str) -> tuple[str, tuple[int, ...]]:
    """Return `name` with its numbers as `#`, and the numbers. A `#` of its own becomes what no name may hold."""
    if "#" in name:
        name = name.replace("#", OWN_MARK)
    pieces = (_NUMBER_OR_EXPERT if "expert_" in name else _NUMBER).split(name)
    return "#".join(pieces[::2]), tuple(map(int, pieces[1::2]))


@dataclass(slots=True)
class TensorRole:
    """What a name template means; the numbers of a name then say which layer and expert."""

    component: str
    stem: TensorName
    root: str | None  # before `layers.#`; None outside layers
    layer_at: int = 0  # position of the layer number among the numbers
    part: Projection | None = None
    along: ExpertAxisTensor | None = None
    of: ExpertSet | None = None
    container: str = "layers"
    expert_at: int | None = None
    mtp: bool = False  # in a module of its own for multi-token prediction
    buffer: bool = False  # no parameter, though it has values of its own
    weights: int = 0  # how many weights one element stands for

    @property
    def role(self) -> str | None:
        return self.part.role if self.part else self.along.role if self.along else None


def roles_of(family: Family | None, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, TensorRole]:
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


def _is_table(dtype: str, place: TensorRole) -> bool:
    """Integer tensors that hold no packed weights: token-to-expert tables, position ids."""
    packed = (".qweight", ".weight_packed", "_blocks", ".weight")
    return dtype in INTEGERS and place.stem.companion is None and place.stem.suffix not in packed


def _place(family: Family | None, template: str, dtypes: Mapping[str, str]) -> TensorRole:
    """Decide what a name template means."""
    stem = split_name(template, dtypes.__contains__, dtypes.__getitem__)
    in_layer = split_layer(template, "#", containers_of(family))
    root, container, rest = in_layer or (None, "layers", template)
    components = template.split(".")
    place = TensorRole(parts.VISION, stem, root, root.count("#") if root is not None else 0, container=container)
    place.buffer = rest.endswith(_ALWAYS_BUFFERS) or (family is not None and rest.endswith(family.buffers))
    if parts.is_vision(components):
        return place
    if family is not None and root is not None:
        base = stem.base[len(template) - len(rest) :]
        for of in (None, *family.sets):
            if _in_set(place, of or family, base, rest, dtypes[template]):
                place.of = of
                if place.part is not None and "#" in place.part.path:
                    place.expert_at = template[: len(template) - len(rest) + len(place.part.path)].count("#") - 1
                return place
        modules = router_modules(family) + tuple(module for of in family.sets for module in router_modules(of))
        if _begins(rest, base, family.router_parts) or rest.startswith(modules):
            place.component = parts.ROUTER
            return place
        if _begins(rest, base, family.shared):
            place.component = parts.SHARED
            return place
    place.component = parts.component_of(rest.split("."), root is not None)
    return place


def _in_set(place: TensorRole, of: ExpertSet | Family, base: str, rest: str, dtype: str) -> bool:
    """Whether the tensor `rest` of a layer belongs to a set of experts; then enter its part there."""
    layouts = of.read_layouts if isinstance(of, Family) else of.layouts
    for part in (p for layout in layouts for p in layout.parts):
        if part.path == base:
            place.component, place.part = parts.ROUTED, part
            return True
    for along in of.along:
        quantised = place.stem.companion is not None or place.stem.suffix in PACKED or dtype not in PLAIN_FLOATS
        if quantised and along.role == "router" and along.path == base + ".weight":
            place.component, place.along = parts.ROUTER, along
            return True
        if rest == along.path:
            place.component, place.along = parts.ROUTER, along
            place.stem = TensorName(place.stem.base + place.stem.suffix, "")
            place.buffer = place.buffer or not along.parameter
            return True
    return False


def router_modules(of: ExpertSet | Family) -> tuple[str, ...]:
    """Return the modules, relative to a layer and with a dot at the end, that hold the routers of a set of experts."""
    return tuple(a.path.removesuffix("weight") for a in of.along if a.role == "router" and a.path.endswith(".weight"))


def _begins(rest: str, base: str, paths: tuple[str, ...]) -> bool:
    return any(base == path or rest == path or rest.startswith(path + ".") for path in paths)


def containers_of(family: Family | None) -> tuple[str, ...]:
    """Return what a family's models may call the list of their layers."""
    return (family.layers, *family.also_layers) if family else LAYER_CONTAINERS


def split_layer(
    name: str, layer: int | str, containers: tuple[str, ...] = LAYER_CONTAINERS
) -> tuple[str, str, str] | None:
    """Split `model.layers.7.mlp.up_proj.weight` into ("model.", "layers", "mlp.up_proj.weight").

    `layer` is the number, or "#" for templates; of several `containers` the first that fits counts. None outside of
    layers.
    """
    for container in containers:
        start = f"{container}.{layer}."
        at = 0 if name.startswith(start) else name.find("." + start) + 1
        if at or name.startswith(start):
            return name[:at], container, name[at + len(start) :]
    return None


def find_layer(name: str, containers: tuple[str, ...] = LAYER_CONTAINERS) -> tuple[str, int, str] | None:
    """Split `model.layers.7.mlp.up_proj.weight` into ("model.layers.", 7, "mlp.up_proj.weight").

    Of several `containers` the first that fits counts. None outside of layers.
    """
    for container in containers:
        if match := re.search(rf"(?:^|\.){container}\.(?=(\d+)\.)", name):
            return name[: match.end()], int(match[1]), name[match.end() + len(match[1]) + 1 :]
    return None
