"""All commands, in the order in which `--help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

import moesurgery
from moesurgery.cli import (
    collect,
    count_params,
    diff,
    extract_lora,
    families,
    inspect,
    merge,
    perplexity,
    probe,
    recipes,
    validate,
)
from moesurgery.cli.operations import command_for
from moesurgery.surgery.operation import operations

app = typer.Typer(
    help="Surgery on Mixture-of-Experts checkpoints. No model is ever loaded to edit it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help forces ANSI codes into CI logs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moesurgery {moesurgery.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("count-params")(count_params.count_params_command)
app.command("inspect")(inspect.inspect_command)
app.command("families")(families.families_command)
for _found in operations().values():
    app.command(_found.name)(command_for(_found))
app.command("merge")(merge.merge_command)
app.command("extract-lora")(extract_lora.extract_lora_command)
app.command("run")(recipes.run_command)
app.command("perplexity")(perplexity.perplexity_command)
app.command("compare")(perplexity.compare_command)
app.command("validate")(validate.validate_command)
app.command("diff")(diff.diff_command)
app.command("collect")(collect.collect_command)
app.command("probe")(probe.probe_command)
app.command("schema")(recipes.schema_command)
app.add_typer(recipes.recipes_app, name="recipes")
