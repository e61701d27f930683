"""Make one expert of several: the mean of their weights, with their neurons matched first if asked.

Without data this is a blunt instrument: weights are averaged, not functions, and published comparisons find it
behind dropping on generation (REAP, arXiv 2510.13999). docs/surgery.md has figures. What a merge keeps exactly:
experts that are copies of each other, and, aligned, copies with their neurons in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS, element_count
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy, Member, MoeBlock
from moesurgery.plan.expr import Expr, Rows, concat, reshape
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.solved import Reordered
from moesurgery.plan.tensors import Linear
from moesurgery.surgery.alignment import neuron_order
from moesurgery.surgery.choosing import LayerKey, check_indices, per_block, router_rows, scores_of
from moesurgery.surgery.clustering import clusters
from moesurgery.surgery.expert_axis import Entries, along_experts, refuse_strays, renamed_modules
from moesurgery.surgery.expert_counts import (
    check_blocks,
    check_groups,
    check_remaining,
    equal_count,
    with_expert_count,
)
from moesurgery.surgery.neurons import expert_tensors, from_neuron_rows, has_neurons, neuron_rows, restacked
from moesurgery.surgery.operation import operation
from moesurgery.surgery.parameters import Param

Groups = list[list[int]] | dict[LayerKey, list[list[int]]] | None
Weights = Literal["equal", "router-norm"]
Align = Literal["none", "weights"]
Router = Literal["dominant", "mean"]
_NAME = "merge-experts"


@operation(_NAME)
def merge_experts(
    plan: Plan,
    *,
    groups: Annotated[
        Groups,
        Param("experts to merge, as '[[0, 5], [2, 3, 7]]', in every layer or per layer; others stay as they are"),
    ] = None,
    to: Annotated[
        int | None, Param("merge down to this many experts per layer, clustered by their router rows", minimum=1)
    ] = None,
    weights: Annotated[
        Weights | list[float],
        Param("share of each expert in the mean: equal, router-norm, or a list with a number for each expert"),
    ] = "equal",
    align: Annotated[Align, Param("match the neurons of merged experts first: none, or by their weights")] = "none",
    router: Annotated[
        Router, Param("router row of a merged expert: that of its dominant member, or the mean of all")
    ] = "dominant",
) -> Plan:
    """Merge experts into fewer: the mean of their weights, one router row for each group.

    Give `groups` or `to`. The dominant member of a group is the one with the largest share, the first named where
    shares are equal; in a cluster, the one with the longest router row. Needs no data, and shows it: measure
    what it costs before you use the result.
    """
    anatomy = plan.anatomy
    anatomy.require_family(_NAME)
    total = check_blocks(anatomy, _NAME)
    if (groups is None) == (to is None):
        raise RecipeError(f"{_NAME} needs one of groups and to", f"as in `moesurgery {_NAME} MODEL --to {total // 2}`")
    if to is not None:
        if to > total:
            raise RefusedError(
                f"{_NAME}: there are {total} experts in each layer, fewer than {to}", "choose a lower --to"
            )
        check_remaining(anatomy, _NAME, to)
    chosen = _clustered(plan, anatomy, to) if to is not None else _named(anatomy, groups)
    remaining = equal_count(_NAME, chosen)
    check_remaining(anatomy, _NAME, remaining)
    check_groups(anatomy, _NAME, {where: [min(group) for group in found] for where, found in chosen.items()})

    entries: Entries = {}
    modules: dict[str, str | None] = {}
    layers = []
    for block in anatomy.blocks:
        numbers = _weights(plan, block, weights)
        shares = [_shares(block, group, numbers) for group in chosen[block.where]]
        merge = _Merge(block, plan.tensors, chosen[block.where], shares, align, router)
        entries.update(merge.entries())
        modules.update(renamed_modules(block, merge.dominant))
        layers.append({"layer": block.where, "groups": chosen[block.where], "shares": shares})
    tensors, home = plan.substituted(entries)
    config = plan.config if remaining == total else with_expert_count(anatomy, remaining, modules)
    step = Step(
        _NAME,
        {key: value for key, value in {"groups": groups, "to": to}.items() if value is not None}
        | {"weights": weights, "align": align, "router": router},
        f"{total} experts merged into {remaining} in each of {len(anatomy.blocks)} layers",
        report={"experts": remaining, "old_experts": total, "layers": layers},
        notes=_notes(anatomy, total, remaining),
        tables=(_table(chosen),),
    )
    return plan.edited(step, tensors=tensors, home=home, config=config)


def _notes(anatomy: Anatomy, total: int, remaining: int) -> tuple[str, ...]:
    if remaining == total:
        return ()
    notes = [
        "weights were averaged without data: unless the experts were near copies, dropping usually costs less;"
        " compare `moesurgery perplexity` of both"
    ]
    top_k = anatomy.settings.top_k
    if top_k is not None and top_k > 1:
        notes.append(
            f"a token still goes to {top_k} experts, now of different groups; where members of one group used to be"
            " chosen together, a lower top-k may be nearer to the original"
        )
    return tuple(notes)


def _table(chosen: Mapping[str, Sequence[Sequence[int]]]) -> Table:
    rows = []
    for where, groups in chosen.items():
        merged = [group for group in groups if len(group) > 1]
        shown = "  ".join("+".join(map(str, group)) for group in merged)
        rows.append((where, shown or "none", str(len(groups) - len(merged))))
    return Table(("layer", "merged", "alone"), tuple(rows))


def _named(anatomy: Anatomy, groups: Any) -> dict[str, list[list[int]]]:
    """Return the groups of each block, experts that no group names alone, in the order of their first members."""
    given = per_block(anatomy, _NAME, groups)
    found = {}
    for block in anatomy.blocks:
        named = [group for group in given.get(block.where, []) if group]
        flat = [expert for group in named for expert in group]
        check_indices(_NAME, block, flat)
        if anatomy.settings.groups is not None:
            size = block.experts // anatomy.settings.groups[0]
            for group in named:
                if len({expert // size for expert in group}) > 1:
                    raise RefusedError(
                        f"{_NAME}: {block.where} is routed in groups of {size} experts, and {group} are of several",
                        "merge experts of one group",
                    )
        alone = [[expert] for expert in range(block.experts) if expert not in flat]
        found[block.where] = sorted([*named, *alone], key=min)
    return found


def _clustered(plan: Plan, anatomy: Anatomy, count: int) -> dict[str, list[list[int]]]:
    """Return clusters of each block's experts, the member with the longest router row first in each."""
    parts = anatomy.settings.groups[0] if anatomy.settings.groups else 1
    found = {}
    for block in anatomy.blocks:
        lengths = scores_of(plan, block, "router-norm", 0)
        groups = clusters(router_rows(plan, block), count, parts)
        found[block.where] = [sorted(group, key=lambda e: (-lengths[e], e)) for group in groups]
    return found


