"""`moesurgery keep-list`: a plan for programs that leave experts out while they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._console import console
from moesurgery.cli._help import completed
from moesurgery.errors import RecipeError
from moesurgery.recipe.registry import did_you_mean
from moesurgery.stats.plan_file import load_plan_file
from moesurgery.stats.pruning_list import READERS, keep_list
from moesurgery.whole_file import whole_file


def keep_list_command(
    plan: Annotated[Path, typer.Argument(help="A plan that --plan of drop-experts wrote.")],
    reader: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="READER",
            help=f"What is to read it: {', '.join(READERS)}. plain is the kept experts by layer.",
            autocompletion=completed(READERS.__iter__),
        ),
    ] = "plain",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output by default.")
    ] = None,
) -> None:
    """Print a plan as engines take it that prune while loading, so that no pruned copy need be stored.

    docs/plan-file.md says which program reads which, and since when.
    """
    if reader not in READERS:
        raise RecipeError(f"--for {reader}: unknown", did_you_mean(reader, READERS) or f"known: {', '.join(READERS)}")
    text, notes = keep_list(load_plan_file(plan), reader)
    if output is None:
        console.result(text.rstrip("\n"))
    else:
        with whole_file(output) as new:
            new.write_text(text, encoding="utf-8")
    for note in notes:
        console.note(note)
