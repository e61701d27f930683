"""What the steps of a plan decided: printed, drawn, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesurgery.cli._console import console
from moesurgery.cli._pictures import Panel, factors_of_rules, of_table, write_picture
from moesurgery.cli._writer_flags import WriterFlags
from moesurgery.plan.plan import Plan


def report_steps(plan: Plan, flags: WriterFlags) -> None:
    """Print what each step decided and why."""
    if flags.as_json or flags.quiet:
        return
    for step in plan.steps:
        console.result(f"{step.operation}: {step.summary}")
        for line in (*step.details, *step.notes):
            console.result(f"  {line}")
        for table in step.tables:
            console.result()
            console.table(table.header, table.rows, right=range(1, len(table.header)))
        if step.tables:
            console.result()


def steps_document(plan: Plan) -> list[dict[str, Any]]:
    """Return the steps as `--json` has them."""
    return [{"operation": s.operation, "summary": s.summary, "notes": s.notes, "report": s.report} for s in plan.steps]


def draw_steps(plan: Plan, path: Path | None) -> None:
    """Draw the tables of what each step decided."""
    if path is None:
        return
    panels: list[Panel] = []
    for step in plan.steps:
        if step.operation == "rescale" and "alternatives" in step.report:
            panels.append(factors_of_rules(step.report))
            continue
        titled = [(f"{step.operation}: {t.header[-1]} by {t.header[0]}", t) for t in step.tables]
        panels += [panel for title, t in titled if (panel := of_table(title, t.header, t.rows)) is not None]
    if not panels:
        console.warning(f"{path} is not written: no step decided numbers that could be drawn")
        return
    summary = "; ".join(step.summary for step in plan.steps)
    write_picture(path, f"{plan.checkpoint.name}: {', '.join(step.operation for step in plan.steps)}", summary, panels)
