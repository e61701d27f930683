"""Recipes: strict YAML into a list of operations, and the JSON schema that editors check them with.

    model: hf://mistralai/Mixtral-8x7B-v0.1      # or a directory, relative to where you are
    steps:
      - rescale: {top_k: 3}
    max_shard_size: 5GB                          # optional; the source's shards otherwise

A mergekit-moe recipe (`base_model`, `experts`) is read too: `mergekit_moe`. All mistakes are reported at once, with
line numbers, before a model is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.protocols import refuse_unlisted
from moesurgery.errors import RecipeError, at_line
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.parameters import schema_of
from moesurgery.recipe.registry import did_you_mean, find_operation, operations, problems

if TYPE_CHECKING:
    from moesurgery.recipe.yaml_strict import Document

_KEYS = ("model", "steps", "max_shard_size")
_SIZE = re.compile(r"(?i)\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]?)(i?)b?\s*")


@dataclass(frozen=True)
class RecipeStep:
    """One operation with its parameters, and the line it stands on (0 where it came from a command line).

    `own` names the parameters of a recipe's step that a command line gave.
    """

    operation: str
    parameters: Mapping[str, Any]
    line: int = 0
    own: frozenset[str] = frozenset()

    def check_references(self) -> None:
        """Raise RecipeError where the recipe names a model by a protocol that is not allowed."""
        theirs = {name: value for name, value in self.parameters.items() if name not in self.own}
        for _, text, reads in find_operation(self.operation).named(theirs) if self.line else ():
            if reads == "model":
                refuse_unlisted(text)


@dataclass(frozen=True)
class Recipe:
    """A model and what to do to it. `origin` is the file's name, for messages; `finish` adds notes at the end.

    `model_line`: the line that names the model, 0 where a command line does.
    """

    model: str | None
    steps: tuple[RecipeStep, ...]
    max_shard_size: int | None = None
    origin: str = "recipe"
    finish: Callable[[Plan], Plan] | None = None
    words: Callable[[str], str] | None = None
    model_line: int = 0

    def plan(self) -> Plan:
        """Open the model and apply all steps. Raises SurgeryError, with the recipe's line where it has one."""
        return self.apply(self.opened())

    def opened(self) -> Plan:
        """Open the model and return the plan that copies it, before any step. Raises SurgeryError as `plan` does."""
        from moesurgery.checkpoint.checkpoint import open_checkpoint

        if self.model is None:
            raise RecipeError(f"{self.origin} names no model", "add `model: PATH`, or give it with --model")
        for step in self.steps:
            with at_line(self.origin, step.line):
                step.check_references()
        with at_line(self.origin, self.model_line):
            if self.model_line:
                refuse_unlisted(self.model)
            return plan_of(open_checkpoint(self.model))

    def apply(self, plan: Plan) -> Plan:
        """Apply all steps to a plan."""
        for step in self.steps:
            with at_line(self.origin, step.line, self.words):
                step.check_references()
                plan = find_operation(step.operation).applied(plan, **step.parameters)
        return self.finished(plan)

    def finished(self, plan: Plan) -> Plan:
        """Return a plan to which all steps have been applied with what the recipe says of the whole output."""
        plan = self.finish(plan) if self.finish else plan
        return replace(plan, max_shard_size=self.max_shard_size) if self.max_shard_size else plan

    def changed(self, operation: str, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with `values` in place of what its one step `operation` says. Raises RecipeError."""
        at = [i for i, step in enumerate(self.steps) if step.operation == operation]
        if len(at) != 1:
            raise RecipeError(
                f"{self.origin} has {len(at) or 'no'} {operation} steps, expected one",
                f"`moesurgery run {self.origin}` carries it out as it is",
            )
        step = self.steps[at[0]]
        step = replace(step, parameters={**step.parameters, **values}, own=step.own | values.keys())
        if wrong := problems(find_operation(operation), step.parameters):
            raise RecipeError("\n".join(problem.message for problem in wrong), f"see `moesurgery {operation} --help`")
        return replace(self, steps=(*self.steps[: at[0]], step, *self.steps[at[0] + 1 :]))

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `moesurgery run` reads."""
        import yaml

        data: dict[str, Any] = {"model": self.model} if self.model is not None else {}
        data["steps"] = [{s.operation: dict(s.parameters)} for s in self.steps]
        if self.max_shard_size:
            data["max_shard_size"] = self.max_shard_size
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Raises RecipeError with every mistake in it."""
    from moesurgery.recipe.yaml_strict import recipe_text

    return parse_recipe(recipe_text(path), str(path))


def parse_recipe(text: str, origin: str = "recipe") -> Recipe:
    """Read a recipe from text. Raises RecipeError with every mistake in it."""
    from moesurgery.recipe import mergekit_moe
    from moesurgery.recipe.yaml_strict import TooManyMistakes, parse

    document = parse(text)
    if isinstance(document.value, dict) and "merge_method" in document.value:
        raise RecipeError(f"{origin} is the recipe of a merge", f"carry it out with `moesurgery merge {origin}`")
    wrong = document.problems
    build = _build_mergekit if mergekit_moe.is_mergekit_moe(document.value) else _build
    recipe = None
    with suppress(TooManyMistakes):
        recipe = build(document, wrong, origin) if not wrong or isinstance(document.value, dict) else None
    if wrong:
        raise RecipeError(wrong.text(origin), "`moesurgery schema` prints what a recipe may hold")
    assert recipe is not None
    return recipe


def _build(document: Document, wrong: list[tuple[int, str]], origin: str) -> Recipe | None:
    value = document.value
    if not isinstance(value, dict):
        wrong.append((1, "a recipe is a mapping with `model:` and `steps:`"))
        return None
    for key in value:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS) or f"a recipe has {', '.join(_KEYS)}"
            wrong.append((document.line((key,)), f"unknown key {key!r}: {hint}"))
    model = value.get("model")
    if model is not None and not isinstance(model, str):
        wrong.append((document.line(("model",)), f"model is {model!r}, expected a path or hf://org/name"))
    size = None
    if value.get("max_shard_size") is not None:
        try:
            size = parse_size(value["max_shard_size"])
        except ValueError as error:
            wrong.append((document.line(("max_shard_size",)), f"max_shard_size: {error}"))
    return Recipe(
        model if isinstance(model, str) else None,
        _steps(document, value.get("steps"), wrong),
        size,
        origin,
        model_line=document.line(("model",)),
    )


def _build_mergekit(document: Document, wrong: list[tuple[int, str]], origin: str) -> Recipe | None:
    from moesurgery.recipe import mergekit_moe

    mixture = mergekit_moe.read(document, wrong)
    if mixture is None:
        return None
    step = RecipeStep("upcycle", mixture.parameters, document.line(("experts",)))
    line = document.line(("base_model",))
    notes, words = mergekit_moe.with_difference_notes, mergekit_moe.in_its_words
    return Recipe(mixture.model, (step,), None, origin, notes, words, model_line=line)


def _steps(document: Document, value: Any, wrong: list[tuple[int, str]]) -> tuple[RecipeStep, ...]:
    if not isinstance(value, list):
        wrong.append((document.line(("steps",)), "steps is missing or not a list: `steps: [rescale: {top_k: 3}]`"))
        return ()
    steps = []
    for i, entry in enumerate(value):
        line = document.line(("steps", i))
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            wrong.append((line, "a step is one operation with its parameters: `- rescale: {top_k: 3}`"))
            continue
        ((name, parameters),) = entry.items()
        parameters = {} if parameters is None else parameters
        try:
            operation = find_operation(str(name))
        except RecipeError as error:
            wrong.append((line, f"{error.message}: {error.hint}"))
            continue
        if not isinstance(parameters, dict):
            wrong.append((line, f"{name}: its parameters are a mapping: `- {name}: {{…}}`"))
            continue
        for problem in problems(operation, {str(k): v for k, v in parameters.items()}):
            wrong.append((document.line(("steps", i, name, *problem.path)), problem.message))
        steps.append(RecipeStep(name, parameters, line))
    return tuple(steps)


def parse_size(value: Any) -> int:
    """Return the bytes that `5GB`, `500MiB` or a plain number of bytes mean. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
    if size <= 0:
        raise ValueError(f"{value!r} is not a size: write 5GB, 500MB or a number of bytes")
    return size


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 7) of recipes, generated from the operations."""
    steps = []
    for operation in operations().values():
        properties = {
            p.name: {"description": p.param.help, **schema_of(p.annotation, p.param)}
            for p in operation.parameters.values()
        }
        required = [p.name for p in operation.parameters.values() if p.required]
        body: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
        if required:
            body["required"] = required
        else:
            body["type"] = ["object", "null"]
        steps.append(
            {
                "type": "object",
                "description": operation.summary,
                "additionalProperties": False,
                "required": [operation.name],
                "properties": {operation.name: body},
            }
        )
        if not required:
            steps.append({"const": operation.name})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moesurgery recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "model": {
                "type": "string",
                "description": "a directory, hf://org/name[@revision], or a URL that whoever runs it allows",
            },
            "steps": {"type": "array", "items": {"anyOf": steps}},
            "max_shard_size": {"type": ["string", "integer"], "description": "bytes per shard, such as 5GB"},
        },
    }
