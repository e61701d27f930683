"""The options of operations that take statistics, `--text`, `--refit`, `--heldout` and others, and what they show.

All that they set off is `fitting.calibrate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from moesurgery.cli import _run_options
from moesurgery.cli._console import console
from moesurgery.cli._evidence import Evidence, evidence_of_edit
from moesurgery.cli._writer_flags import WriterFlags
from moesurgery.fitting.calibrate import CalibrationOptions, calibrate
from moesurgery.fitting.heldout import HeldOut
from moesurgery.plan.plan import Plan
from moesurgery.recipe.reader import Recipe
from moesurgery.recipe.registry import find_operation

_Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help=f"Collect the statistics first, on {_run_options.TEXT_FORMS}; FILE=3 for three times the tokens;"
        " repeat for more.",
    ),
]
_HeldOut = Annotated[
    list[str] | None,
    typer.Option("--heldout", help="Text to measure the outcome on; a quarter of --text is kept for it by default."),
]
_Refit = Annotated[
    str | None,
    typer.Option(
        "--refit",
        help="Repair the outcome by least squares on --text: none, scalar, expert, router, down or all."
        " [default: none; down for merge-experts]",
    ),
]
_Ridge = Annotated[
    str,
    typer.Option("--ridge", help="How strongly --refit is drawn to no change: a number, or auto, by held-out windows."),
]
_Sweeps = Annotated[
    int | None,
    typer.Option(
        "--sweeps", min=1, help="How often --refit down and all go over the experts. [default: 1 for down, 2 for all]"
    ),
]
_Limit = Annotated[int, typer.Option("--limit", min=1, help="Windows per file of --heldout at most.")]
_NoHeldOut = Annotated[bool, typer.Option("--no-heldout", help="Do not measure the outcome.")]

# By the names of the fields of `CalibrationOptions`, which has their defaults.
OPTIONS: dict[str, Any] = {
    "text": _Texts,
    "refit": _Refit,
    "ridge": _Ridge,
    "sweeps": _Sweeps,
    "heldout": _HeldOut,
    "limit": _Limit,
    "no_heldout": _NoHeldOut,
    "window": _run_options.Window,
    "tokens": _run_options.CalibrationTokens,
    "dtype": _run_options.DtypeOption,
    "device": _run_options.DeviceOption,
    "memory": _run_options.Memory,
    "apart": _run_options.Apart,
    "assistant_only": _run_options.AssistantOnly,
}
OPTIONS = {name: (option, getattr(CalibrationOptions, name)) for name, option in OPTIONS.items()}


def calibrated(recipe: Recipe, options: CalibrationOptions, flags: WriterFlags) -> tuple[Recipe, Plan, Evidence | None]:
    """Do with a recipe of one step what the options ask for, and show what it costs.

    Return the recipe with what was measured, its plan, and a report, where the outcome was measured.
    """
    (step,) = recipe.steps
    model, reporter = recipe.model or ".", _run_options.reporter
    edited = calibrate(
        model, step.operation, step.parameters, options, flags.folder, force=flags.force, reporter=reporter
    )
    recipe = replace(recipe, steps=edited.steps)
    if edited.heldout is None:
        return recipe, recipe.finished(edited.plan), None
    heading = find_operation(step.operation).text.heading
    if not (flags.as_json or flags.print_recipe):
        _show(edited.heldout, heading)
    return recipe, recipe.finished(edited.plan), evidence_of_edit(edited.plan, edited.heldout, heading)


def _show(measured: HeldOut, heading: str) -> None:
    """Print what the variants cost, the cheapest first."""
    nats = dict(measured.nats)
    base = nats.pop("original")
    rows = []
    for name, n in sorted(nats.items(), key=lambda item: item[1]):
        low, high = measured.intervals[name]
        taken = f"{name} (taken)" if name == measured.chosen else name
        rows.append((taken, f"{n:.4f}", f"{n - base:+.4f}", f"{low:+.4f} to {high:+.4f}"))
    console.table((heading, "held-out loss", "over the original", "95 % interval"), rows, right=(1, 2, 3))
    console.result(f"nats per token over {measured.tokens:,} predicted tokens; the original has {base:.4f}")
    console.result()
