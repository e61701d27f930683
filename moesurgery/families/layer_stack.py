"""The stack of blocks of a language model: which tensors make up each block, and their names at another position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.components import MTP, VISION
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
        found = ", ".join(f"{root}{container}" for root, container in roots) or "none"
        raise RefusedError(f"{operation}: it needs one stack of blocks, and this model has {found}")
    ((root, container), blocks) = next(iter(roots.items()))
    tie_map = anatomy.settings.tie_map
    depth = max(blocks) + 1 if depth is None else depth
    for layer in range(depth):
        if layer not in blocks and not (tie_map is not None and tie_map[layer] != layer):
            raise CheckpointError(f"config.json says {depth} layers, and {root}{container}.{layer} has no tensors")
    return Stack(root, container, depth, blocks)


def _split(name: str, layer: int) -> tuple[str, str, str]:
    parts = split_layer(name, layer)
    assert parts is not None, f"{name} is in no layer"
    return parts


def runs_of(anatomy: Anatomy) -> dict[str, int]:
    """Return how many positions of the stack run each tensor of a block of a model whose blocks are tied.

    Empty for other models, whose tensors are all run once.
    """
    tie_map = anatomy.settings.tie_map
    found: dict[str, int] = {}
    for name, layer in anatomy.layer.items() if tie_map is not None else ():
        if tie_map is None or layer >= len(tie_map) or anatomy.component[name] in (MTP, VISION):
            continue
        root, container, inside = _split(name, layer)
        own = (f"{root}{container}.{i}.{inside}" for i, source in enumerate(tie_map) if source == layer and i != layer)
        found[name] = 1 + sum(other not in anatomy.component for other in own)
    return found
