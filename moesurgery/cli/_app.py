"""All commands, in the order in which `--help` shows them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from moesurgery._version import __version__
from moesurgery.cli._help import GroupedCommands, command_class, in_words
from moesurgery.recipe.registry import BUILT_IN, MTP_VERBS, find_operation, operations

# The module of this package where each command is; the operations stand between the two.
_LOOKING = {"count-params": "count_params", "inspect": "inspect", "families": "families"}
_OTHERS = {
    "fit": "fit",
    "merge": "merge",
    "extract-lora": "extract_lora",
    "run": "recipes",
    "finish": "finish",
    "pack": "pack",
    "push": "push",
    "perplexity": "perplexity",
    "compare": "compare",
    "validate": "validate",
    "diff": "diff",
    "collect": "collect",
    "probe": "probe",
    "keep-list": "keep_list",
    "schema": "recipes",
    "recipes": "recipes",
    "mtp": "mtp",
}
_WITH_COMMANDS = ("recipes", "mtp")  # of commands of their own
_MODULES = {**_LOOKING, **_OTHERS}


def app(first: str = "") -> typer.Typer:
    """Return the application: all of it, or with the one command that is its `first` argument.

    Importing every command takes longer than a small job does.
    """
    made = typer.Typer(
        cls=GroupedCommands,
        help="Surgery on Mixture-of-Experts checkpoints. No model is ever loaded to edit it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich help forces ANSI codes into CI logs
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    made.callback()(_root)
    known = first in BUILT_IN or first in _MODULES
    for name in [first] if known else [*_LOOKING, *_named_operations(), *_OTHERS]:
        if name in _WITH_COMMANDS:
            made.add_typer(getattr(import_module(f"moesurgery.cli.{name}"), f"{name}_app"), name=name)
        else:
            own = find_operation(name).parameters if name not in _MODULES else ()
            made.command(name, cls=command_class(own))(in_words(_function(name)))
    return made


def _named_operations() -> list[str]:
    """Return the operations that are commands of their own; those of prediction layers are commands of `mtp`."""
    return [name for name in operations() if not name.startswith(MTP_VERBS)]


def _function(name: str) -> Callable[..., Any]:
    if name not in _MODULES:
        from moesurgery.cli._operations import command_for

        return command_for(find_operation(name))
    function: Callable[..., Any] = getattr(
        import_module(f"moesurgery.cli.{_MODULES[name]}"), f"{name.replace('-', '_')}_command"
    )
    return function


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moesurgery {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
