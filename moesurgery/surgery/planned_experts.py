"""What a plan file says of a model's experts: read for one checkpoint, checked, and completed for prediction layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from moesurgery.errors import RefusedError
from moesurgery.plan.plan import Plan
from moesurgery.recipe.parameters import Param
from moesurgery.stats.plan_file import LayerPlan, PlanFile
from moesurgery.surgery.choose_experts import kept_by_router_rows

PlanOption = Annotated[
    str | None,
    Param(
        "a plan file: alone it is carried out; beside what chooses, the choice is written there",
        metavar="FILE",
        reads="file",
        option="--plan",
    ),
]


@dataclass(frozen=True)
class PlannedExperts:
    """The experts that a plan keeps in each block, in ascending order, and what is to be known and recorded of it."""

    kept: Mapping[str, list[int]]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    about: Mapping[str, Any]


def about_plan(file: PlanFile) -> dict[str, Any]:
    """Return what records say of a plan file: its digest, and what it says of itself."""
    return {
        "sha256": file.sha256,
        **{key: file.about[key] for key in ("model", "criterion", "text") if key in file.about},
    }


def other_command(file: PlanFile) -> str:
    """Return what to type where a plan is for another command, as a hint."""
    made_by = file.about.get("operation")
    return f"carry it out with `moesurgery {made_by} --plan {file.path}`" if made_by else "docs/plan-file.md"


def planned_layers(
    plan: Plan, operation: str, file: PlanFile, what: str
) -> tuple[dict[str, LayerPlan], tuple[str, ...]]:
    """Return what a plan says of each block, and warnings; every block that tokens go through must be named.

    `what` is the field of `LayerPlan` that the operation carries out. Raises RefusedError where a plan has none.
    """
    warning = file.check(plan, operation)
    by_block = file.by_block(plan.anatomy, operation)
    lacking = [where for where, entry in by_block.items() if getattr(entry, what) is None]
    if what == "keep":
        lacking = [where for where in lacking if by_block[where].drop is None]
    if lacking:
        raise RefusedError(f"{operation}: {file.path} has no {what} for {lacking[0]}", other_command(file))
    left_out = [block.where for block in plan.anatomy.main_blocks if block.where not in by_block]
    if left_out:
        raise RefusedError(
            f"{operation}: {file.path} says nothing of {', '.join(left_out)}", "name every layer that has experts"
        )
    return by_block, () if warning is None else (warning,)


def planned_experts(plan: Plan, operation: str, file: PlanFile) -> PlannedExperts:
    """Return the experts that a plan keeps. Prediction layers that it leaves out keep as many, by their router rows.

    Raises RefusedError where the plan is for another model or says nothing of what stays.
    """
    anatomy = plan.anatomy
    by_block, warnings = planned_layers(plan, operation, file, "keep")
    kept = {b.where: by_block[b.where].kept(b.experts) or [] for b in anatomy.blocks if b.where in by_block}
    others = [block for block in anatomy.blocks if block.where not in kept]
    notes = []
    if others:
        count = anatomy.experts - len(next(iter(kept.values())))
        kept |= {block.where: kept_by_router_rows(plan, block, count) for block in others}
        named = ", ".join(block.where for block in others)
        notes.append(f"{named}: not in the plan, so as many experts were chosen by their router rows")
    if any(entry.neurons for entry in by_block.values()):
        notes.append("the plan chooses neurons too, by the experts' numbers before this step")
    return PlannedExperts({b.where: kept[b.where] for b in anatomy.blocks}, tuple(notes), warnings, about_plan(file))
