"""Append experts of another checkpoint, with their router rows, after those that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.expr.tensors import take, transpose
from moesurgery.families.anatomy import Anatomy, BlockTensor
from moesurgery.families.quantisation_settings import names_experts
from moesurgery.families.quantised import quantisation_config
from moesurgery.moe.canonical_names import CanonicalName, CanonicalTensors
from moesurgery.moe.expert_axis import Entries, refuse_strays
from moesurgery.moe.expert_counts import check_blocks, with_expert_count
from moesurgery.moe.expert_table import is_expert_table
from moesurgery.plan.plan import Plan, Step, plan_of
from moesurgery.plan.side_files import quantisation_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation

_NAME = "add-expert"


@operation(_NAME)
def add_expert(
    plan: Plan,
    *,
    source: Annotated[str, Param("the model that the experts come from, of the same family and sizes", reads="model")],
    experts: Annotated[list[int] | None, Param("their numbers in it, as 0,3; all by default")] = None,
) -> Plan:
    """Append experts of another model to every MoE layer, with their router rows.

    Both models may be per expert or fused. Top-k stays: the new experts compete with the old ones, row against row.
    Only byte ranges are copied where dtypes agree.
    """
    anatomy = plan.anatomy
    family = anatomy.require_family(_NAME)
    total = check_blocks(anatomy, _NAME)
    if reason := family.refuses.get("drop-experts"):
        raise RefusedError(f"{_NAME}: {family.name}: {reason}")
    other = plan_of(open_checkpoint(source))
    other.checkpoint.refuse_gguf("experts are taken from safetensors")
    _check_alike(anatomy, other.anatomy)
    there = check_blocks(other.anatomy, _NAME)
    chosen = list(range(there)) if experts is None else experts
    for number in chosen:
        if not 0 <= number < there:
            raise RecipeError(f"{_NAME}: {other.checkpoint.name} has no expert {number}: it has 0 to {there - 1}")
    if not chosen:
        raise RecipeError(f"{_NAME}: experts is empty", "name one, as in --experts 0")
    if anatomy.settings.groups is not None:
        raise RefusedError(
            f"{_NAME}: the router of {family.name} scores experts in {anatomy.settings.groups[0]} groups by their"
            " numbers: more experts would move the old ones to other groups"
        )
    if family.zero_experts and anatomy.settings.integer((family.zero_experts,)):
        raise RefusedError(f"{_NAME}: the identity experts of {family.name} have the numbers after the last expert's")
    if len({(block.root, block.container) for block in anatomy.main_blocks}) > 1:
        raise RefusedError(f"{_NAME}: {family.name} has experts in two stacks, and the source's cannot be told apart")
    _refuse_named_experts(plan)
    joined = _Joined(
        CanonicalTensors(plan, plan.checkpoint.name), CanonicalTensors(other, other.checkpoint.name), chosen, total
    )
    entries: Entries = {}
    for block in anatomy.blocks:
        refuse_strays(block, plan.tensors)
        for member in block.members:
            if member.quantised_router:
                raise RefusedError(
                    f"{_NAME}: {member.name} is part of a quantised router, which takes no rows of another",
                    "dequantise both first with `moesurgery convert --dequantize`",
                )
            entries[member.name] = joined.entries(member)
    tensors, shard_of = plan.substituted(entries)
    step = Step(
        _NAME,
        {"source": source, **({"experts": chosen} if experts is not None else {})},
        f"experts {', '.join(map(str, chosen))} of {other.checkpoint.name} appended in each of {len(anatomy.blocks)}"
        f" layers: {total} to {total + len(chosen)}",
        report={"experts": total + len(chosen), "old_experts": total, "from": other.checkpoint.name, "added": chosen},
        notes=("router rows of two models were not trained against each other: measure, or train the router",),
        parents={source: (other.checkpoint,)},
    )
    config = with_expert_count(anatomy, total + len(chosen), {})
    edited = plan.edited(step, tensors=tensors, shard_of=shard_of, config=config)
    return replace(edited, sources=(*plan.sources, other.checkpoint))


def _refuse_named_experts(plan: Plan) -> None:
    """Refuse where quantisation settings list experts one by one: they would say nothing of the new ones."""
    settings = [("config.json: quantization_config", quantisation_config(plan.config))]
    for file, content in (*settings, *quantisation_files(plan.checkpoint, plan.files)):
        if (named := names_experts(content)) is not None:
            raise RefusedError(
                f"{_NAME}: {file} names {named}: such a list would say nothing of the new experts",
                "name experts there by one expression for all, or dequantise first with `moesurgery convert"
                " --dequantize`",
            )


def _check_alike(anatomy: Anatomy, other: Anatomy) -> None:
    if other.model_type != anatomy.model_type:
        raise RefusedError(f"{_NAME}: this is a {anatomy.model_type}, the source of experts a {other.model_type}")
    mine, yours = ([b.where for b in a.blocks] for a in (anatomy, other))
    if mine != yours:
        raise RefusedError(f"{_NAME}: the two models do not have experts in the same layers")


class _Joined:
    """Tensors of one model with the experts `chosen` of another after their `total` ones."""

    def __init__(self, ours: CanonicalTensors, theirs: CanonicalTensors, chosen: Sequence[int], total: int) -> None:
        self.ours, self.theirs, self.chosen, self.total = ours, theirs, chosen, total

    def entries(self, member: BlockTensor) -> list[tuple[str, Expr]]:
        """Return what takes the place of a tensor: itself with more entries, or with more tensors after it."""
        expr = self.ours.plan.tensors[member.name]
        holder = self.ours.tensors[member.name]
        if is_expert_table(member):
            return [(member.name, expr)]
        if member.part is None:
            return [(member.name, self._along(member, expr, holder.layer, holder.paths[0]))]
        if member.expert is None:
            if len(holder.paths) % self.total or (holder.split is None and self.total > 1):
                raise RefusedError(f"{member.name}: it is not known which part belongs to which expert")
            each = len(holder.paths) // self.total
            added = [self._part(member, holder.layer, p, e) for e in self.chosen for p in holder.paths[:each]]
            split = holder.split or added[0].shape
            whole = reshape(expr, (len(holder.paths) * split[0], *split[1:]))
            count = expr.shape[0] // self.total * (self.total + len(self.chosen))
            return [(member.name, reshape(concat([whole, *added]), (count, *expr.shape[1:])))]
        if member.expert != self.total - 1:
            return [(member.name, expr)]
        new = [
            (member.renumbered(self.total + n), self._part(member, holder.layer, holder.paths[0], e))
            for n, e in enumerate(self.chosen)
        ]
        return [(member.name, expr), *new]

    def _part(self, member: BlockTensor, layer: int | None, path: str, expert: int) -> Expr:
        """Return the part that is `path` for one expert, of the other model's expert `expert`."""
        head, _, rest = path.partition("experts.")
        key = CanonicalName(layer, f"{head}experts.{expert}.{rest.split('.', 1)[1]}")
        if key not in self.theirs.stored_in:
            raise RefusedError(f"{_NAME}: {self.theirs.label} has nothing that fits {member.name}")
        return self._alike(member, self.theirs.part(key))

    def _along(self, member: BlockTensor, expr: Expr, layer: int | None, path: str) -> Expr:
        key = CanonicalName(layer, path)
        if key not in self.theirs.stored_in:
            raise RefusedError(f"{_NAME}: {self.theirs.label} has nothing that fits {member.name}")
        theirs = self._alike(member, self.theirs.part(key))
        if member.axis == 1:
            return transpose(concat([transpose(expr), take(transpose(theirs), list(self.chosen))]))
        rows = take(theirs, list(self.chosen))
        after = [Slice(expr, self.total, expr.shape[0])] if expr.shape[0] > self.total else []
        return concat([Slice(expr, 0, self.total), rows, *after])

    def _alike(self, member: BlockTensor, expr: Expr) -> Expr:
        """Return the other model's expression in the dtype of ours; refuse another shape."""
        ours = self.ours.plan.tensors[member.name]
        part = self.ours.tensors[member.name].split or ours.shape
        axis = member.axis or 0
        elsewhere = [s[:axis] + s[axis + 1 :] for s in (expr.shape, part)]
        same = elsewhere[0] == elsewhere[1] and (member.part is None or expr.shape == part)
        if not same or (expr.dtype != ours.dtype and not {expr.dtype, ours.dtype} <= PLAIN_FLOATS):
            raise RefusedError(
                f"{_NAME}: {member.name} takes {ours.dtype} {list(part)}, {self.theirs.label} has {expr.dtype}"
                f" {list(expr.shape)}"
            )
        return cast(expr, ours.dtype)
