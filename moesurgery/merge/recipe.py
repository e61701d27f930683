"""mergekit's merge recipes, read strictly: every mistake with its line, before a model is opened.

    models:                                # or slices: [{sources: [{model: …, layer_range: [0, 16]}]}]
      - model: ./a
        parameters: {weight: 0.6, density: 0.5}
      - model: org/b
        parameters: {weight: 0.4, density: [0.3, 0.7]}
    merge_method: ties
    base_model: org/base
    dtype: bfloat16

What mergekit ignores in silence is an error here, or a warning where recipes that are around would stop running.
Several documents with `name:` are stages: a later one may use an earlier one's name as a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from moesurgery.errors import RecipeError
from moesurgery.merge.stage import Stage
from moesurgery.merge.stage_reader import StageReader
from moesurgery.plan.plan import Plan
from moesurgery.yaml_strict import parse_all


@dataclass(frozen=True)
class MergeRecipe:
    """The stages of a recipe file, the last of which is the output. `origin` is the file's name, for messages.

    `device`: where torch computes; "" for numpy.
    """

    stages: tuple[Stage, ...]
    origin: str
    text: str = ""
    max_shard_size: int | None = None
    device: str = ""

    def plan(self) -> Plan:
        """Open all models and plan the result. Raises SurgeryError, with the recipe's line where it has one."""
        from moesurgery.merge.planning import plan_merge

        plan = plan_merge(self)
        return replace(plan, max_shard_size=self.max_shard_size) if self.max_shard_size else plan

    def to_yaml(self) -> str:
        return self.text

    @property
    def result(self) -> Stage:
        """The stage that is written: the one without a name, or the last."""
        return next((s for s in self.stages if s.name is None), self.stages[-1])


def load_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read a recipe file. Raises RecipeError with every mistake in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"{path} cannot be read: {reason}", "`moesurgery recipes ls` lists recipes that ship"
        ) from None
    return parse_merge_recipe(text, str(path))


def parse_merge_recipe(text: str, origin: str = "recipe") -> MergeRecipe:
    """Read a recipe from text. Raises RecipeError with every mistake in it."""
    wrong: list[tuple[int, str]] = []
    stages = []
    for document in parse_all(text):
        reader = StageReader(document)
        stage = reader.stage() if not document.problems or isinstance(document.value, dict) else None
        wrong += document.problems + reader.wrong
        if stage is not None:
            stages.append(stage)
    names = [stage.name for stage in stages]
    for i, stage in enumerate(stages):
        if names.index(stage.name) != i:
            what = f"a second stage is named {stage.name!r}" if stage.name else "a second stage has no name"
            wrong.append((stage.line, f"{what}: give each a `name:` of its own, the last needs none"))
        for model in stage.models:
            if model in names[i:]:
                wrong.append((stage.line, f"{model!r} is a stage that comes later: a stage uses those before it"))
    if wrong:
        lines = [f"{origin}:{line}: {message}" for line, message in sorted(set(wrong))]
        raise RecipeError("\n".join(lines), "docs/merge.md shows what a merge recipe may hold")
    return MergeRecipe(tuple(stages), origin, text)
