"""How help reads: options in panels, commands in groups, values called by what they are."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo, OptionInfo

GROUPS: dict[str, tuple[str, ...]] = {
    "Look at a model": ("count-params", "inspect", "families"),
    "Fit a machine": ("fit",),
    "Edit experts": ("rescale", "drop-experts", "merge-experts", "slim-experts", "add-expert", "refit"),
    "Change the kind of model": ("upcycle", "to-dense", "tie-blocks", "mtp", "convert"),
    "Several models": ("merge", "extract-lora"),
    "Measure": ("perplexity", "compare", "collect", "probe"),
    "Check": ("validate", "diff"),
    "Recipes and plans": ("run", "pack", "finish", "push", "recipes", "schema", "keep-list"),
}
_OTHERS = "Others"

# The panel of an option by its name, unless an operation has a parameter of that name.
_PANELS: dict[str, tuple[str, ...]] = {
    "Text": (
        *("text", "apart", "assistant_only", "tokens", "window", "heldout", "no_heldout", "limit", "seed"),
        *("dtype", "device", "memory", "device_memory", "scratch"),
    ),
    "Repair": ("refit", "ridge", "sweeps"),
    "Output": (
        *("output", "force", "dry_run", "plan_only", "print_recipe", "max_shard_size", "link", "card", "no_fsync"),
        *("checksums", "part", "finish", "share_with", "scheduler", "upload_scratch"),
        *("validate", "jobs", "as_json", "quiet", "picture", "report", "reports", "report_format"),
    ),
}
_ORDER = ("Operation", "Options", *_PANELS, "Help")

# What a value is called, by the name of its parameter; by its type where that is not here.
_METAVARS = {
    **dict.fromkeys(("text", "heldout", "texts"), "FILE"),
    **dict.fromkeys(("window", "tokens", "context"), "TOKENS"),
    **dict.fromkeys(("files", "reports"), "FILE"),
    "output": "PATH",
    "max_shard_size": "SIZE",
    **dict.fromkeys(("memory", "device_memory", "memory_limit"), "SIZE"),
    **dict.fromkeys(("only", "keep", "forms"), "LIST"),
    "ridge": "NUMBER|auto",
    "dtype": "TYPE",
    "refit": "KIND",
    "ignore": "CODE",
    "report_format": "FORMAT",
}


def command_class(own: Collection[str]) -> type[TyperCommand]:
    """Return the class of a command; `own` are the parameters of its operation, none for other commands."""

    class PanelCommand(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            panels: dict[str, list[tuple[str, str]]] = {}
            for param in self.get_params(ctx):
                record = param.get_help_record(ctx)
                if record is not None:
                    if param.param_type_name == "argument":
                        record = (record[0].partition(" <")[0], record[1])  # Typer adds a type: `MODEL <str>`
                        panels.setdefault("Arguments", []).append(record)
                    else:
                        panels.setdefault(_panel(param.name or "", own), []).append(record)
            for title in ("Arguments", *_ORDER):
                if title in panels:
                    with formatter.section(title):
                        formatter.write_dl(panels[title])

    return PanelCommand


def _panel(name: str, own: Collection[str]) -> str:
    if name == "help":
        return "Help"
    if name in own:
        return "Operation"
    return next((title for title, names in _PANELS.items() if name in names), "Options")


class GroupedCommands(TyperGroup):
    """The application: its commands in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        known = {name: title for title, names in GROUPS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*GROUPS, _OTHERS)}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                text = command.get_short_help_str(limit=max(formatter.width - 6 - len("merge-experts"), 30))
                rows[known.get(name, _OTHERS)].append((name, text))
        for title, of_group in rows.items():
            if of_group:
                with formatter.section(title):
                    formatter.write_dl(of_group)


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give every value of a command's help a word that says what it is: `FILE`, not `<list[Path]>`."""
    hints = get_type_hints(function, include_extras=True)
    function.__annotations__ = hints  # where they are text, each evaluation would make new ones
    for name in inspect.signature(function).parameters:
        hint = hints.get(name)
        if get_origin(hint) is not Annotated:
            continue
        annotation, *extras = get_args(hint)
        for info in extras:
            if isinstance(info, OptionInfo | ArgumentInfo) and info.metavar is None:
                info.metavar = _metavar(name, annotation, argument=isinstance(info, ArgumentInfo))
    return function


def _metavar(name: str, annotation: Any, *, argument: bool) -> str | None:
    kinds = {inner for kind in _kinds(annotation) for inner in (get_args(kind) or (kind,))}
    if bool in kinds:
        return None
    if name in _METAVARS:
        return _METAVARS[name]
    if int in kinds:
        return "N"
    if float in kinds:
        return "NUMBER"
    return name.upper().replace("_", "-") if argument or str in kinds else "PATH" if Path in kinds else "VALUE"


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def completed(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what Typer asks for the words that begin with what is typed; `words` is called only then."""
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]
