"""Which neurons of an expert stay: by its weights alone, or by statistics of a run over text.

weights    the product of the norms of a neuron's row of gate and of up and of its column of down
saliency   sum of g^2 h_i^2 |W_i|^2 over the tokens routed to the expert: what its output loses with one neuron
obs        the last of the order in which optimal brain surgery gives them up (`fitting.neuron_order`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.evaluate import finite_values
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.neurons import neuron_rows, tensors_by_expert
from moesurgery.plan.dequantise import plain_values
from moesurgery.plan.plan import Plan
from moesurgery.stats.statistics_file import BlockStats

if TYPE_CHECKING:
    import numpy as np

NeuronCriterion = Literal["obs", "saliency", "weights"]
Kept = list[list[int]]  # the neurons that each expert of a block keeps, ascending


class Slimmed(NamedTuple):
    """A block of experts (or of one, for a shared expert or a dense FFN) that keeps `width` neurons of each.

    They stay and go in whole blocks of `size`.
    """

    block: MoeBlock
    width: int
    size: int


@dataclass(frozen=True)
class NeuronChoice:
    """The blocks to slim, by name, and how their neurons are chosen: `kept` has those that are chosen already."""

    blocks: Mapping[str, Slimmed]
    by: NeuronCriterion
    kept: Mapping[str, Kept]
    described: Mapping[str, Any]  # what a fit records of it


def by_statistics(block: BlockStats, by: NeuronCriterion, width: int, neurons: int, size: int) -> Kept:
    """Return the `width` of `neurons` neurons of each expert that stay, in whole blocks of `size`.

    Raises CheckpointError where the statistics are damaged, RefusedError where they are of other experts.
    """
    import numpy as np

    order = block.sums["neuron_order"].astype(np.int64)
    if order.shape[1] != neurons:
        raise RefusedError(
            f"slim-experts: the experts of {block.where} have {neurons} neurons, the statistics {order.shape[1]}",
            "collect them again with `moesurgery collect --neurons`",
        )
    if not (np.sort(order, axis=1) == np.arange(neurons)).all():
        raise CheckpointError(f"the statistics of {block.where}: neuron_order names a neuron twice", "collect again")
    if by == "saliency":
        scores = block.sums["neuron_saliency"]
    elif size == 1:
        return [sorted(row[neurons - width :].tolist()) for row in order]
    else:
        scores = np.empty(order.shape)
        np.put_along_axis(scores, order, np.diff(block.sums["neuron_error"], axis=1, prepend=0), axis=1)
    return highest(scores, width, size)


def in_whole_blocks(neurons: Sequence[int], size: int) -> bool:
    """Whether ascending neurons are whole blocks of `size` neighbours."""
    blocks = sorted({neuron // size for neuron in neurons})
    return list(neurons) == [b * size + i for b in blocks for i in range(size)]


def highest(scores: np.ndarray, width: int, size: int) -> Kept:
    """Return the `width` neurons of each row of `scores` [E, I] with the highest sums over blocks of `size`."""
    import numpy as np

    experts, neurons = scores.shape
    blocks = scores.reshape(experts, neurons // size, size).sum(axis=2)
    best = np.sort(np.argsort(-blocks, axis=1, kind="stable")[:, : width // size], axis=1)
    return (best[:, :, None] * size + np.arange(size)).reshape(experts, width).tolist()


def by_weights(plan: Plan, block: MoeBlock) -> np.ndarray:
    """Return the score [E, I] of each neuron by its weights alone; quantised ones are read as plain numbers."""
    import numpy as np

    weights = [m for m in block.members if m.part is not None and m.stem.main]
    tensors = {m.name: plain_values(plan, m.name) for m in weights}
    experts = tensors_by_expert(replace(block, members=weights), tensors)
    return np.stack([np.prod([_norms(member, expr) for member, expr in expert], axis=0) for expert in experts])


def _norms(member: BlockTensor, expr: Expr) -> np.ndarray:
    """Return the norm [I] of each neuron's part of a projection; of gate and up together the product of both."""
    import numpy as np

    rows = finite_values(member.name, neuron_rows(member, expr))
    parts = np.split(rows, 2, axis=1) if member.role == "gate_up" else [rows]
    return np.prod([np.linalg.norm(part, axis=1) for part in parts], axis=0, dtype=np.float64)  # type: ignore[no-any-return]
