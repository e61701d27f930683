"""Mean squares of what weights are multiplied with, up to a factor: what rounding errors are weighed by.

With `collect --neurons`, sums of g^2 h^2 for every neuron of routed experts, shared experts and dense FFNs: the inputs
of their down-projections. With an imatrix, sums of squares of the inputs of all projections of routed experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Constant
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.plan.plan import Plan
from moesurgery.stats.imatrix_file import Imatrix, is_imatrix, load_imatrix
from moesurgery.stats.statistics_file import Stats, stats_for

if TYPE_CHECKING:
    import numpy as np

Squares = dict[str, Expr]  # F32 by the name of the weight: [in], or [E, in] for stacked experts
_IMATRIX = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "gate_up": "ffn_up_exps", "down": "ffn_down_exps"}


def input_squares(path: str, plan: Plan, operation: str) -> Squares:
    """Return the mean squares of the inputs of weights that a file of statistics or an imatrix has.

    Raises RefusedError where they are those of another model, or where the file has none.
    """
    found = _squares(path, plan, operation)
    if not found:
        raise RefusedError(
            f"{operation}: {path} has no squares of what experts' projections read",
            "collect them with `moesurgery collect --neurons`, or with `--imatrix`",
        )
    return found


def collected_squares(path: str | None, plan: Plan, operation: str) -> Squares:
    """Return what `input_squares` does, and nothing where no file is given or the statistics have no such sums."""
    if path is None:
        return {}
    return input_squares(path, plan, operation) if is_imatrix(path) else _squares(path, plan, operation)


def _squares(path: str, plan: Plan, operation: str) -> Squares:
    """Return the mean squares of inputs that a file has, if any. Raises RefusedError for those of another model."""
    found: Squares = {}
    widths: dict[str, int] = {}

    def add(member: BlockTensor, squares: np.ndarray) -> None:
        assert member.part is not None
        found[member.name] = _row(squares, member)
        widths[member.name] = plan.tensors[member.name].shape[-1 if member.part.order == "oi" else -2]

    if is_imatrix(path):
        imatrix = load_imatrix(path)
        for block in plan.anatomy.blocks:
            for member in _weights(block):
                squares = _of_imatrix(imatrix, block, member)
                if squares is not None:
                    add(member, squares)
    else:
        statistics = stats_for(path, plan.anatomy, operation)
        for block, sums in _collected(statistics, plan):
            for member in _weights(block):
                if member.role == "down":
                    add(member, sums)
    for name, expr in found.items():
        if expr.shape[-1] != widths[name]:
            raise RefusedError(
                f"{operation}: {name} has {widths[name]} inputs, {path} squares of {expr.shape[-1]}",
                "they belong to another model",
            )
    return found


def _weights(block: MoeBlock) -> list[BlockTensor]:
    return [member for member in block.members if member.part and member.stem.main]


def _collected(statistics: Stats, plan: Plan) -> list[tuple[MoeBlock, np.ndarray]]:
    """Return blocks and FFNs with the sums [E, I] of their neurons."""
    routed = {block.where: block for block in plan.anatomy.main_blocks}
    others = {**shared_experts(plan.anatomy, plan.tensors), **dense_ffns(plan.anatomy, plan.tensors)}
    found = []
    for blocks, collected in ((routed, statistics.blocks), (others, statistics.ffns)):
        for where, sums in collected.items():
            if where in blocks and "neuron_squares" in sums.sums:
                found.append((blocks[where], sums.sums["neuron_squares"]))
    return found


def _of_imatrix(imatrix: Imatrix, block: MoeBlock, member: BlockTensor) -> np.ndarray | None:
    """Return the sums [E, in] that an imatrix has for a projection of a block; None without any."""
    squares = imatrix.sums.get(f"blk.{block.layer}.{_IMATRIX[member.role]}.weight")
    if squares is None:
        return None
    if imatrix.legacy and squares.shape[1] % block.experts == 0:
        squares = squares.reshape(block.experts, -1)
    if len(squares) != block.experts:
        raise RefusedError(
            f"{block.where} has {block.experts} experts, the imatrix {len(squares)}", "it is another model's"
        )
    return squares


def _row(squares: np.ndarray, member: BlockTensor) -> Expr:
    import numpy as np

    values = np.ascontiguousarray(squares if member.expert is None else squares[member.expert], "<f4")
    return Constant(values.tobytes(), "F32", values.shape)
