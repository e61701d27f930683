"""Write a repair into a model: factors on experts' outputs, or fitted down-projections.

The repair itself is made by running the original and the edited model side by side (`measure.refit`); what is
written is an ordinary checkpoint of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import MoeBlock
from moesurgery.plan.elementwise import cast
from moesurgery.plan.expr import Expr
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.surgery.neurons import expert_tensors, from_neuron_rows, restacked
from moesurgery.surgery.operation import operation
from moesurgery.surgery.parameters import Param
from moesurgery.surgery.scaling import scaled_output

_NAME = "refit"


@operation(_NAME)
def refit(
    plan: Plan,
    *,
    repair: Annotated[str, Param("repair that --refit of another command made", metavar="FOLDER")],
) -> Plan:
    """Write a least-squares repair into the experts of an edited model.

    `--refit scalar|expert|down` of other commands makes the repair and adds this step; by itself it applies one that
    is there already.
    """
    from moesurgery.measure.repair import open_repair

    anatomy = plan.anatomy
    anatomy.require_family(_NAME)
    found = open_repair(repair)
    blocks = {block.where: block for block in anatomy.main_blocks}
    if odd := sorted(blocks.keys() ^ found.layers.keys()):
        where = "model" if odd[0] in blocks else "repair"
        raise RefusedError(f"{_NAME}: {odd[0]} is in the {where} only", "the repair is that of another model")
    changed: dict[str, Expr] = {}
    rows = []
    skipped = 0
    for where, block in blocks.items():
        layer = found.layers[where]
        if layer["factors"] is not None:
            _check_count(block, len(layer["factors"]))
            changed |= scaled_output(block, plan.tensors, layer["factors"])
            fitted = len(set(layer["factors"]))
        else:
            _check_count(block, len(layer["tokens"]))
            down = found.down(where)
            changed |= _with_down(block, plan.tensors, down)
            fitted = len(down)
        skipped += len(layer["skipped"])
        rows.append((where, str(fitted), f"{layer['error_before']:.4f}", f"{layer['error_after']:.4f}"))
    kind = found.about["kind"]
    notes = []
    if skipped:
        notes.append(f"{skipped} experts saw too few tokens and stay as they are; more text reaches them")
    step = Step(
        _NAME,
        {"repair": repair},
        f"{len(changed)} tensors repaired by least squares ({kind}, {found.about['tokens']:,} tokens)",
        report={**found.about, "layers": list(found.layers.values())},
        notes=tuple(notes),
        tables=(Table(("layer", "fitted", "error before", "error after"), tuple(rows)),),
    )
    return plan.edited(step, tensors=plan.with_tensors(changed))


def _check_count(block: MoeBlock, count: int) -> None:
    if count != block.experts:
        raise RefusedError(
            f"{_NAME}: {block.where} has {block.experts} experts, the repair {count}",
            "the repair is that of another edit",
        )


def _with_down(block: MoeBlock, tensors: Mapping[str, Expr], down: Mapping[int, Expr]) -> dict[str, Expr]:
    """Return the down-projections of a block with those of some experts replaced; `down` has them as [I, H]."""
    changed: dict[str, Expr] = {}
    experts: dict[str, list[Expr]] = {}
    for expert in range(block.experts):
        for member, expr in expert_tensors(block, tensors, expert):
            if member.role != "down" or member.stem.bias:
                continue
            if expert in down:
                if tensors[member.name].dtype not in PLAIN_FLOATS:
                    raise RefusedError(f"{_NAME}: {member.name} is quantised", "dequantise it first")
                fitted = cast(from_neuron_rows(member, down[expert]), expr.dtype)
                if fitted.shape != expr.shape:
                    raise RefusedError(
                        f"{_NAME}: {member.name} is {list(expr.shape)} for an expert, the repair {list(fitted.shape)}"
                    )
                expr = fitted
            if member.expert is not None:
                if expert in down:
                    changed[member.name] = expr
            else:
                experts.setdefault(member.name, []).append(expr)
    for member in block.named("down"):
        if member.name in experts and down:
            changed[member.name] = restacked(member, experts[member.name])
    return changed
