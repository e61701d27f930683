"""Write a repair into a model: factors on experts' outputs, or fitted matrices.

The repair itself is made by running the original and the edited model side by side (`fitting.layer_fit`); what is
written is an ordinary checkpoint of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.layouts import as_stored
from moesurgery.moe.neurons import expert_tensors, restacked_experts
from moesurgery.moe.scaling import by_scales_or_weights, scaled_output
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.requantise import with_experts_opened
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.requantize import WrittenBack

if TYPE_CHECKING:
    from moesurgery.stats.repair_file import Repair

_NAME = "refit"
_HEADER = ("layer", "fitted", "error before", "after", "on held-out windows")


@operation(_NAME)
def refit(
    plan: Plan,
    *,
    repair: Annotated[str, Param("repair that --refit of another command made", metavar="FOLDER", reads="file")],
    requantize: WrittenBack = "as-source",
) -> Plan:
    """Write a least-squares repair into the experts of an edited model.

    `--refit scalar|expert|router|down|all` of other commands makes the repair and adds this step; by itself it applies
    one that is there already.
    """
    from moesurgery.stats.repair_file import open_repair

    opened_repair = open_repair(repair)

    def edit(plan: Plan) -> Plan:
        return _repaired(plan, repair, opened_repair)

    if all(layer["factors"] is not None for layer in opened_repair.layers.values()):
        return by_scales_or_weights(plan, requantize, edit)
    return with_experts_opened(plan, requantize, edit)


def _repaired(plan: Plan, repair: str, opened_repair: Repair) -> Plan:
    anatomy = plan.anatomy
    anatomy.require_family(_NAME)
    if opened_repair.about["kind"] == "neurons":
        raise RefusedError(f"{_NAME}: {repair} says which neurons stay", "it is for `slim-experts --fit`")
    blocks = {block.where: block for block in anatomy.main_blocks}
    if odd := sorted(blocks.keys() ^ opened_repair.layers.keys()):
        where = "model" if odd[0] in blocks else "repair"
        raise RefusedError(f"{_NAME}: {odd[0]} is in the {where} only", "the repair is that of another model")
    changed: dict[str, Expr] = {}
    rows = []
    skipped = 0
    for where, block in blocks.items():
        layer = opened_repair.layers[where]
        if layer["factors"] is not None:
            _check_count(block, len(layer["factors"]))
            changed |= scaled_output(block, plan.tensors, layer["factors"])
            fitted = len(set(layer["factors"]))
        else:
            _check_count(block, len(layer["tokens"]))
            matrices = opened_repair.matrices(where)
            changed |= with_matrices(block, plan.tensors, matrices)
            router, bias = opened_repair.router(where), opened_repair.bias(where)
            if router is not None:
                changed |= _with_router(block, plan.tensors, router, block.router)
            if bias is not None:
                changed |= _with_router(block, plan.tensors, bias, next(iter(block.named("correction_bias")), None))
            fitted = len(matrices) or int(router is not None) + int(bias is not None)
        skipped += len(layer["skipped"])
        held_out = layer.get("error_held_out")
        errors = (layer["error_before"], layer["error_after"], *([] if held_out is None else [held_out]))
        rows.append((where, str(fitted), *(f"{error:.4f}" for error in errors)))
    kind = opened_repair.about["kind"]
    notes = []
    if skipped:
        notes.append(f"{skipped} experts saw too few tokens and stay as they are; more text reaches them")
    step = Step(
        _NAME,
        {"repair": repair},
        f"{len(changed)} tensors repaired by least squares ({kind}, {opened_repair.about['tokens']:,} tokens)",
        report={**opened_repair.about, "layers": list(opened_repair.layers.values())},
        notes=tuple(notes),
        tables=(
            Table(("layer", "fitted", "error before", "after", "on held-out windows")[: len(rows[0])], tuple(rows)),
        ),
    )
    return plan.edited(step, tensors=plan.with_tensors(changed))


def _check_count(block: MoeBlock, count: int) -> None:
    if count != block.experts:
        raise RefusedError(
            f"{_NAME}: {block.where} has {block.experts} experts, the repair {count}",
            "the repair is that of another edit",
        )


def with_matrices(
    block: MoeBlock, tensors: Mapping[str, Expr], fitted: Mapping[int, Mapping[str, Expr]]
) -> dict[str, Expr]:
    """Return the changed tensors of a block, some experts having fitted matrices [out, in] by role.

    Raises RefusedError where one is quantised, or of another shape.
    """
    changed: dict[str, Expr] = {}
    stacked: dict[str, list[Expr]] = {}
    for expert in range(block.experts):
        matrices = fitted.get(expert, {})
        for member, expr in expert_tensors(block, tensors, expert):
            assert member.part is not None
            new = expr
            if not member.stem.bias and ("gate" if member.role == "gate_up" else member.role) in matrices:
                new = _fitted(member, expr, as_stored(member.part, matrices))
                changed[member.name] = new
            if member.expert is None:
                stacked.setdefault(member.name, []).append(new)
    return changed | {
        m.name: restacked_experts(m, stacked[m.name]) for m in block.members if m.name in changed.keys() & stacked
    }


def _with_router(
    block: MoeBlock, tensors: Mapping[str, Expr], fitted: Expr, member: BlockTensor | None
) -> dict[str, Expr]:
    """Return the changed router of a block, or its changed selection bias."""
    if member is None:
        raise RefusedError(
            f"{_NAME}: {block.where}: its router is not one matrix, or has no selection bias",
            "the repair is that of another model",
        )
    return {member.name: _fitted(member, tensors[member.name], fitted)}


def _fitted(member: BlockTensor, stored: Expr, new: Expr) -> Expr:
    """Return a fitted matrix in the dtype that it is stored in."""
    if new.shape != stored.shape:
        raise RefusedError(
            f"{_NAME}: {member.name} is {list(stored.shape)} in the model, {list(new.shape)} in the repair"
        )
    return cast(new, stored.dtype)
