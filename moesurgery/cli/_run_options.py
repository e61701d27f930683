"""What the commands that run models share: options, the model or recipe to run, and where its progress is shown."""

from __future__ import annotations

import os
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
    from moesurgery.forward.batch_passes import Progress

ModelOrRecipe = Annotated[
    str, typer.Argument(help="A checkpoint (folder, hf://, URL), or a recipe of one never written.")
]
TEXT_FORMS = (
    "text, JSONL or Parquet (messages, prompt and completion, text, input_ids), also hf://datasets/org/name/file"
)
Texts = Annotated[list[str], typer.Option("--text", help=f"What to measure on: {TEXT_FORMS}; repeat for more.")]
WeightedTexts = Annotated[
    list[str],
    typer.Option(
        "--text", help=f"{TEXT_FORMS[0].upper()}{TEXT_FORMS[1:]}; FILE=3 for three times the tokens; repeat for more."
    ),
]
Apart = Annotated[
    bool, typer.Option("--apart", help="Each document in windows of its own, so that none attends to another.")
]
AssistantOnly = Annotated[
    bool, typer.Option("--assistant-only", help="Only the assistant's tokens count in what is measured.")
]
Memory = Annotated[
    str, typer.Option("--memory", help="What to take of the device's memory: 40GB. By default what is free on a GPU.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Windows per file at most.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Draw the windows at random by this seed instead of the first ones.")
]
CalibrationTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens to run over, in parts from each file as its weight says.")
]
CalibrationSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample of windows.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="What to compute in: float32, bfloat16, float16; auto is bfloat16 on a GPU.")
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu; cuda:1 for one GPU; cuda for all that are seen."),
]
ScratchFolder = Annotated[
    Path | None,
    typer.Option("--scratch", help="Folder for the state between layers, where a killed run goes on. [OUT.scratch]"),
]


@contextmanager
def _share_done(what: str, total: int) -> Iterator[Progress]:
    with console.progress(what, total, of_bytes=False) as control:
        yield control.progress


@contextmanager
def _through_layers(what: str, tokens: int, layers: int) -> Iterator[Progress]:
    with console.layer_progress(what, tokens, layers) as control:
        yield control.progress


reporter = Reporter(console.note, _share_done, _through_layers)


def subject(reference: str) -> Plan:
    """Return the plan of a checkpoint, or of a recipe file, which is not written."""
    if reference.endswith((".yaml", ".yml")) and os.path.isfile(reference):
        from moesurgery.merge.merge_recipe import load_any_recipe

        plan = load_any_recipe(reference).plan()
        for step in plan.steps:
            console.note(f"{reference}: {step.operation}: {step.summary}")
        return plan
    plan = plan_of(open_checkpoint(reference))
    plan.checkpoint.refuse_gguf("llama.cpp runs those, transformers does not")
    return plan
