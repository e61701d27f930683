"""The stack of blocks of a language model: which tensors make up each block, and their names at another position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.components import MTP, VISION
from moesurgery.families.layer_config import layer_settings
from moesurgery.families.tensor_names import split_layer


@dataclass(frozen=True)
class Stack:
    """`blocks[i]` maps the name of a tensor inside block i (`self_attn.q_proj.weight`) to its full name.

    Blocks beyond `depth` are prediction (MTP) layers. Of a tied model only stored tensors are there.
    """

    root: str
    container: str
    depth: int
    blocks: Mapping[int, Mapping[str, str]]

    def name(self, position: int, inside: str) -> str:
        """Return the full name of a tensor of the block at `position`."""
        return f"{self.root}{self.container}.{position}.{inside}"

    @cached_property
    def behind(self) -> list[int]:
        """The numbers of the prediction layers behind the stack."""
        return sorted(layer for layer in self.blocks if layer >= self.depth)


def stack_of(anatomy: Anatomy, names: Iterable[str], operation: str) -> Stack:
    """Return the stack of the language model. Raises RefusedError where there is none, or more than one."""
    roots: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    depth = anatomy.settings.layers
    for name in names:
        layer = anatomy.layer.get(name)
        component = anatomy.component[name]
        if layer is None or component == VISION or (component == MTP and (depth is None or layer < depth)):
            continue
        root, container, inside = _split(name, layer)
        roots.setdefault((root, container), {}).setdefault(layer, {})[inside] = name
    if len(roots) != 1:
        stacks = ", ".join(f"{root}{container}" for root, container in roots) or "none"
        raise RefusedError(f"{operation}: it needs one stack of blocks, and this model has {stacks}")
    ((root, container), blocks) = next(iter(roots.items()))
    tie_map = anatomy.settings.tie_map
    depth = max(blocks) + 1 if depth is None else depth
    for layer in range(depth):
        if layer not in blocks and not (tie_map is not None and tie_map[layer] != layer):
            raise CheckpointError(f"config.json says {depth} layers, and {root}{container}.{layer} has no tensors")
    return Stack(root, container, depth, blocks)


_TABLE = re.compile(r"(.+)\.(\d+)((?:\.[^.\d][^.]*)*)")
_FORM = re.compile(r"\.(weight_packed|qweight|weight)$|_blocks$")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def check_movable(anatomy: Anatomy, names: Iterable[str], operation: str) -> None:
    """Refuse to repeat, leave out or move layers where a layer's place decides what it holds.

    That is so where tensors outside of the layers are numbered as they are, and where layers that config.json does
    not tell apart hold different tensors (as where the first lacks one): at another place a loader would look for
    tensors that no layer ever had, and make them up. Raises RefusedError.
    """
    depth = anatomy.settings.layers
    if depth is None or depth < 2:
        return
    tables: dict[str, set[int]] = {}
    inside: dict[int, set[str]] = {layer: set() for layer in range(depth)}
    for name in names:
        component, layer = anatomy.component[name], anatomy.layer.get(name)
        if component in (VISION, MTP) or not anatomy.parameters[name]:
            continue
        if layer is None and (match := _TABLE.fullmatch(name)):
            tables.setdefault(f"{match[1]}.#{match[3]}", set()).add(int(match[2]))
        elif layer in inside:
            inside[layer].add(_NUMBER.sub(".#", _FORM.sub("", _split(name, layer)[2])))
    for table, numbers in tables.items():
        if len(numbers) in (depth, depth - 1):
            raise RefusedError(
                f"{operation}: {table} has {len(numbers)} entries for {depth} layers, which do not follow when layers"
                " are repeated, left out or moved",
                "keep the layers as they are: the model's code would find no entry for some, and make them up",
            )
    first: dict[str, int] = {}
    for layer, held in inside.items():
        kind = repr(sorted(layer_settings(anatomy.settings, layer).items()))
        other = first.setdefault(kind, layer)
        if held and inside[other] and (odd := sorted(held ^ inside[other])):
            with_it, without = (layer, other) if odd[0] in held else (other, layer)
            raise RefusedError(
                f"{operation}: layer {with_it} has {odd[0]}, layer {without} has not, and config.json does not say why:"
                " where a layer stands decides what it holds",
                "keep the layers as they are: at another place the model's code would make up what is missing",
            )


def _split(name: str, layer: int) -> tuple[str, str, str]:
    parts = split_layer(name, layer)
    assert parts is not None, f"{name} is in no layer"
    return parts


def runs_of(anatomy: Anatomy) -> dict[str, int]:
    """Return how many positions of the stack run each tensor of a block of a model whose blocks are tied.

    Empty for other models, whose tensors are all run once.
    """
    tie_map = anatomy.settings.tie_map
    run_counts: dict[str, int] = {}
    for name, layer in anatomy.layer.items() if tie_map is not None else ():
        if tie_map is None or layer >= len(tie_map) or anatomy.component[name] in (MTP, VISION):
            continue
        root, container, inside = _split(name, layer)
        own = (f"{root}{container}.{i}.{inside}" for i, source in enumerate(tie_map) if source == layer and i != layer)
        run_counts[name] = 1 + sum(other not in anatomy.component for other in own)
    return run_counts
