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

from moesurgery.merge.plan_merge import plan_stages
from moesurgery.merge.recipe.documents import is_merge_recipe, read_stages
from moesurgery.merge.recipe.stage import Stage
from moesurgery.merge.references import Models
from moesurgery.plan.plan import Plan
from moesurgery.plan.requantise import Requantize
from moesurgery.recipe.reader import Recipe, parse_recipe
from moesurgery.recipe.yaml_strict import recipe_text


@dataclass(frozen=True)
class MergeRecipe:
    """The stages of a recipe file, each after those that it uses; the last is the output.

    `origin` is the file's name, for messages. `device`: where torch computes; "" for numpy.
    `requantize`: whether weights that the base has quantised are stored in its form ("as-source") or as plain ones.
    """

    stages: tuple[Stage, ...]
    origin: str
    text: str = ""
    max_shard_size: int | None = None
    device: str = ""
    requantize: Requantize = "as-source"

    def plan(self, models: Models | None = None) -> Plan:
        """Open all models and plan the result. Raises SurgeryError, with the recipe's line where it has one."""
        plan = plan_stages(self.stages, self.origin, self.device, models, self.requantize)
        return replace(plan, max_shard_size=self.max_shard_size) if self.max_shard_size else plan

    def to_yaml(self) -> str:
        """Return the recipe as it was given."""
        return self.text


def load_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read a recipe file. Raises RecipeError with every mistake in it."""
    return parse_merge_recipe(recipe_text(path), str(path))


def parse_merge_recipe(text: str, origin: str = "recipe") -> MergeRecipe:
    """Read a recipe from text. Raises RecipeError with every mistake in it."""
    return MergeRecipe(read_stages(text, origin), origin, text)


def load_any_recipe(path: str | Path) -> Recipe | MergeRecipe:
    """Read a recipe file of operations or of a merge. Raises RecipeError with every mistake in it."""
    text = recipe_text(path)
    return parse_merge_recipe(text, str(path)) if is_merge_recipe(text) else parse_recipe(text, str(path))
