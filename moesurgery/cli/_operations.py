"""A command for every operation, made from its signature: `moesurgery rescale MODEL --top-k 3`."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from moesurgery.cli._calibrated import OPTIONS, calibrated
from moesurgery.cli._common_options import Model
from moesurgery.cli._console import console
from moesurgery.cli._evidence import ReportKinds, check_reports
from moesurgery.cli._help import completed
from moesurgery.cli._step_report import report_steps
from moesurgery.cli._writer_flags import WriterFlags, check_early
from moesurgery.cli._writing import carry_out
from moesurgery.errors import RecipeError
from moesurgery.fitting.calibrate import CalibrationOptions, needs_run
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.parameters import Parameter, from_text, kinds_of, literals_of, words_of
from moesurgery.recipe.reader import Recipe, RecipeStep, load_recipe
from moesurgery.recipe.registry import Operation, problems

_PLAN_FILE = "plan_file"  # the parameter of operations that choose, as `--plan`
_PlanOnly = Annotated[bool, typer.Option("--plan-only", help="Write the plan that --plan names, and no checkpoint.")]
_TYPES = get_type_hints(WriterFlags, include_extras=True)
WRITER_OPTIONS: dict[str, tuple[Any, Any]] = {
    field.name: (_TYPES[field.name], field.default) for field in fields(WriterFlags)
}


def command_for(operation: Operation) -> Callable[..., None]:
    """Return a Typer command that runs one operation."""
    text_options = OPTIONS if operation.takes_statistics else {}
    plan_options = {"plan_only": (_PlanOnly, False)} if operation.chooses else {}
    report_options = {"report": (ReportKinds, None)} if text_options else {}

    def command(**given: Any) -> None:
        flags = WriterFlags(**{key: given.pop(key) for key in WRITER_OPTIONS})
        options = CalibrationOptions(**{key: given.pop(key) for key in text_options})
        plan_only = given.pop("plan_only", False)
        model, kinds = given.pop("model"), given.pop("report", None) or []
        check_reports(kinds)
        values = {}
        for name, text in given.items():
            if text is not None:
                values[name] = _value(operation.parameters[name], text)
        plan_to_write = values.pop(_PLAN_FILE, None) if _chosen(operation, model, values) else None
        if plan_only and plan_to_write is None:
            raise RecipeError("--plan-only writes a plan, and none is named", "add --plan FILE beside what chooses")
        recipe = recipe_from_command(operation, model, values)
        console.quiet = flags.quiet
        if not flags.print_recipe and not plan_only:
            check_early(flags)
        if len(recipe.steps) > 1 and plan_to_write is not None:
            raise RecipeError("a plan is written for a model or a recipe of one step", f"{model} has more steps")
        if len(recipe.steps) > 1 and options != CalibrationOptions():
            raise RecipeError("text is measured for a model or a recipe of one step", f"{model} has more steps")
        options.check()
        if len(recipe.steps) == 1:  # what is wrong with the step may come from the command line
            recipe = replace(recipe, steps=(replace(recipe.steps[0], line=0),))
        if flags.shard_bytes:
            recipe = replace(recipe, max_shard_size=flags.shard_bytes)
        plan, report = None, None
        if len(recipe.steps) == 1 and needs_run(operation, recipe.steps[0].parameters, options):
            if flags.part is not None:
                raise RecipeError(
                    "a part runs no model: each of them would, over the same text",
                    "measure first, in one process: moesurgery collect, then give the parts its file with --stats",
                )
            recipe, plan, report = calibrated(recipe, options, flags)
        if kinds and report is None and not flags.print_recipe:
            raise RecipeError("--report has nothing to tell: nothing is measured", "give --text FILE or --heldout FILE")
        if plan_to_write is not None and not flags.print_recipe:
            plan = plan or recipe.plan()
            write_plan_file(_plan_document(operation, plan), Path(plan_to_write), flags)
            if plan_only:
                report_steps(plan, flags)
                return
        carry_out(recipe, flags, plan, report, kinds)

    with_signature(command, operation, {**plan_options, **text_options, **report_options})
    return command


def _chosen(operation: Operation, model: str, values: Mapping[str, Any]) -> bool:
    """Whether the command line, or the recipe that it names, says what to choose: then `--plan` is written."""
    if _PLAN_FILE not in values:
        return False
    recipe = recipe_from_command(operation, model, {key: v for key, v in values.items() if key != _PLAN_FILE})
    stated = [step.parameters for step in recipe.steps if step.operation == operation.name]
    return any(name in parameters for parameters in stated for name in operation.chooses)


def _plan_document(operation: Operation, plan: Plan) -> dict[str, Any]:
    """Return the plan file of what the first step of an operation chose."""
    from moesurgery.write.plan_document import plan_document

    step = next(step for step in plan.steps if step.operation == operation.name)
    return plan_document(plan_of(plan.checkpoint), step)


def write_plan_file(document: Mapping[str, Any], path: Path, flags: WriterFlags) -> None:
    """Write a plan file, unless nothing is to be written, and say so."""
    from moesurgery.write.plan_document import save_plan_document

    if flags.dry_run:
        console.note(f"would write the plan {path}")
        return
    written = save_plan_document(document, path, force=flags.force)
    console.note(f"wrote the plan {path}" if written else f"the plan {path} is there already")


def recipe_from_command(found: Operation, model: str, values: dict[str, Any]) -> Recipe:
    """Return the recipe that a command line means: one step on `model`, or the recipe `model` with `values` changed."""
    if model.endswith((".yaml", ".yml")) and not os.path.isdir(model):
        return load_recipe(model).changed(found.name, values)
    wrong = problems(found, values)
    if wrong:
        raise RecipeError("\n".join(problem.message for problem in wrong), f"see `moesurgery {found.name} --help`")
    return Recipe(model, (RecipeStep(found.name, values),), origin="command line")


def taking_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Return a Typer command of a function with a parameter `flags`, which stands for the options of all writers."""
    return _standing_for(function, {})


