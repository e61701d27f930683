"""`moesurgery merge`: several checkpoints into one, by a recipe of mergekit's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._operations import taking_flags
from moesurgery.cli._shipped_recipes import check_recipe_file
from moesurgery.cli._writer_flags import WriterFlags
from moesurgery.cli._writing import carry_out
from moesurgery.fitting.run_settings import check_device
from moesurgery.merge.compute.method import load_methods
from moesurgery.merge.merge_recipe import load_merge_recipe
from moesurgery.plan.requantise import Requantize


@taking_flags
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="A merge recipe, as for mergekit-yaml or mergekit-multi.")],
    flags: WriterFlags,
    methods: Annotated[
        list[Path] | None,
        typer.Option("--methods", metavar="FILE", help="A Python file with merge methods of your own; it is run."),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="Compute with torch, on cuda where there is a GPU, instead of numpy."),
    ] = "",
    requantize: Annotated[
        Requantize,
        typer.Option("--requantize", help="Quantised weights of the base: stored in its form, or as plain weights."),
    ] = "as-source",
) -> None:
    """Merge models of one architecture, dense or MoE, in one streamed pass.

    Takes mergekit's recipes as they are: docs/merge.md.
    """
    for file in methods or ():
        load_methods(file)
    if device:
        check_device(device)
    check_recipe_file(recipe)
    operation = load_merge_recipe(recipe)
    carry_out(replace(operation, max_shard_size=flags.shard_bytes, device=device, requantize=requantize), flags)
