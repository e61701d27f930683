"""The experts of one block from one layout to another: the same numbers under other names and axes.

Between tensors per expert and stacked ones of [out, in] order that is byte ranges alone; orders and interleaved
rows are exchanged in memory, without arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Slice, concat, reshape, stack
from moesurgery.expr.tensors import concat_last, slice_last, transpose
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.families.family import Layout, Projection
from moesurgery.moe.expert_axis import Entries, refuse_strays
from moesurgery.moe.neurons import tensors_by_expert


def relaid(block: MoeBlock, tensors: Mapping[str, Expr], target: Layout, operation: str) -> Entries:
    """Return the tensors that replace each expert tensor of a block in the layout `target`.

    All take the position of the block's first tensor. Raises RefusedError for biases and quantised weights.
    """
    refuse_strays(block, tensors, renumbered=False)
    members = [m for m in block.members if m.part is not None]
    if _keeps_projections(block, target) and any(not m.stem.main for m in members):
        return _carried(block, tensors, target, operation)
    for member in members:
        if not member.stem.main or tensors[member.name].dtype not in PLAIN_FLOATS:
            raise RefusedError(
                f"{operation}: {member.name} is no plain weight, and only plain weights are moved between layouts",
                "add --dequantize",
            )
    entries: list[tuple[str, Expr]] = []
    try:
        matrices = [matrices_of(of_expert) for of_expert in tensors_by_expert(block, tensors)]
        for part in target.parts:
            name = f"{block.layer_path}.{part.path}"
            stored = [as_stored(part, of_expert) for of_expert in matrices]
            if "#" in part.path:
                entries += [(f"{name.replace('#', str(e))}.weight", expr) for e, expr in enumerate(stored)]
            else:
                entries.append((name, concat(stored) if part.rows else stack(stored)))
    except ValueError as error:
        raise RefusedError(f"{operation}: {block.where}: its experts do not fit together: {error}") from None
    first, *others = (member.name for member in members)
    return {first: entries, **{name: [] for name in others}}


def _keeps_projections(block: MoeBlock, target: Layout) -> bool:
    """Whether a layout differs in names and in stacking alone: each projection has a tensor of its own, [out, in]."""
    assert block.layout is not None
    kinds = [
        [(part.role, part.order, part.interleaved, part.rows) for part in la.parts] for la in (block.layout, target)
    ]
    return sorted(kinds[0]) == sorted(kinds[1]) and not any(part.rows for part in target.parts)


def _carried(block: MoeBlock, tensors: Mapping[str, Expr], target: Layout, operation: str) -> Entries:
    """Return the tensors of a block, quantised weights with all that belongs to them, in a layout of other names.

    Byte ranges alone. Raises RefusedError for what has no entry for every expert.
    """
    members = [m for m in block.members if m.part is not None]
    for member in members:
        shape = tensors[member.name].shape
        if member.expert is None and (not shape or shape[0] != block.experts):
            raise RefusedError(f"{operation}: {member.name} {list(shape)} has no entry for each of the experts")
    gathered: dict[tuple[str, str], list[Expr]] = {}
    for of_expert in tensors_by_expert(block, tensors):
        for member, expr in of_expert:
            gathered.setdefault((member.role, member.stem.suffix), []).append(expr)
    entries: list[tuple[str, Expr]] = []
    for part in target.parts:
        path = f"{block.layer_path}.{part.path}"
        for suffix in dict.fromkeys(suffix for role, suffix in gathered if role == part.role):
            experts = gathered[part.role, suffix]
            if "#" in path:
                entries += [(f"{path.replace('#', str(e))}{suffix}", expr) for e, expr in enumerate(experts)]
            else:
                entries.append((f"{path}{suffix}", stack(experts)))
    first, *others = (member.name for member in members)
    return {first: entries, **{name: [] for name in others}}


def matrices_of(of_expert: list[tuple[BlockTensor, Expr]]) -> dict[str, Expr]:
    """Return gate, up and down of one expert, each [out, in]. Raises ValueError where gate and up differ in width."""
    matrices: dict[str, Expr] = {}
    for member, expr in of_expert:
        assert member.part is not None
        if member.part.role != "gate_up":
            matrices[member.part.role] = transpose(expr) if member.part.order == "io" else expr
            continue
        if expr.shape[0 if member.part.order == "oi" else 1] % 2:
            raise ValueError(f"{member.name} {list(expr.shape)} does not divide into gate and up")
        if member.part.interleaved:
            matrix = transpose(expr) if member.part.order == "io" else expr
            width, hidden = matrix.shape[0] // 2, matrix.shape[1]
            pairs = reshape(matrix, (width, 2 * hidden))
            matrices["gate"], matrices["up"] = slice_last(pairs, 0, hidden), slice_last(pairs, hidden, 2 * hidden)
        elif member.part.order == "io":
            width = expr.shape[1] // 2
            matrices["gate"] = transpose(slice_last(expr, 0, width))
            matrices["up"] = transpose(slice_last(expr, width, 2 * width))
        else:
            width = expr.shape[0] // 2
            matrices["gate"], matrices["up"] = Slice(expr, 0, width), Slice(expr, width, 2 * width)
    return matrices


def as_stored(part: Projection, matrices: Mapping[str, Expr]) -> Expr:
    """Return one projection of one expert as a layout stores it."""
    if part.role != "gate_up":
        matrix = matrices[part.role]
    elif part.interleaved:
        gate, up = matrices["gate"], matrices["up"]
        matrix = reshape(concat_last([gate, up]), (2 * gate.shape[0], gate.shape[1]))
    else:
        matrix = concat([matrices["gate"], matrices["up"]])
    return transpose(matrix) if part.order == "io" else matrix


def moved_name(path: str, source: Layout, target: Layout) -> str:
    """Return the name in another layout of a tensor of an MoE layer that is not an expert's.

    `path` is relative to the layer.
    """
    for theirs, first in ((here, published) for published, here in source.moved):
        if path.startswith(theirs):
            path = first + path[len(theirs) :]
            break
    for published, there in target.moved:
        if path.startswith(published):
            return there + path[len(published) :]
    return path
