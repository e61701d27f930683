"""Experts of one model in the order of another's, and the neurons of an expert likewise.

Models that were trained apart may have the same experts under other numbers. The assignment (Hungarian) brings router
rows and weights closest. Neurons have no order, and are told apart only after the experts are, so the weights of an
expert are compared by what no order of neurons changes: the mean and the mean square of each column of its projections,
one row per neuron. Weight matching: arXiv 2209.04836; over experts: arXiv 2310.01334.

Nothing is read while planning: the orders are computed when the first tensor of a layer is written, from one pass over
the experts of the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr, Reader, Slice, Unary, concat, stack
from moesurgery.expr.shared import Reordered, SharedComputation, SharedResult
from moesurgery.expr.tensors import transpose
from moesurgery.moe.canonical_names import CanonicalName, CanonicalTensors
from moesurgery.moe.neuron_matching import neuron_order
from moesurgery.moe.neurons import from_neuron_rows, has_neurons, neuron_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

_STEP = 1 << 20  # elements of an expert in memory at a time while it is summed up


@dataclass(frozen=True)
class Chosen(Unary):
    """The entry of the first axis of `of` that entry `index` of `order`, an I64 vector, names.

    `digest` stands for both in a plan's own digest: there is a `Chosen` for each of them, E times E if spelt out.
    """

    of: Expr = field(repr=False)
    order: Expr = field(repr=False)
    index: int
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape[1:]

    @property
    def chunk_multiple(self) -> int:
        return self.numel if self.numel % self.of.chunk_multiple else self.of.chunk_multiple

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, self.order)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        order = self.order.evaluate(0, self.order.numel, reader)
        at = int(order[self.index]) * self.numel
        return self.of.evaluate(at + start, at + stop, reader)


@dataclass(frozen=True)
class NeuronStatistics(Expr):
    """Mean and mean square of the columns of a matrix [I, F], as [2, F]: read in parts."""

    of: Expr
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (2, self.of.shape[1])

    @property
    def chunk_multiple(self) -> int:
        return self.numel

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of,)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        count, width = self.of.shape
        step = max(1, _STEP // lcm(width, self.of.chunk_multiple)) * lcm(width, self.of.chunk_multiple)
        total = torch.zeros(2, width, dtype=torch.float64)
        for first in range(0, self.of.numel, step):
            rows = self.of.evaluate(first, min(first + step, self.of.numel), reader).view(-1, width).double()
            total[0] += rows.sum(0)
            total[1] += rows.square().sum(0)
        return (total / count).float().reshape(-1)[start:stop]


class Aligner:
    """One model put in the order of another: `experts`, the `neurons` inside them, or both."""

    def __init__(self, reference: CanonicalTensors, other: CanonicalTensors, what: Collection[str]) -> None:
        self.reference, self.other = reference, other
        self.experts, self.neurons = "experts" in what, "neurons" in what
        self._orders: dict[tuple[int, int], tuple[Expr, str]] = {}
        self._stacks: dict[tuple[int, str], tuple[Expr, str]] = {}
        self._neuron_orders: dict[tuple[int, int, int], Expr] = {}

    def part(self, ours: CanonicalName, theirs: CanonicalName) -> Expr:
        """Return the part `theirs` of the other model, in the order of `ours` of the reference."""
        if ours.layer is None or theirs.layer is None:
            return self.other.part(theirs)
        head, _, rest = ours.path.partition(".")
        if head == "router":
            expr = self.other.part(theirs)
            axis = self.other.member(theirs).axis or 0
            return self._router(expr, axis, ours.layer, theirs.layer) if self.experts else expr
        number, _, name = rest.partition(".")
        if int(number) not in self.reference.experts(ours.layer):
            return self.other.part(theirs)
        values = self._expert_part(int(number), name, ours.layer, theirs.layer)
        member = self.reference.member(ours)
        if not self.neurons or not has_neurons(member):
            return values
        order = self._neurons(int(number), ours.layer, theirs.layer)
        return from_neuron_rows(member, Reordered(neuron_rows(member, values), order))

    def _router(self, expr: Expr, axis: int, ours: int, theirs: int) -> Expr:
        """Return a tensor of the router with its entries, along `axis` 0 or 1, in the order of the reference."""
        order, _ = self._order(ours, theirs)
        count = order.numel
        if axis == 1:
            return transpose(Reordered(transpose(expr), order))
        if expr.shape[0] == count:
            return Reordered(expr, order)
        return concat([Reordered(Slice(expr, 0, count), order), Slice(expr, count, expr.shape[0])])

    def _expert_part(self, number: int, name: str, ours: int, theirs: int) -> Expr:
        """Return a part of the expert that stands for `number` of the reference."""
        if not self.experts:
            return self.other.part(CanonicalName(theirs, f"experts.{number}.{name}"))
        order, digest = self._order(ours, theirs)
        if (theirs, name) not in self._stacks:
            experts = [self.other.part(CanonicalName(theirs, f"experts.{e}.{name}")) for e in range(order.numel)]
            together = stack(experts)
            self._stacks[theirs, name] = together, hashlib.sha256(repr(together).encode()).hexdigest()
        together, content = self._stacks[theirs, name]
        return Chosen(together, order, number, f"{content} {digest}")

    def _order(self, ours: int, theirs: int) -> tuple[Expr, str]:
        """Return the order of the experts of a layer, and its digest."""
        if (ours, theirs) not in self._orders:
            first, second = _traits(self.reference, ours), _traits(self.other, theirs)
            count = len(self.reference.experts(ours))
            if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
                raise RefusedError(
                    f"the experts of layer {theirs} of {self.other.label} and of layer {ours} of {self.reference.label}"
                    " are not alike, so they cannot be matched"
                )
            groups = self.reference.anatomy.settings.groups
            parameters = (("count", count), ("groups", groups[0] if groups else 1))
            solution = SharedComputation(matched_experts, (*first, *second), parameters)
            order = SharedResult(solution, 0, "I64", (count,))
            self._orders[ours, theirs] = order, hashlib.sha256(repr(solution).encode()).hexdigest()
        return self._orders[ours, theirs]

    def _neurons(self, number: int, ours: int, theirs: int) -> Expr:
        """Return the order in which the neurons of an expert match those of expert `number` of the reference."""
        experts_pair = (number, ours, theirs)
        if experts_pair not in self._neuron_orders:
            keys = self.reference.experts(ours)[number]
            mine = [(self.reference.member(key), self.reference.part(key)) for key in keys]
            yours = [self._expert_part(number, key.path.split(".", 2)[2], ours, theirs) for key in keys]
            members = [member for member, _ in mine]
            self._neuron_orders[experts_pair] = neuron_order(mine, list(zip(members, yours, strict=True)))
        return self._neuron_orders[experts_pair]


def not_aligned(parts: CanonicalTensors) -> str | None:
    """Say which experts of a model keep their order under alignment, None where none does.

    Raises RefusedError where some cannot change their places for what others share with them.
    """
    anatomy = parts.anatomy
    if not anatomy.blocks:
        return f"{parts.label} has no experts"
    if shared := next((s.name for s in anatomy.settings.family.sets if s.follows), None):
        raise RefusedError(f"the experts of {parts.label} share numbers and a selection bias with those of {shared}")
    if not any(member.along is not None and member.role == "router" for member in anatomy.blocks[0].members):
        raise RefusedError(f"the router of {parts.label} has no row for each expert, so they cannot change places")
    left = [b.where for b in anatomy.blocks if b.of or f"{b.root}{b.container}." != parts.prefix]
    more = f" and {len(left) - 2} more layers" if len(left) > 2 else ""
    return f"the experts of {', '.join(left[:2])}{more} keep their order" if left else None


def _traits(parts: CanonicalTensors, layer: int) -> list[Expr]:
    """Return what the experts of a layer are recognised by: router rows [E, H], then moments [2, F] of each expert."""
    traits: list[Expr] = []
    router = CanonicalName(layer, "router.router")
    experts = parts.experts(layer)
    if router in parts.stored_in:
        rows = transpose(parts.part(router)) if parts.member(router).axis == 1 else parts.part(router)
        traits.append(cast(Slice(rows, 0, len(experts)), "F32"))
    for number in sorted(experts):
        for key in sorted(experts[number]):  # files keep projections in any order
            member = parts.member(key)
            if has_neurons(member):
                traits.append(NeuronStatistics(neuron_rows(member, parts.part(key))))
    return traits


def matched_experts(*traits: torch.Tensor, count: int, groups: int) -> tuple[torch.Tensor]:
    """Return the order [E] of the second model's experts that is closest to the first's: see `_traits`.

    Of router rows, and of the moments of each projection, the squared distances between all pairs of experts are
    divided by their mean, so that each counts the same; where all experts are alike in one, it does not count. Where
    the router scores groups of experts, only whole groups change places, and experts within a group.
    """
    import numpy as np
    import torch

    half = len(traits) // 2
    cost = np.zeros((count, count))
    first, second = traits[:half], traits[half:]
    routers = half % count
    pairs = [(first[i], second[i]) for i in range(routers)]
    per_expert = (half - routers) // count
    for j in range(per_expert):
        mine, yours = (
            torch.stack([side[routers + e * per_expert + j] for e in range(count)]) for side in (first, second)
        )
        pairs += [(mine[:, 0], yours[:, 0]), (mine[:, 1].sqrt(), yours[:, 1].sqrt())]
    for mine, yours in pairs:
        distances = torch.cdist(mine.double(), yours.double()).square().numpy()
        if not np.isfinite(distances).all():
            raise RefusedError("experts cannot be matched: their weights hold NaN or infinity", "validate finds them")
        if distances.mean() > 0:
            cost += distances / distances.mean()
    return (torch.from_numpy(_assigned(cost, groups)),)


def _assigned(cost: np.ndarray, groups: int) -> np.ndarray:
    """Return for each row the column that it is assigned to, blocks of rows to whole blocks of columns."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    size = len(cost) // groups
    blocks = cost.reshape(groups, size, groups, size).transpose(0, 2, 1, 3)
    inner = [[linear_sum_assignment(blocks[a, b])[1] for b in range(groups)] for a in range(groups)]
    totals = [[blocks[a, b][np.arange(size), inner[a][b]].sum() for b in range(groups)] for a in range(groups)]
    chosen = linear_sum_assignment(totals)[1]
    return np.concatenate([b * size + inner[a][b] for a, b in enumerate(chosen)])
