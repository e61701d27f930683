"""Which experts: by number, the same in all layers or per layer, or by a criterion.

A criterion gives every expert of a block a score; the lowest are given up first. Those here read routers at
most. A criterion that needs data belongs here too: a function of a block and what was measured of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.plan.plan import Plan
from moesurgery.plan.values import values_of

if TYPE_CHECKING:
    import numpy as np

Criterion = Literal["router-norm", "random"]
LayerKey = int | str  # the number of a layer, or its full name where two have one number


def per_block(anatomy: Anatomy, operation: str, value: Any) -> dict[str, Any]:
    """Return `value` for every block by name: itself, or where it is a mapping, the entry of the block's layer.

    Blocks that a mapping leaves out have no entry. Raises RefusedError for a layer that has no experts or is not there.
    """
    if not isinstance(value, Mapping):
        return {block.where: value for block in anatomy.blocks}
    keys: dict[str, str] = {}
    for block in reversed(anatomy.blocks):  # main layers come first, and so win a number
        keys[str(block.layer)] = keys[block.where] = block.where
    found = {}
    for key, entry in value.items():
        if str(key) not in keys:
            layers = ", ".join(str(b.layer) for b in anatomy.main_blocks)
            raise RefusedError(f"{operation}: there is no MoE layer {key!r}", f"the MoE layers are {layers}")
        found[keys[str(key)]] = entry
    return found


def check_indices(operation: str, block: MoeBlock, indices: Sequence[int]) -> None:
    """Raise RefusedError for an expert that is not there or is named twice."""
    for index in indices:
        if not 0 <= index < block.experts:
            raise RefusedError(
                f"{operation}: {block.where} has no expert {index}", f"its experts are 0 to {block.experts - 1}"
            )
    if len(set(indices)) != len(indices):
        raise RefusedError(f"{operation}: an expert of {block.where} is named twice: {sorted(indices)}")


def router_rows(plan: Plan, block: MoeBlock) -> np.ndarray:
    """Return the router's rows [E, H] of a block. Raises RefusedError where its router is no single matrix."""
    if block.router is None:
        raise RefusedError(f"{block.where}: its router is not one matrix", "name the experts by number")
    rows = values_of(plan.tensors[block.router.name])
    return (rows.T if block.router.axis == 1 else rows)[: block.experts]


def _router_norm(plan: Plan, block: MoeBlock, seed: int) -> np.ndarray:
    """The length of each expert's router row. A softmax ignores what all rows share, so their mean is left out."""
    import numpy as np

    rows = router_rows(plan, block)
    if plan.anatomy.settings.score in ("softmax", "top-softmax"):
        rows = rows - rows.mean(axis=0)
    return np.asarray(np.linalg.norm(rows, axis=1))


def _random(plan: Plan, block: MoeBlock, seed: int) -> np.ndarray:
    import numpy as np

    digest = hashlib.sha256(f"{seed}/{block.where}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(block.experts)


_CRITERIA: Mapping[Criterion, Callable[[Plan, MoeBlock, int], np.ndarray]] = {
    "router-norm": _router_norm,
    "random": _random,
}


def scores_of(plan: Plan, block: MoeBlock, by: Criterion, seed: int) -> list[float]:
    """Return a score for each expert of `block` by the criterion `by`; higher is more worth keeping."""
    return [float(score) for score in _CRITERIA[by](plan, block, seed)]


def lowest(anatomy: Anatomy, scores: Sequence[float], count: int) -> list[int]:
    """Return the `count` experts of the lowest score, as many from each of the router's groups, in ascending order."""
    groups = anatomy.settings.groups
    parts = groups[0] if groups else 1
    size = len(scores) // parts
    found: list[int] = []
    for part in range(parts):
        members = range(part * size, (part + 1) * size)
        found += sorted(members, key=lambda e: (scores[e], e))[: count // parts]
    return sorted(found)
