"""Where the neurons of an FFN are in its tensors: rows of gate and up, columns of down, and entries for their blocks.

Plain weights have an entry for each neuron. Quantised ones have entries for several: a byte of two 4-bit values, a
32-bit word, a scale for a block. Neurons are then taken out in whole blocks alone, so that every entry that stays keeps
its bytes: gate and up by byte ranges, down by columns of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.expr.tensors import Full, take, take_last
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.neurons import restacked_experts

_PLAIN = "dequantise first: `moesurgery convert --dequantize` where it knows the form, else the tool that made it"
_SHAPE = ".weight_shape"


class _Axis(NamedTuple):
    """The axis of one expert's tensor along which its neurons are, None for none, and how many share an entry.

    `doubled`: each has two entries, for gate and up.
    """

    axis: int | None
    share: int = 1
    doubled: bool = False


def neuron_count(block: MoeBlock, tensors: Mapping[str, Expr]) -> int:
    """Return the number of neurons I of each expert of a block. Raises RefusedError where it cannot be told."""
    for member in block.members:
        if member.part is not None and member.stem.companion is not None and member.stem.suffix.startswith(".weight."):
            raise _unknown(member, "belongs to a matrix that is stored as one column of bytes")
    for member, parts in _by_expert(block, tensors):
        if member.stem.main and member.role != "down" and parts and len(parts[0].shape) > 1:
            if member.stem.suffix == ".qweight":
                raise _unknown(member, "packs single neurons into words")
            rows = parts[0].shape[0 if _stored_out_in(member) else 1]
            return rows // 2 if member.role == "gate_up" else rows
    raise RefusedError(f"{block.where}: the width of its experts cannot be told from their tensors", _PLAIN)


def neurons_together(block: MoeBlock, tensors: Mapping[str, Expr]) -> int:
    """Return how many neighbouring neurons of an expert stay or go together: 1 where weights are plain.

    Raises RefusedError where a stored form does not tell which entries are whose.
    """
    width = neuron_count(block, tensors)
    members = {
        (m.role, m.stem.suffix, parts[0].shape): (m, parts[0]) for m, parts in _by_expert(block, tensors) if parts
    }
    return math.lcm(*(_axis(member, expr, width).share for member, expr in members.values()))


def tensors_with_neurons(block: MoeBlock, tensors: Mapping[str, Expr]) -> set[str]:
    """Return the tensors of a block that have entries for neurons. Raises RefusedError as `neurons_together` does."""
    width = neuron_count(block, tensors)
    return {
        member.name
        for member, parts in _by_expert(block, tensors)
        if parts and _axis(member, parts[0], width).axis is not None
    }


def with_neurons(block: MoeBlock, tensors: Mapping[str, Expr], kept: Sequence[Sequence[int]]) -> dict[str, Expr]:
    """Return the changed tensors of a block of which each expert has its neurons `kept` alone, ascending."""
    width = neuron_count(block, tensors)
    first = kept[0]
    changed: dict[str, Expr] = {}
    for member, parts in _by_expert(block, tensors):
        if member.expert is not None:
            own = kept[member.expert] if member.expert < len(kept) else range(len(first))
            changed[member.name] = _selected(member, parts[0], own, width)
        elif parts:
            # Behind the experts a stack may have empty places, for identity experts.
            neurons = [*kept, *(range(len(first)) for _ in parts[len(kept) :])]
            chosen = [_selected(member, part, own, width) for part, own in zip(parts, neurons, strict=True)]
            changed[member.name] = restacked_experts(member, chosen)
    return changed


def _by_expert(block: MoeBlock, tensors: Mapping[str, Expr]) -> list[tuple[BlockTensor, list[Expr]]]:
    """Return the tensors of a block, each as its experts' parts; none where it is about all experts alike."""
    divided: list[tuple[BlockTensor, list[Expr]]] = []
    for member in block.members:
        if member.part is None:
            continue
        expr = tensors[member.name]
        if member.expert is not None:
            parts = [expr]
        elif member.part.rows:
            rows = expr.shape[0] // block.experts
            parts = [Slice(expr, e * rows, (e + 1) * rows) for e in range(block.experts)]
        elif expr.shape and expr.shape[0] >= block.experts:
            parts = [reshape(Slice(expr, e, e + 1), expr.shape[1:]) for e in range(expr.shape[0])]
        else:
            parts = []
        divided.append((member, parts))
    return divided


def _selected(member: BlockTensor, expr: Expr, neurons: Sequence[int], width: int) -> Expr:
    """Return the part of one expert's tensor that belongs to `neurons`, of `width`."""
    if len(neurons) == width or not expr.numel:
        return expr
    if member.stem.suffix == _SHAPE:
        stated = Full(len(neurons) * (2 if member.role == "gate_up" else 1), expr.dtype, (1,))
        return concat([Slice(expr, 0, 1), stated] if member.role == "down" else [stated, Slice(expr, 1, 2)])
    where = _axis(member, expr, width)
    if where.axis is None:
        return expr
    entries = list(dict.fromkeys(neuron // where.share for neuron in neurons))
    if where.doubled and member.part is not None and member.part.interleaved:
        entries = [2 * entry + half for entry in entries for half in (0, 1)]
    elif where.doubled:
        entries = [*entries, *(width // where.share + entry for entry in entries)]
    if where.axis == 0:
        return take(expr, entries)
    rows, count, *rest = expr.shape
    each = math.prod(rest)
    columns = [entry * each + i for entry in entries for i in range(each)]
    return reshape(take_last(reshape(expr, (rows, count * each)), columns), (rows, len(entries), *rest))


def _axis(member: BlockTensor, expr: Expr, width: int) -> _Axis:
    """Return where the neurons are in one expert's tensor. Raises RefusedError where that is not known."""
    stem, shape = member.stem, expr.shape
    inputs = member.role == "down"
    if expr.numel <= 1 or stem.suffix == _SHAPE:
        return _Axis(None)
    if stem.companion is not None and stem.companion.kind == "input":
        raise _unknown(member, "has several numbers for the inputs of a linear map")
    if stem.companion is not None and stem.companion.kind == "meta" and stem.suffix != ".biases":
        raise _unknown(member, "gives neurons numbers or packs them in another order")
    if len(shape) == 1:
        if inputs:
            return _Axis(None)  # one entry for each output
        axis = 0
    else:
        axis = int(inputs == _stored_out_in(member))
    entries, doubled = shape[axis], member.role == "gate_up"
    neurons = 2 * width if doubled else width
    if stem.companion is not None and entries == 1:
        return _Axis(None)
    if neurons % entries:
        raise _unknown(member, f"has {entries} entries for {neurons} rows or columns")
    share = neurons // entries
    if doubled and member.part is not None and member.part.interleaved and share > 1:
        return _Axis(axis, max(1, share // 2))
    if doubled and width % share:
        raise _unknown(member, f"has an entry for each {share} rows, of gate and up together")
    return _Axis(axis, share, doubled)


def _stored_out_in(member: BlockTensor) -> bool:
    """Whether a matrix is stored as [out, in]; packed weights are, whatever the order of the plain ones."""
    assert member.part is not None
    return member.part.order == "oi" or member.stem.suffix in ("_blocks", "_scales")


def _unknown(member: BlockTensor, why: str) -> RefusedError:
    return RefusedError(f"{member.name} {why}, so neurons cannot be taken out of it", _PLAIN)
