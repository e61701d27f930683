"""What the commands that run models share: options, the model or recipe to run, and where its progress is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.cli._console import console
from moesurgery.fitting.reporter import Reporter
from moesurgery.plan.plan import Plan, plan_of

if TYPE_CHECKING:
    from moesurgery.forward.engine import Progress

ModelOrRecipe = Annotated[
    str, typer.Argument(help="A checkpoint (folder, hf://, URL), or a recipe of one never written.")
]
Texts = Annotated[
    list[Path], typer.Option("--text", help="Text or JSONL (text, or input_ids) to measure on; repeat for more.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Windows per file at most.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Draw the windows at random by this seed instead of the first ones.")
]
CalibrationTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens to run over, in equal parts from each file.")
]
CalibrationSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample of windows.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="What to compute in: float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, or cuda where there is a GPU.")]


@contextmanager
def _share_done(what: str, total: int) -> Iterator[Progress]:
    with console.progress(what, total, of_bytes=False) as control:
        yield control.progress


reporter = Reporter(console.note, _share_done)


def subject(reference: str) -> Plan:
    """Return the plan of a checkpoint, or of a recipe file, which is not written."""
    if reference.endswith((".yaml", ".yml")) and Path(reference).is_file():
        from moesurgery.merge.merge_recipe import load_any_recipe

        plan = load_any_recipe(reference).plan()
        for step in plan.steps:
            console.note(f"{reference}: {step.operation}: {step.summary}")
        return plan
    return plan_of(open_checkpoint(reference))