def taking_text_and_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Return a Typer command of a function with parameters `flags`, as in `taking_flags`, and `options`, which stands
    for the options of text and repair but for `--memory`."""
    return _standing_for(function, {name: option for name, option in OPTIONS.items() if name != "memory"})


def _standing_for(function: Callable[..., None], text: Mapping[str, tuple[Any, Any]]) -> Callable[..., None]:
    stands = ("flags", "options") if text else ("flags",)
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in stands]

    def command(**given: Any) -> None:
        if text:
            given["options"] = CalibrationOptions(**{key: given.pop(key) for key in text})
        function(flags=WriterFlags(**{key: given.pop(key) for key in WRITER_OPTIONS}), **given)

    _declare(command, [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own], text)
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def _declare(
    command: Callable[..., None], parameters: list[inspect.Parameter], more: Mapping[str, tuple[Any, Any]]
) -> None:
    """Give `command` the signature that Typer reads: parameters of its own, `more`, then the writers' options."""
    for name, (annotation, default) in (*more.items(), *WRITER_OPTIONS.items()):
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def with_signature(command: Callable[..., None], found: Operation, more: Mapping[str, tuple[Any, Any]]) -> None:
    """Give `command` the signature that Typer reads: model, the operation's parameters, `more`, writers' options."""
    parameters = [inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=Model, default=".")]
    for parameter in found.parameters.values():
        kind, extra = _option_type(parameter)
        switches = f"{parameter.option}/--no-{parameter.option[2:]}" if parameter.default is True else parameter.option
        if words := literals_of(parameter.annotation):
            extra["autocompletion"] = completed(words.__iter__)
        metavar = parameter.param.metavar or _metavar(parameter)
        option = typer.Option(switches, help=_help(parameter), metavar=metavar, **extra)
        default = inspect.Parameter.empty if parameter.required else None
        declared: Any = Annotated[kind if parameter.required else kind | None, option]
        parameters.append(
            inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, annotation=declared, default=default)
        )
    _declare(command, parameters, more)
    command.__doc__ = found.documentation
    command.__name__ = found.name.replace("-", "_")


def _option_type(parameter: Parameter) -> tuple[Any, dict[str, Any]]:
    """Return what Typer should parse: plain types itself, everything else as text for `from_text`."""
    kinds = kinds_of(parameter.annotation)
    if kinds in ((int,), (float,)):
        return kinds[0], {"min": parameter.param.minimum, "max": parameter.param.maximum}
    return bool if kinds == (bool,) else str, {}


def _metavar(parameter: Parameter) -> str | None:
    """Say in a word or two what the value is; None where the option takes none, or its type says enough."""
    origins = [get_origin(kind) or kind for kind in kinds_of(parameter.annotation)]
    if list in origins or dict in origins:
        return "N|LIST" if int in origins else "LIST"
    if parameter.param.reads is not None:
        return parameter.param.reads.upper()
    return "N" if origins == [int] else None


def _help(parameter: Parameter) -> str:
    text = parameter.param.help[:1].upper() + parameter.param.help[1:]
    words = words_of(parameter.annotation)
    listed = parameter.default is None and all(re.search(rf"\b{word}\b", text) for word in words)
    if words and not listed:
        text += ": " + ", ".join(words)
    if not parameter.required and parameter.default not in (None, False):
        text += f" [default: {parameter.default}]"
    return text + "."


def _value(parameter: Parameter, given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return from_text(parameter, given)
    except ValueError as error:
        raise RecipeError(f"{parameter.option}: {error}") from None
