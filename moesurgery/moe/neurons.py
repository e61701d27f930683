"""Access to one expert of a block, and to its neurons, in every layout.

A neuron is a row of gate and up and a column of down. `neuron_rows` views any projection as a matrix [I, F] with
one row per neuron, `from_neuron_rows` is its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

from moesurgery.expr.nodes import Expr, Slice, concat, reshape, stack
from moesurgery.expr.tensors import concat_last, slice_last, transpose
from moesurgery.families.anatomy import BlockTensor, MoeBlock


def expert_tensors(block: MoeBlock, tensors: Mapping[str, Expr], expert: int) -> list[tuple[BlockTensor, Expr]]:
    """Return the tensors of one expert, without the expert axis where there is one."""
    return [
        (member, _of_expert(block, member, tensors[member.name], expert))
        for member in block.members
        if member.part is not None and member.expert in (None, expert)
    ]


def tensors_by_expert(block: MoeBlock, tensors: Mapping[str, Expr]) -> list[list[tuple[BlockTensor, Expr]]]:
    """Return what `expert_tensors` gives for every expert, in one pass: a block may have thousands of tensors."""
    by_expert: list[list[tuple[BlockTensor, Expr]]] = [[] for _ in range(block.experts)]
    for member in block.members:
        if member.part is not None:
            for expert in range(block.experts) if member.expert is None else (member.expert,):
                by_expert[expert].append((member, _of_expert(block, member, tensors[member.name], expert)))
    return by_expert


def _of_expert(block: MoeBlock, member: BlockTensor, expr: Expr, expert: int) -> Expr:
    """Return the part of a tensor that is one expert's."""
    assert member.part is not None
    if member.part.rows:
        rows = expr.shape[0] // block.experts
        return Slice(expr, expert * rows, (expert + 1) * rows)
    return expr if member.expert is not None else reshape(Slice(expr, expert, expert + 1), expr.shape[1:])


def restacked_experts(member: BlockTensor, experts: list[Expr]) -> Expr:
    """Return a stacked tensor of its experts, each without the expert axis."""
    joined = stack(experts)
    if member.part is not None and member.part.rows:
        return reshape(joined, (joined.shape[0] * joined.shape[1], *joined.shape[2:]))
    return joined


def _neurons_last(member: BlockTensor) -> bool:
    """Whether the neurons are the last axis of a stored projection: the input of down, or [in, out] of the others."""
    assert member.part is not None
    return (member.part.order == "oi") == (member.role == "down")


def has_neurons(member: BlockTensor) -> bool:
    """Whether a tensor has entries per neuron: all do but the bias of the down-projection."""
    return not (member.stem.bias and member.role == "down")


def neuron_rows(member: BlockTensor, expr: Expr) -> Expr:
    """Return one expert's projection or bias as [I, F], gate and up of a neuron side by side."""
    assert member.part is not None
    double = member.role == "gate_up"
    if member.stem.bias:
        if not double:
            return reshape(expr, (expr.numel, 1))
        if member.part.interleaved:
            return reshape(expr, (expr.numel // 2, 2))
        return transpose(reshape(expr, (2, expr.numel // 2)))
    wide = transpose(expr) if _neurons_last(member) else expr
    if not double:
        return wide
    rows, width = wide.shape[0] // 2, wide.shape[1]
    if member.part.interleaved:
        return reshape(wide, (rows, 2 * width))
    return concat_last([Slice(wide, 0, rows), Slice(wide, rows, 2 * rows)])


def from_neuron_rows(member: BlockTensor, rows: Expr) -> Expr:
    """Return the stored form: the inverse of `neuron_rows`."""
    assert member.part is not None
    double = member.role == "gate_up"
    if member.stem.bias:
        return reshape(rows if not double or member.part.interleaved else transpose(rows), (rows.numel,))
    wide = rows
    if double:
        count, width = rows.shape[0], rows.shape[1] // 2
        if member.part.interleaved:
            wide = reshape(rows, (2 * count, width))
        else:
            wide = concat([slice_last(rows, 0, width), slice_last(rows, width, 2 * width)])
    return transpose(wide) if _neurons_last(member) else wide
