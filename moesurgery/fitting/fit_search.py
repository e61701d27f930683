"""The best shape of a model for a budget: predicted for all that fit, measured for a few, repaired for fewer.

One pass over text gives a curve of errors for each axis (`budget.damage`). Dropping experts alone and taking neurons
alone are measured first, on held-out windows, unwritten; the prices of the errors are fitted to that, the shape with
the least predicted loss is measured next, and so on. The best few are repaired (`layer_fit`) and measured again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.budget.budget import Budget
from moesurgery.budget.costs import Cost
from moesurgery.budget.damage import Prediction, damage_curves
from moesurgery.budget.shape import Shape
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibrate import HELD_OUT_SHARE, CalibrationOptions
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.heldout import HeldOut, HeldOutLosses
from moesurgery.fitting.reporter import SILENT, Reporter
from moesurgery.fitting.shape_steps import ShapeSteps, applied
from moesurgery.plan.plan import Plan
from moesurgery.recipe.reader import RecipeStep
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.stats.criteria import MeasuredCriterion
from moesurgery.stats.statistics_file import load_stats
from moesurgery.surgery.choose_experts import CANDIDATES

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.text_windows import Domain

ORIGINAL = "original"
REPAIR = "down"  # where none is named
_NEAR = 1 / 16  # of experts and of width: shapes nearer than that to one that was measured are not


@dataclass(frozen=True)
class SearchOptions:
    """How many shapes are measured, how many of them repaired, and the criterion by which experts go (None: the best of
    several for the first shape that drops some)."""

    measured: int = 8
    repaired: int = 3
    by: MeasuredCriterion | None = None

    def check(self) -> None:
        """Raise RecipeError for numbers that are too small."""
        for name in ("measured", "repaired"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class Candidate:
    """A shape that fits: its cost, the loss increase that is predicted, as edited and repaired, and those measured."""

    shape: Shape
    cost: Cost
    predicted: float
    measured: float | None = None
    repaired: float | None = None


@dataclass(frozen=True)
class Fitted:
    """The winner as a plan and as steps, all candidates, and how they were predicted.

    `prediction` is that of edits, `repaired` that of edits with their repair; `by` is how experts were chosen.
    """

    plan: Plan
    steps: tuple[RecipeStep, ...]
    winner: Candidate
    candidates: Sequence[Candidate]
    heldout: HeldOut
    prediction: Prediction
    by: MeasuredCriterion | None
    repair: RepairOptions | None


def fit(
    plan: Plan,
    budget: Budget,
    search: SearchOptions,
    options: CalibrationOptions,
    output: Path,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Fitted:
    """Return the best model within a budget, ready to be written. Statistics and repair are kept beside `output`.

    Raises RefusedError where nothing fits, RecipeError for wrong options or without text.
    """
    search.check()
    options.check()
    if not options.text:
        raise RecipeError("fit needs text to choose by", "give --text FILE; --dry-run without it shows what fits")
    if options.no_heldout:
        raise RecipeError("fit chooses by held-out text", "leave --no-heldout out")
    budget.check()
    settings = options.run_settings(0, REPAIR)
    settings.check()
    held_out: list[Domain] = []
    if options.heldout:
        held_out = replace(settings, limit=options.limit, seed=None).domains(plan.checkpoint, options.heldout)
    run = read_calibration(settings, plan, options.text, options.tokens, 0 if held_out else HELD_OUT_SHARE)
    cache = CalibrationCache(output, run, force, reporter)
    shapes = budget.shapes()
    top_ks = sorted({shape.top_k for shape, _ in shapes} - {budget.original.top_k})
    statistics = cache.statistics(NeededStatistics(top_k=top_ks))
    stats = load_stats(statistics)
    search_run = _Search(
        plan,
        budget,
        dict(shapes),
        ShapeSteps(plan, budget.original, statistics, stats),
        HeldOutLosses(settings, held_out or run.held_out, reporter),
        Prediction(damage_curves(stats)),
        reporter,
        search.by or CANDIDATES[0],
    )
    search_run.measure(search)
    repair = options.repair(REPAIR)
    return search_run.finished(search, cache, repair)


@dataclass
class _Search:
    """A search under way: losses by name, and the shapes that were measured, as edited and repaired."""

    plan: Plan
    budget: Budget
    shapes: dict[Shape, Cost]
    steps: ShapeSteps
    losses: HeldOutLosses
    prediction: Prediction
    reporter: Reporter
    by: MeasuredCriterion
    edited: dict[Shape, str] = field(default_factory=dict)
    repaired: dict[Shape, str] = field(default_factory=dict)

    def increase(self, name: str) -> float:
        return self.losses.found[name].nats - self.losses.found[ORIGINAL].nats

    def measure(self, search: SearchOptions) -> None:
        """Measure the single axes, then the shapes that are predicted best."""
        self.losses.add({ORIGINAL: self.plan})
        alone = self.alone()
        if search.by is None:
            self._choose_criterion(alone)
        for shape in alone:
            self._measure(shape)
        while len(self.edited) < search.measured:
            self._fit_prices()
            left = [s for s in self.shapes if not any(_near(s, other, self.budget.original) for other in self.edited)]
            if not left:
                break
            self._measure(min(left, key=self.prediction.of))
        self._fit_prices()

    def alone(self) -> list[Shape]:
        """Return the shapes that change one axis alone, and the one that is predicted best where there is none."""
        found = [s for s in self.shapes if len(_changed(s, self.budget.original)) == 1]
        by_axis: dict[str, Shape] = {}
        for shape in sorted(found, key=self.prediction.of):
            by_axis.setdefault(_changed(shape, self.budget.original)[0], shape)
        return list(by_axis.values()) or [min(self.shapes, key=self.prediction.of)]

    def _choose_criterion(self, alone: Sequence[Shape]) -> None:
        """Measure the criteria on one shape that drops experts, and keep the best."""
        total = self.budget.original.experts
        dropping = [s for s in (*alone, *sorted(self.shapes, key=self.prediction.of)) if s.experts < total]
        if not dropping:
            return
        first = dropping[0]
        names: dict[str, MeasuredCriterion] = {f"{first.name}, {by}": by for by in CANDIDATES}
        plans = {}
        for name, by in names.items():
            try:
                plans[name] = self.steps.planned(first, by)
            except SurgeryError as error:
                self.reporter.note(f"{name} is not measured: {error.message}")
        self.losses.add(plans)
        best = self.losses.cheapest(plans)
        self.by, self.edited[first] = names[best], best

    def _measure(self, shape: Shape) -> None:
        if shape in self.edited:
            return
        self.losses.add({shape.name: self.steps.planned(shape, self.by)})
        self.edited[shape] = shape.name

    def _fit_prices(self) -> None:
        self.prediction = self.prediction.fitted({s: self.increase(name) for s, name in self.edited.items()})

    def finished(self, search: SearchOptions, cache: CalibrationCache, repair: RepairOptions | None) -> Fitted:
        """Repair the best few, measure them again, and return the best of all."""
        steps = {shape: self.steps.steps(shape, self.by) for shape in self.edited}
        plans = {shape: self.steps.planned(shape, self.by) for shape in self.edited}
        ranked = sorted(self.edited, key=lambda shape: self.increase(self.edited[shape]))
        folders: dict[Shape, Path] = {}
        if repair is not None:
            for shape in ranked[: search.repaired]:
                beside = replace(cache, output=cache.output.with_name(f"{cache.output.name}.{shape.name}"))
                folders[shape] = Path(beside.repair(plans[shape], repair))
                self.repaired[shape] = f"{shape.name}, refit {repair.kind}"
                self.losses.add({self.repaired[shape]: applied(plans[shape], (_refit(folders[shape]),))})
        final = self.repaired or self.edited
        best = min(final, key=lambda shape: self.increase(final[shape]))
        made, chosen = steps[best], plans[best]
        if best in folders:
            target = cache.output.with_name(f"{cache.output.name}.refit")
            _keep_one(folders, best, target)
            made = (*made, _refit(target))
            chosen = applied(chosen, made[-1:])
        candidates = [
            Candidate(
                shape,
                cost,
                self.prediction.of(shape),
                self.increase(self.edited[shape]) if shape in self.edited else None,
                self.increase(self.repaired[shape]) if shape in self.repaired else None,
            )
            for shape, cost in self.shapes.items()
        ]
        winner = next(c for c in candidates if c.shape == best)
        by = self.by if best.experts < self.budget.original.experts else None
        outcome = self.losses.outcome(final[best])
        return Fitted(chosen, made, winner, candidates, outcome, self.prediction, by, repair)


def _changed(shape: Shape, original: Shape) -> list[str]:
    names = ("experts", "width", "top_k", "form")
    return [name for name in names if getattr(shape, name) != getattr(original, name)]


def _near(shape: Shape, other: Shape, original: Shape) -> bool:
    """Whether two shapes are so near that measuring one says what the other costs."""
    return (
        (shape.top_k, shape.form) == (other.top_k, other.form)
        and abs(shape.experts - other.experts) < max(1, _NEAR * original.experts)
        and abs(shape.width - other.width) < max(1, _NEAR * original.width)
    )


def _refit(folder: Path) -> RecipeStep:
    return RecipeStep("refit", {"repair": str(folder)})


def _keep_one(folders: dict[Shape, Path], best: Shape, target: Path) -> None:
    """Give the best repair the usual name, and delete the others."""
    if target.exists():
        shutil.rmtree(target)
    folders[best].rename(target)
    for shape, folder in folders.items():
        if shape != best:
            shutil.rmtree(folder)
