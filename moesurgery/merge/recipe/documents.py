"""The documents of a merge recipe as stages, each after those that it uses."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from moesurgery.errors import RecipeError
from moesurgery.merge.recipe.stage import Stage
from moesurgery.merge.recipe.stage_reader import StageReader
from moesurgery.recipe.mergekit_moe import is_mergekit_moe
from moesurgery.recipe.yaml_strict import Mistakes, TooManyMistakes, parse_all


def is_merge_recipe(text: str) -> bool:
    """Whether a recipe is of a merge rather than of operations."""
    if "merge_method" not in text:  # parsing takes its time
        return False
    return any(isinstance(document.value, dict) and "merge_method" in document.value for document in parse_all(text))


def read_stages(text: str, origin: str) -> tuple[Stage, ...]:
    """Return the stages of a recipe, the last of which is the output. Raises RecipeError with every mistake in it."""
    wrong = Mistakes()
    stages: list[Stage] = []
    documents = parse_all(text)
    if len(documents) == 1 and isinstance(documents[0].value, dict) and "steps" in documents[0].value:
        raise RecipeError(f"{origin} is a recipe of operations", f"carry it out with `moesurgery run {origin}`")
    if is_mergekit_moe(documents[0].value) and "merge_method" not in documents[0].value:
        raise RecipeError(f"{origin} is a recipe of mergekit-moe", f"carry it out with `moesurgery run {origin}`")
    ordered: list[Stage] = []
    with suppress(TooManyMistakes):
        for document in documents:
            reader = StageReader(document)
            try:
                stage = reader.stage() if not document.problems or isinstance(document.value, dict) else None
            finally:
                wrong.extend([*document.problems, *reader.wrong])
            if stage is not None:
                stages.append(stage)
        ordered = _ordered(stages, wrong)
    if wrong:
        raise RecipeError(wrong.text(origin), "docs/merge.md shows what a merge recipe may hold")
    return tuple(ordered)


def _ordered(stages: list[Stage], wrong: Mistakes) -> list[Stage]:
    """Return the stages with each after those that it uses, the result last; add what is wrong with them to `wrong`.

    The result is the stage without a name, or the last. Stages that it does not need are left out, with a warning.
    """
    named: dict[str | None, Stage] = {}
    for stage in stages:
        if stage.name in named:
            what = f"a second stage is named {stage.name!r}" if stage.name else "a second stage has no name"
            wrong.append((stage.line, f"{what}: give each a `name:` of its own, the last needs none"))
        named.setdefault(stage.name, stage)
    if not stages:
        return []
    result = named.get(None, stages[-1])
    ordered: list[Stage] = []
    open_ones = [(result, iter(result.models))]
    while open_ones:
        stage, models = open_ones[-1]
        used = next((named[model] for model in models if model in named and named[model] not in ordered), None)
        if used is None:
            ordered.append(open_ones.pop()[0])
        elif any(used is above for above, _ in open_ones):
            wrong.append((used.line, f"the stage {used.name!r} uses itself, at once or by way of others"))
        else:
            open_ones.append((used, iter(used.models)))
    idle = [(s.line, f"the stage {s.name!r} has no effect: no other uses it") for s in stages if s not in ordered]
    return [*ordered[:-1], replace(result, warnings=(*result.warnings, *idle))]
