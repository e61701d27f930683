"""`moesurgery validate`: is a checkpoint right, and not merely loadable?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moesurgery.checkpoint.finding import Severity
from moesurgery.checkpoint.source_address import open_source
from moesurgery.cli._common_options import Json, Model, Quiet
from moesurgery.cli._console import console
from moesurgery.cli._exit_codes import ANSWER_IS_NO
from moesurgery.errors import OutputError, RecipeError
from moesurgery.families.clients import CLIENTS
from moesurgery.recipe.registry import did_you_mean
from moesurgery.validate.codes import LEVELS, Level
from moesurgery.validate.report import Report
from moesurgery.validate.report_formats import BY_SUFFIX, FORMATS, markdown
from moesurgery.validate.run_checks import validate_checkpoint

SUMMARY = "GITHUB_STEP_SUMMARY"
_MOST_SUMMARY = 1 << 20
_FAIL_ON: tuple[Severity, ...] = ("error", "warning", "note")


def validate_command(
    model: Model = ".",
    level: Annotated[
        str | None,
        typer.Option("--level", help=f"How far to look: {', '.join(LEVELS)}; each includes those before. [values]"),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="[NAME=]MODEL",
            help="The model this was made from, or one of those that were merged: replay moesurgery.json on them."
            " May be repeated; NAME is what moesurgery.json calls it.",
        ),
    ] = None,
    methods: Annotated[
        list[Path] | None,
        typer.Option(
            "--methods",
            metavar="FILE",
            help="With --against: a Python file with merge methods that it used; it is run.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0.0, help="With --against: the KL in nats that forward allows.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option("--for", metavar="CLIENT", help=f"Whether a program can read it: {', '.join(CLIENTS)}."),
    ] = None,
    report_format: Annotated[
        str, typer.Option("--format", help="What to print: text, json, junit, sarif or github.")
    ] = "text",
    reports: Annotated[
        list[Path] | None,
        typer.Option(
            "--report", help="Write a report too: .txt, .json, .xml (JUnit), .sarif, .md or .html. May be repeated."
        ),
    ] = None,
    fail_on: Annotated[str, typer.Option("--fail-on", help="Exit 1 from this on: error, warning or note.")] = "error",
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="CODE", help="Leave out a code. May be repeated.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether a checkpoint is right, and not merely loadable.

    Every finding has a stable code: docs/codes.md lists them. What could not be checked is listed too. Nothing
    is unpickled, no code that comes with a model is imported, no path out of it is followed.
    """
    console.quiet = quiet
    report_format = "json" if as_json else _one_of("--format", report_format, FORMATS)
    severity: Severity = _one_of("--fail-on", fail_on, _FAIL_ON)  # type: ignore[assignment]
    chosen: Level | None = _one_of("--level", level, LEVELS) if level is not None else None  # type: ignore[assignment]
    if client is not None:
        _one_of("--for", client, CLIENTS)
    for path in reports or ():
        if path.suffix not in BY_SUFFIX:
            raise RecipeError(f"--report {path}: no format is known by that suffix", f"known: {', '.join(BY_SUFFIX)}")
    if methods:
        from moesurgery.merge.compute.method import load_methods

        for file in methods:
            load_methods(file)
    with console.progress("reading weights", _bytes_to_read(model, chosen, len(against or ()))) as watch:
        report = validate_checkpoint(
            model,
            level=chosen,
            against=against or (),
            tolerance=tolerance,
            ignore=tuple(ignore or ()),
            client=client,
            progress=watch.progress,
        )
    write_reports(report, report_format, reports or ())
    if report.failed(severity):
        raise typer.Exit(ANSWER_IS_NO)


def _bytes_to_read(model: str, level: Level | None, parents: int) -> int:
    """Return how many bytes of weights will be read, for the progress bar; 0 for levels that read headers alone."""
    if level in ("container", "config") or "://" in model:
        return 0
    sizes = open_source(model).files()
    weights = sum(size for file, size in sizes.items() if file.endswith((".safetensors", ".gguf")))
    return weights * (2 if parents else 1)


def write_reports(report: Report, report_format: str = "text", files: list[Path] | tuple[Path, ...] = ()) -> None:
    """Print a report in one format, and write it in others."""
    console.result(FORMATS[report_format](report))
    for path in files:
        _write(path, BY_SUFFIX[path.suffix](report), "w")
    summary = os.environ.get(SUMMARY)
    if report_format == "github" and summary:
        _write(Path(summary), markdown(report)[:_MOST_SUMMARY], "a")


def _write(path: Path, text: str, mode: str) -> None:
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def _one_of(option: str, value: str, known: object) -> str:
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise RecipeError(f"{option} {value}: unknown", did_you_mean(value, names) or f"known: {', '.join(names)}")
    return value
