"""`moesurgery run`, `schema` and `recipes`: recipes from YAML files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._console import console
from moesurgery.cli._exit_codes import ANSWER_IS_NO
from moesurgery.cli._help import completed
from moesurgery.cli._operations import taking_flags
from moesurgery.cli._shipped_recipes import check_recipe_file, shipped_recipes
from moesurgery.cli._writer_flags import WriterFlags, check_early
from moesurgery.cli._writing import carry_out, print_recipe
from moesurgery.errors import RecipeError
from moesurgery.merge.merge_recipe import load_any_recipe
from moesurgery.patch.patch_file import PATCH
from moesurgery.recipe.reader import load_recipe, recipe_schema
from moesurgery.recipe.registry import did_you_mean
from moesurgery.stats.plan_file import plan_file_schema

recipes_app = typer.Typer(
    help="List and show the recipes that ship with moesurgery; check your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@taking_flags
def run_command(
    recipe: Annotated[str, typer.Argument(help="A recipe file (see `moesurgery recipes ls`), or a patch.")],
    flags: WriterFlags,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[NAME=]MODEL",
            help="Use this model instead of the recipe's; repeat for a patch of a merge.",
        ),
    ] = None,
) -> None:
    """Carry out a recipe: several operations, one pass, one output. Or a patch, and get its publisher's bytes."""
    if "://" in recipe or os.path.exists(os.path.join(recipe, PATCH)):
        _run_patch(recipe, model or [], flags)
        return
    check_recipe_file(Path(recipe))
    loaded = load_recipe(recipe)
    if model:
        if len(model) > 1:
            raise RecipeError("a recipe edits one model", "give --model once; merges have a command of their own")
        loaded = replace(loaded, model=model[0], model_line=0)
    if flags.shard_bytes is not None:
        loaded = replace(loaded, max_shard_size=flags.shard_bytes)
    carry_out(loaded, flags)


def _run_patch(reference: str, models: list[str], flags: WriterFlags) -> None:
    """Write what a patch makes of the user's models, and nothing else."""
    from moesurgery.patch.run_patch import open_patch

    refused = {"--max-shard-size": flags.max_shard_size, "--card": flags.card, "--part": flags.part}
    if flags.store is not None:
        raise RecipeError("a patch is applied to a folder, where its files are compared", "then: moesurgery push")
    for option, given in refused.items():
        if given:
            raise RecipeError(f"{option} is not for a patch, which gives its publisher's bytes", "leave it out")
    if flags.print_recipe:
        print_recipe(open_patch(reference), as_json=flags.as_json)
        return
    if not models:
        raise RecipeError(f"{reference} is a patch, and needs the model that it was made from", "give it with --model")
    console.quiet = flags.quiet
    check_early(flags)
    opened = open_patch(reference)
    output = flags.folder or Path(f"{Path(reference.rstrip('/')).name}-applied")
    folder = Path(f"{output}.patch-files")
    with console.progress(f"checking {', '.join(models)}", opened.bytes_checked) as watch:
        plan = opened.plan_on(models, folder, watch.progress)
    carry_out(None, replace(flags, output=str(output)), plan=plan, promise=opened.promise)
    if folder.exists() and not flags.dry_run:
        shutil.rmtree(folder)


def schema_command(
    plan: Annotated[bool, typer.Option("--plan", help="The schema of plan files instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, or of plan files, for editors and CI."""
    console.json(plan_file_schema() if plan else recipe_schema())


@recipes_app.command("ls")
def list_command() -> None:
    """List the recipes with what each does."""
    rows = []
    for name, text in shipped_recipes().items():
        comments = [
            line[2:] for line in text.splitlines() if line.startswith("# ") and "yaml-language-server" not in line
        ]
        rows.append((name, comments[0] if comments else ""))
    console.table(("recipe", "what it does"), rows)


@recipes_app.command("show")
def show_command(
    name: Annotated[
        str,
        typer.Argument(
            help="A name from `moesurgery recipes ls`.", metavar="NAME", autocompletion=completed(shipped_recipes)
        ),
    ],
) -> None:
    """Print a recipe, to be saved and edited."""
    known = shipped_recipes()
    if name not in known:
        raise RecipeError(f"there is no recipe {name!r}", did_you_mean(name, known) or f"known: {', '.join(known)}")
    console.result(known[name].rstrip())


@recipes_app.command("check")
def check_command(files: Annotated[list[Path], typer.Argument(help="Recipe files.", metavar="FILE...")]) -> None:
    """Say whether recipes can be carried out, as far as that is seen without a model; exit 1 where one cannot."""
    wrong = 0
    for file in files:
        try:
            load_any_recipe(file)
        except RecipeError as error:
            wrong += 1
            console.result(error.message)
    if wrong:
        raise typer.Exit(ANSWER_IS_NO)
    console.result(f"{len(files)} recipes, nothing wrong")