def _weights(plan: Plan, block: MoeBlock, weights: Weights | list[float]) -> list[float]:
    """Return a number for each expert, to which its share in a mean is proportional."""
    if weights == "equal":
        return [1.0] * block.experts
    if weights == "router-norm":
        return scores_of(plan, block, "router-norm", 0)
    if len(weights) != block.experts or min(weights) < 0:
        raise RefusedError(
            f"{_NAME}: weights has {len(weights)} numbers, the least {min(weights, default=0):g};"
            f" {block.where} has {block.experts} experts",
            "give one number, not negative, for each expert",
        )
    return [float(weight) for weight in weights]


def _shares(block: MoeBlock, group: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return the share of each member of a group; they add up to one."""
    if len(group) == 1:
        return [1.0]
    total = sum(weights[expert] for expert in group)
    if total <= 0:
        raise RefusedError(
            f"{_NAME}: the weights of experts {list(group)} of {block.where} are all zero", "use --weights equal"
        )
    return [weights[expert] / total for expert in group]


class _Merge:
    """The merge of one block: `groups` of experts, and the `shares` of their members."""

    def __init__(
        self,
        block: MoeBlock,
        tensors: Mapping[str, Expr],
        groups: Sequence[Sequence[int]],
        shares: Sequence[Sequence[float]],
        align: Align,
        router: Router,
    ) -> None:
        self.block, self.tensors, self.groups, self.shares = block, tensors, groups, shares
        self.align, self.router = align, router
        self.dominant = [
            group[max(range(len(group)), key=lambda i: (share[i], -i))]
            for group, share in zip(groups, shares, strict=True)
        ]

    def entries(self) -> Entries:
        """Return what takes the place of the block's tensors."""
        refuse_strays(self.block, self.tensors)
        self._refuse_quantised()
        entries: Entries = {member.name: [] for member in self.block.members}
        merged = [self._expert(n) for n in range(len(self.groups))]
        for at, (member, _) in enumerate(merged[0]):
            if member.expert is None:
                entries[member.name].append((member.name, self._stacked(member, [expert[at][1] for expert in merged])))
        for new, expert in enumerate(merged):
            for member, expr in expert:
                if member.expert is not None:
                    entries[member.name].append((member.renumbered(new), expr))
        for member in self.block.members:
            if member.along is not None:
                entries[member.name].append((member.name, self._along(member)))
        return entries

    def _refuse_quantised(self) -> None:
        if all(len(group) == 1 for group in self.groups):
            return
        for member in self.block.members:
            if self.tensors[member.name].dtype not in PLAIN_FLOATS or member.stem.companion is not None:
                raise RefusedError(
                    f"{_NAME}: {member.name} is quantised ({self.tensors[member.name].dtype}): there is no exact mean",
                    "dequantise first with `moesurgery convert --dequantize`",
                )

    def _expert(self, number: int) -> list[tuple[Member, Expr]]:
        """Return the tensors of one new expert: those of the dominant member, its neurons the reference for others."""
        group, shares = list(self.groups[number]), self.shares[number]
        reference = expert_tensors(self.block, self.tensors, self.dominant[number])
        if len(group) == 1:
            return reference
        parts = {expert: expert_tensors(self.block, self.tensors, expert) for expert in group}
        orders = {}
        if self.align == "weights":
            orders = {e: neuron_order(reference, parts[e]) for e in group if e != self.dominant[number]}
        found = []
        for at, (member, expr) in enumerate(reference):
            terms = [
                (parts[expert][at], share, orders.get(expert)) for expert, share in zip(group, shares, strict=True)
            ]
            if orders and has_neurons(member):
                rows = [(_rows(m, e, order), share) for (m, e), share, order in terms]
                found.append((member, from_neuron_rows(member, Linear(tuple(rows), expr.dtype))))
            else:
                found.append((member, Linear(tuple((e, share) for (_, e), share, _ in terms), expr.dtype)))
        return found

    def _stacked(self, member: Member, experts: list[Expr]) -> Expr:
        """Return the new experts of a stacked tensor together again; unchanged ones in a row are one byte range."""
        if all(len(group) == 1 for group in self.groups):
            return along_experts(self.block, member, self.tensors[member.name], self.dominant)
        return restacked(member, experts)

    def _along(self, member: Member) -> Expr:
        """Return a router tensor: the entries of the dominant members, or the means of all."""
        expr = self.tensors[member.name]
        if self.router == "dominant" or expr.dtype not in PLAIN_FLOATS:
            return along_experts(self.block, member, expr, self.dominant)
        axis = member.axis or 0
        length, before, rest = expr.shape[axis], expr.shape[:axis], expr.shape[axis + 1 :]
        if element_count(before) != 1:
            raise RefusedError(
                f"{_NAME}: {member.name} has its experts along axis {axis} of {list(expr.shape)}",
                "use --router dominant",
            )
        flat = reshape(expr, (length, *rest))
        rows = [
            _mean([(Rows(flat, e, e + 1), share) for e, share in zip(group, shares, strict=True)])
            for group, shares in zip(self.groups, self.shares, strict=True)
        ]
        if length > self.block.experts:  # entries after the experts stay
            rows.append(Rows(flat, self.block.experts, length))
        joined = concat(rows)
        return reshape(joined, (*before, *joined.shape))


def _rows(member: Member, expr: Expr, order: Expr | None) -> Expr:
    rows = neuron_rows(member, expr)
    return rows if order is None else Reordered(rows, order)


def _mean(terms: list[tuple[Expr, float]]) -> Expr:
    return terms[0][0] if len(terms) == 1 else Linear(tuple(terms), terms[0][0].dtype)
