"""The recipe of a provenance record, planned again on the models that were given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.filenames import PROVENANCE
from moesurgery.errors import RecipeError
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.parameters import with_texts
from moesurgery.recipe.reader import Recipe, RecipeStep
from moesurgery.recipe.registry import operations, problems
from moesurgery.validate.parent_models import Given, Parents, Recorded, matched, recorded_models

MERGE_OPERATION = "merge"
_NOT_AGAIN = {"proof": False}  # what says something of an output and changes nothing in it

Steps = Sequence[tuple[str, dict[str, Any]]]  # operation and parameters


def steps_of(record: Mapping[str, Any]) -> Steps:
    """Return the steps of a record. Raises RecipeError where they are none that are known here."""
    recipe = record.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    if not isinstance(steps, list):
        raise RecipeError("holds no recipe")
    checked: list[tuple[str, dict[str, Any]]] = []
    known = operations()
    for entry in steps:
        name, values = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", None)
        if (name not in known and name != MERGE_OPERATION) or not isinstance(values, dict):
            raise RecipeError(f"the step {entry!r} is none of an operation that is known here")
        if name != MERGE_OPERATION and (wrong := problems(known[name], values)):
            raise RecipeError(wrong[0].message)
        if name == MERGE_OPERATION and checked and checked[-1][0] != MERGE_OPERATION:
            raise RecipeError(f"merges after {checked[-1][0]}, which no recipe does")
        checked.append((name, values))
    return checked


def parents_of(record: Mapping[str, Any], steps: Steps, given: Sequence[Given]) -> Parents:
    """Find what was given for every model and every other file that a record names."""
    wanted = recorded_models(record)
    for name, values in steps:
        if name != MERGE_OPERATION:
            wanted += [Recorded(text) for _, text, reads in operations()[name].named(values) if reads == "file"]
    return matched(list({entry.name: entry for entry in reversed(wanted)}.values())[::-1], given)


def replanned(steps: Steps, base: str, parents: Parents) -> Plan:
    """Return the plan of a record's recipe on the model `base`, or of its merge.

    Raises SurgeryError where it cannot be carried out.
    """
    merges = [values for name, values in steps if name == MERGE_OPERATION]
    plan = _merged(merges, parents) if merges else plan_of(open_checkpoint(base))
    return Recipe(None, tuple(_recipe_steps(steps[len(merges) :], parents))).apply(plan)


def device_of(steps: Steps) -> str:
    """Return the device that merged, "" for numpy."""
    return next(
        (str(values["device"]) for name, values in steps if name == MERGE_OPERATION and values.get("device")), ""
    )


def _merged(stages: list[dict[str, Any]], parents: Parents) -> Plan:
    from moesurgery.merge.merge_recipe import parse_merge_recipe
    from moesurgery.merge.references import Models

    for stage in stages:
        _check_method(stage)
    text = "\n---\n".join(json.dumps(stage.get("recipe"), ensure_ascii=False) for stage in stages)
    plain = any(stage.get("requantize") == "none" for stage in stages)
    recipe = replace(
        parse_merge_recipe(text, PROVENANCE),
        device=device_of([(MERGE_OPERATION, stage) for stage in stages]),
        requantize="none" if plain else "as-source",
    )
    return recipe.plan(Models(parents.where))


def _check_method(stage: Mapping[str, Any]) -> None:
    """Refuse a method of the user's own that is not there, or not the one that merged."""
    from moesurgery.merge.compute.method import methods

    stated, recipe = stage.get("methods"), stage.get("recipe")
    if not isinstance(stated, dict) or not isinstance(recipe, dict):
        return
    method = methods().get(str(recipe.get("merge_method")))
    what = f"the merge method {recipe.get('merge_method')!r} of {stated.get('file')}"
    if method is None or method.origin is None:
        raise RecipeError(f"needs {what}", f"add --methods {stated.get('file')}: it is run")
    if method.origin[1] != stated.get("sha256"):
        raise RecipeError(f"needs {what}, which is another file than {method.origin[0]}", "give the file as it was")


def _recipe_steps(steps: Steps, parents: Parents) -> Iterator[RecipeStep]:
    """Yield steps with what was given in place of the names that the record has for models and files."""
    for name, values in steps:
        operation = operations()[name]
        located = {path: _located(text, parents) for path, text, _ in operation.named(values)}
        settings = {key: value for key, value in _NOT_AGAIN.items() if key in operation.parameters}
        yield RecipeStep(name, {**with_texts(values, located), **settings})


def _located(name: str, parents: Parents) -> str:
    if name not in parents.where:
        raise RecipeError(f"names {name}, and nothing says where that is")
    return parents.where[name]
