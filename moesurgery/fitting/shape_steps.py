"""The steps that make a model of another shape, chosen by statistics of the model as it is.

Everything is chosen on the unedited model, so each step must see what its statistics saw: neurons go first, then top-k
changes with its factors, then experts go by number. Experts are merged only where nothing else changes before: a merge
looks at statistics itself. A repair follows, then blocks are tied, and the form in which weights are stored comes last,
so that every number is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moesurgery.budget.shape import AS_STORED, BESIDE, FORMS, MixtureShape
from moesurgery.checkpoint.dtypes import BITS
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.plan.plan import Plan
from moesurgery.recipe.reader import RecipeStep
from moesurgery.recipe.registry import apply, find_operation
from moesurgery.stats.criteria import MeasuredCriterion
from moesurgery.stats.statistics_file import Stats
from moesurgery.surgery.choose_experts import ranking

TIE = {"scheme": "immediate", "group_size": 2, "distances": "none"}  # parameters of `tie-blocks`


@dataclass
class ShapeSteps:
    """Steps and plans of the shapes of one model. `statistics` is the path of what was collected of it."""

    plan: Plan
    shape: MixtureShape
    statistics: str
    stats: Stats
    cache: CalibrationCache
    _merges: dict[int, dict[str, Any]] = field(default_factory=dict)
    _plans: dict[tuple[MixtureShape, str, str | None], Plan] = field(default_factory=dict)

    def steps(self, shape: MixtureShape, by: MeasuredCriterion, repair: str | None = None) -> tuple[RecipeStep, ...]:
        """Return the steps that give the model `shape`, experts being dropped by `by`, with the repair in a folder."""
        steps = []
        if shape.width != self.shape.width:
            steps.append(RecipeStep("slim-experts", {"width": shape.width, "by": "obs", "stats": self.statistics}))
        if shape.top_k != self.shape.top_k:
            scale = "router" if self.stats.unread else "measured-expert"
            values = {"top_k": shape.top_k, "scale": scale}
            steps.append(RecipeStep("rescale", values | ({} if self.stats.unread else {"stats": self.statistics})))
        if shape.merged:
            steps.append(RecipeStep("merge-experts", self.merge_parameters(shape.experts)))
        elif shape.experts != self.shape.experts:
            steps.append(RecipeStep("drop-experts", {"keep": self._kept(shape.experts, by)}))
        if repair is not None:
            steps.append(RecipeStep("refit", {"repair": repair}))
        if shape.tied:
            steps.append(RecipeStep("tie-blocks", TIE))
        if shape.form != AS_STORED:
            more: dict[str, Any] = {}
            if FORMS[shape.form].quantised:
                more |= {"dtype": BESIDE} if self.wide else {}
                more |= {"stats": self.statistics} if self.stats.neurons and not steps else {}  # of the model as it is
            steps.append(RecipeStep("convert", {**FORMS[shape.form].step, **more}))
        return tuple(steps)

    @cached_property
    def wide(self) -> bool:
        """Whether the experts are stored in more bits than what stays plain beside quantised ones."""
        downs = [m for block in self.plan.anatomy.main_blocks for m in block.named("down") if m.stem.main]
        return any(BITS[self.plan.tensors[m.name].dtype] > FORMS[BESIDE].bits for m in downs)

    def planned(self, shape: MixtureShape, by: MeasuredCriterion, repair: str | None = None) -> Plan:
        """Return the plan of the model in `shape`, as `steps` make it."""
        if (shape, by, repair) not in self._plans:
            self._plans[shape, by, repair] = applied(self.plan, self.steps(shape, by, repair))
        return self._plans[shape, by, repair]

    def merge_parameters(self, experts: int) -> dict[str, Any]:
        """Return the parameters of a merge down to so many experts, for whose fit the model runs once more."""
        if experts not in self._merges:
            values = {"to": experts, "stats": self.statistics}
            groups = find_operation("merge-experts").text.groups
            assert groups is not None
            fit = self.cache.of_candidate(f"merged-{experts}").group_fits(groups(self.plan, values))
            self._merges[experts] = values | {"fit": fit}
        return self._merges[experts]

    def _kept(self, experts: int, by: MeasuredCriterion) -> dict[str, list[int]]:
        """Return the experts of each block that stay."""
        count = self.shape.experts - experts
        ranked = ranking(self.plan, "drop-experts", by, 0, self.statistics, count, True)
        kept = {}
        for block in self.plan.anatomy.blocks:
            gone = set(ranked.lowest(self.plan.anatomy, block.where, count))
            kept[block.where] = [e for e in range(self.shape.experts) if e not in gone]
        return kept


def applied(plan: Plan, steps: tuple[RecipeStep, ...]) -> Plan:
    """Return a plan after some steps."""
    for step in steps:
        plan = apply(plan, step.operation, **step.parameters)
    return plan
