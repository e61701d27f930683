"""The tensors of one block with its experts merged: means of their weights, their neurons matched first if asked."""

from __future__ import annotations

from collections.abc import Mapping

from moesurgery.checkpoint.block_values import REQUANTISED
from moesurgery.checkpoint.dtypes import BLOCKS, PLAIN_FLOATS, element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.evaluate import finite_values
from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.expr.shared import Reordered
from moesurgery.expr.tensors import Linear
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.expert_axis import Entries, along_experts, refuse_strays
from moesurgery.moe.expert_table import is_expert_table, remapped_table
from moesurgery.moe.neuron_matching import neuron_order
from moesurgery.moe.neurons import expert_tensors, from_neuron_rows, has_neurons, neuron_rows, restacked_experts
from moesurgery.stats.group_fit_file import GroupFitFile
from moesurgery.surgery.group_experts import NAME, Merger


class MergedBlock:
    """The merge of one block. Where it was not run, and so has no fit, weights and dominant members decide."""

    def __init__(self, block: MoeBlock, tensors: Mapping[str, Expr], found: Merger, fits: GroupFitFile | None) -> None:
        self.block, self.tensors = block, tensors
        self.groups, self.shares = found.groups[block.where], found.shares[block.where]
        self.dominant = found.dominant[block.where]
        self.align, self.router, self.fits = found.align, found.router, fits
        if fits is None or block.where not in fits.blocks:
            self.fits = None
            self.align = "weights" if self.align == "activations" else self.align
            self.router = "dominant" if self.router == "lse" else self.router

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
        """Refuse what is still quantised: a router, or a type in which no mean can be stored."""
        if all(len(group) == 1 for group in self.groups):
            return
        for member in self.block.members:
            dtype = self.tensors[member.name].dtype
            plain = dtype in PLAIN_FLOATS and member.stem.companion is None
            if plain or is_expert_table(member) or dtype in REQUANTISED:
                continue
            raise RefusedError(
                f"{NAME}: {member.name} is quantised ({dtype}), and no mean of it can be stored",
                "merge a copy in F16, BF16 or Q8_0"
                if dtype in BLOCKS
                else "dequantise first with `moesurgery convert --dequantize`",
            )

    def _expert(self, number: int) -> list[tuple[BlockTensor, Expr]]:
        """Return the tensors of one new expert: those of the dominant member, its neurons the reference for others."""
        group, shares = list(self.groups[number]), self.shares[number]
        reference = expert_tensors(self.block, self.tensors, self.dominant[number])
        if len(group) == 1:
            return reference
        parts = {expert: expert_tensors(self.block, self.tensors, expert) for expert in group}
        others = [expert for expert in group if expert != self.dominant[number]]
        orders: dict[int, Expr] = {}
        if self.align == "weights":
            orders = {expert: neuron_order(reference, parts[expert]) for expert in others}
        elif self.align == "activations" and self.fits is not None:
            orders = {expert: self.fits.order(self.block.where, expert) for expert in others}
            for member, expr in reference:
                neurons = neuron_rows(member, expr).shape[0] if has_neurons(member) else None
                odd = {order.shape[0] for order in orders.values()} - {neurons}
                if odd and neurons is not None:
                    raise RefusedError(
                        f"{NAME}: {member.name} has {neurons} neurons, and the fit orders {odd.pop()}",
                        "make the fit again with --text FILE",
                    )
        merged = []
        for at, (member, expr) in enumerate(reference):
            terms = [
                (parts[expert][at], share, orders.get(expert)) for expert, share in zip(group, shares, strict=True)
            ]
            dtype = "F32" if expr.dtype in REQUANTISED else expr.dtype
            if orders and has_neurons(member):
                rows = [(_rows(m, cast(e, dtype), order), share) for (m, e), share, order in terms]
                mean = from_neuron_rows(member, Linear(tuple(rows), dtype))
            else:
                mean = Linear(tuple((cast(e, dtype), share) for (_, e), share, _ in terms), dtype)
            merged.append((member, cast(mean, expr.dtype)))
        return merged

    def _stacked(self, member: BlockTensor, experts: list[Expr]) -> Expr:
        """Return the new experts of a stacked tensor together again; unchanged ones in a row are one byte range."""
        if all(len(group) == 1 for group in self.groups):
            return along_experts(self.block, member, self.tensors[member.name], self.dominant)
        return restacked_experts(member, experts)

    def _along(self, member: BlockTensor) -> Expr:
        """Return a router tensor: the entries of the dominant members, the means of all, or fitted ones."""
        expr = self.tensors[member.name]
        if is_expert_table(member):
            place = {expert: number for number, group in enumerate(self.groups) for expert in group}
            order = [place[expert] for expert in range(self.block.experts)]
            return remapped_table(self.block, member, self.tensors, self._along, order)
        if self.router == "dominant" or expr.dtype not in PLAIN_FLOATS:
            return along_experts(self.block, member, expr, self.dominant)
        if self.router == "lse" and member.role not in ("router", "router_bias"):
            chosen = self._highest(member.name, expr) if member.role == "correction_bias" else self.dominant
            return along_experts(self.block, member, expr, chosen)
        axis = member.axis or 0
        length, before, rest = expr.shape[axis], expr.shape[:axis], expr.shape[axis + 1 :]
        if element_count(before) != 1:
            raise RefusedError(
                f"{NAME}: {member.name} has its experts along axis {axis} of {list(expr.shape)}",
                "use --router dominant",
            )
        flat = reshape(expr, (length, *rest))
        rows = [self._row(member, flat, number) for number in range(len(self.groups))]
        if length > self.block.experts:  # entries after the experts stay
            rows.append(Slice(flat, self.block.experts, length))
        joined = concat(rows)
        return reshape(joined, (*before, *joined.shape))

    def _row(self, member: BlockTensor, flat: Expr, number: int) -> Expr:
        """Return the entry of one new expert in a router tensor whose first axis is that of the experts."""
        group, shares = self.groups[number], self.shares[number]
        if len(group) == 1:
            return Slice(flat, group[0], group[0] + 1)
        if self.router == "lse" and self.fits is not None:
            row = self.fits.row(self.block.where, member.role, number)
            if row.shape[1:] != flat.shape[1:]:
                raise RefusedError(
                    f"{NAME}: {member.name} has rows of {list(flat.shape[1:])}, the fit of {list(row.shape[1:])}",
                    "make the fit again with --text FILE",
                )
            return cast(row, flat.dtype)
        return Linear(tuple((Slice(flat, e, e + 1), share) for e, share in zip(group, shares, strict=True)), flat.dtype)

    def _highest(self, name: str, bias: Expr) -> list[int]:
        """Return the member of each group with the highest selection bias: a group is chosen where any of them was."""
        values = finite_values(name, bias).reshape(-1)
        return [max(group, key=lambda e: values[e]) for group in self.groups]


def _rows(member: BlockTensor, expr: Expr, order: Expr | None) -> Expr:
    rows = neuron_rows(member, expr)
    return rows if order is None else Reordered(rows, order)
