"""The best shape of a model for a budget: predicted for all that fit, measured for a few, repaired for fewer.

One pass over text gives a curve of errors for each axis (`budget.damage`). The best shapes that change one axis alone
are measured first, on held-out windows, unwritten; the prices of the errors are fitted to that, the shape with least
predicted loss is measured next, and so on. A repair (`layer_fit`) changes the prices: the best single axes are repaired
and measured again, the prices are fitted to that, and the shapes with the least predicted loss follow. Those that the
held-out windows do not tell from the best are measured on more of the text, where there is more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.budget.budget import Budget
from moesurgery.budget.costs import Cost
from moesurgery.budget.damage import DamagePrediction, damage_curves
from moesurgery.budget.shape import AS_STORED, MixtureShape
from moesurgery.errors import OutputError, RecipeError
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibrate import HELD_OUT_SHARE, CalibrationOptions
from moesurgery.fitting.calibration_run import read_calibration, windows_left
from moesurgery.fitting.fit_record import FitRecord, read_fit_record
from moesurgery.fitting.heldout import ORIGINAL, HeldOut, HeldOutLosses
from moesurgery.fitting.reporter import SILENT, Reporter
from moesurgery.fitting.rounding_errors import rounding_errors
from moesurgery.fitting.shape_steps import ShapeSteps
from moesurgery.plan.plan import Plan
from moesurgery.plan.written_forms import WRITTEN_FORMS
from moesurgery.recipe.reader import RecipeStep
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.stats.criteria import MeasuredCriterion
from moesurgery.stats.statistics_file import load_stats
from moesurgery.surgery.choose_experts import CANDIDATES

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.text_windows import Domain

REPAIR = "down"  # where none is named
_WORTH_MERGING = 1.5  # times the least loss: above, dropping alone is too far from the best for a merge to reach it
_NEAR = 1 / 16  # of experts and of width: shapes nearer than that to one that was measured are not


@dataclass(frozen=True)
class SearchOptions:
    """How many shapes are measured as they are, how many repaired, and the criterion by which experts go (None: the
    best of several for the first shape that drops some)."""

    measured: int = 6
    repaired: int = 4
    by: MeasuredCriterion | None = None

    def check(self) -> None:
        """Raise RecipeError for numbers that are too small."""
        for name in ("measured", "repaired"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class Candidate:
    """A shape that fits: its cost, the loss increase predicted of the outcome, and those measured without and with
    repair, in nats per token."""

    shape: MixtureShape
    cost: Cost
    predicted: float
    measured: float | None = None
    repaired: float | None = None


@dataclass(frozen=True)
class Fitted:
    """The winner as a plan and as steps, all candidates, and how they were predicted.

    `prediction` is that of the outcome, repaired where `repair` says how; `by` is how experts were chosen, `about` what
    was measured on which text. `further` are loss increases on more text, by name of shape, of those that were told
    apart there, and `further_tokens` how many that was.
    """

    plan: Plan
    steps: tuple[RecipeStep, ...]
    winner: Candidate
    candidates: Sequence[Candidate]
    heldout: HeldOut
    prediction: DamagePrediction
    by: MeasuredCriterion | None
    repair: RepairOptions | None
    about: Mapping[str, Any]
    further: Mapping[str, float] = field(default_factory=dict)
    further_tokens: int = 0


def best_fit(
    plan: Plan,
    budget: Budget,
    wanted: SearchOptions,
    options: CalibrationOptions,
    output: Path,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Fitted:
    """Return the best model within a budget, ready to be written. Statistics and repair are kept beside `output`.

    Raises RefusedError where nothing fits, RecipeError for wrong options or without text.
    """
    wanted.check()
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
        chosen = replace(settings, limit=options.limit, seed=None)
        held_out = chosen.domains(plan.checkpoint, options.heldout)
    run = read_calibration(settings, plan, options.text, options.tokens, 0 if held_out else HELD_OUT_SHARE)
    cache = CalibrationCache(output, run, force, reporter)
    shapes = budget.shapes()
    top_ks = sorted({shape.top_k for shape, _ in shapes} - {budget.original.top_k})
    statistics = cache.statistics(NeededStatistics(top_k=top_ks, neurons=len(budget.choices.width) > 1))
    stats = load_stats(statistics)

    def further() -> list[Domain]:
        if not options.heldout:
            return windows_left(settings, plan, options.text or (), options.tokens)
        return replace(chosen, skip=options.limit).domains(plan.checkpoint, options.heldout)

    quantised = sorted({shape.form for shape, _ in shapes if shape.form in WRITTEN_FORMS})
    search = _Search(
        plan,
        budget,
        dict(shapes),
        ShapeSteps(plan, budget.original, statistics, stats, cache),
        HeldOutLosses(settings, held_out or run.held_out, reporter),
        DamagePrediction(damage_curves(stats, rounding_errors(plan, quantised))),
        cache,
        options.repair(REPAIR),
        wanted.by or CANDIDATES[0],
        further,
    )
    asked = {
        **run.about,
        **(search.repair.described() if search.repair else {"kind": "none"}),
        "heldout": [[domain.name, domain.as_tokens.digest] for domain in search.losses.domains],
        "shapes": [shape.name for shape in search.shapes],
        "search": [wanted.measured, wanted.repaired, wanted.by],
    }
    kept = output.with_name(f"{output.name}.fit.json")
    record = None if force else read_fit_record(kept, asked)
    if record is None:
        if search.refit_folder.exists() and not force:
            raise OutputError(
                f"{search.refit_folder} holds a repair of something else", "use --force to replace it, or another -o"
            )
        search.measure(wanted)
        if search.repair is not None:
            search.measure_repaired(wanted.repaired)
        search.tell_apart()
        record = search.record()
        record.save(kept, asked)
        reporter.note(f"the search is in {kept}")
    else:
        reporter.note(f"the search in {kept} is used again")
    return search.outcome(record)


@dataclass
class _Search:
    """A search under way: losses by name, and the names of the shapes that were measured, edited and repaired.

    `further` reads windows of more text, none where there is no more of a file; `told_apart` has losses on them.
    """

    plan: Plan
    budget: Budget
    shapes: dict[MixtureShape, Cost]
    steps: ShapeSteps
    losses: HeldOutLosses
    prediction: DamagePrediction
    cache: CalibrationCache
    repair: RepairOptions | None
    by: MeasuredCriterion
    further: Callable[[], list[Domain]]
    told_apart: HeldOutLosses | None = None
    edited: dict[MixtureShape, str] = field(default_factory=dict)
    repaired: dict[MixtureShape, str] = field(default_factory=dict)
    folders: dict[MixtureShape, Path] = field(default_factory=dict)

    @cached_property
    def alone(self) -> list[MixtureShape]:
        """For each axis the best shape that changes it alone; the one predicted best of all where there is none."""
        by_axis: dict[str, MixtureShape] = {}
        for shape in sorted(self.shapes, key=self.prediction.of):
            if len(axes := _changed(shape, self.budget.original)) == 1:
                by_axis.setdefault(axes[0], shape)
        return list(by_axis.values()) or [min(self.shapes, key=self.prediction.of)]

    def measure(self, wanted: SearchOptions) -> None:
        """Measure the single axes, then the shapes that are predicted best, without repair."""
        if wanted.by is None:
            self._choose_criterion()
        self._measure(*self.alone)
        while len(self.edited) < wanted.measured and (following := self._next(self.edited)):
            self._measure(following)
        self.prediction = self._fitted(self.edited)

    def measure_repaired(self, count: int) -> None:
        """Repair and measure the single axes that cost least, then the shapes that are predicted best.

        What no repair changes does not count.
        """
        whole = [shape for shape in self.edited if not self._repairs(shape)]
        for shape in whole:
            self._repair(shape)
        count += len(whole)
        first = sorted(set(self.alone) - set(whole), key=lambda shape: self.losses.increase(self.edited[shape]))
        for shape in first[: max(1, min(2, count - len(whole) - 1))]:
            self._repair(shape)
        while len(self.repaired) < count and (following := self._next(self.repaired)):
            self._repair(following)
        self._try_merging()
        self.prediction = self._fitted(self.repaired)

    def _try_merging(self) -> None:
        """Merge experts instead of dropping them, where dropping alone cost nearly as little as anything."""
        if not self.budget.choices.merging:
            return
        least = min(map(self.losses.increase, self.repaired.values()))
        for shape in [s for s in self.repaired if _changed(_plain(s), self.budget.original) == ["experts"]]:
            if self.losses.increase(self.repaired[shape]) <= max(least, _WORTH_MERGING * least):
                merged = replace(shape, merged=True)
                self.shapes[merged] = self.shapes[shape]
                self._repair(merged)

    def _next(self, known: dict[MixtureShape, str]) -> MixtureShape | None:
        """Return the shape that is predicted best of those that are not near a known one; None where all are."""
        left = [s for s in self.shapes if not any(_near(s, other, self.budget.original) for other in known)]
        return min(left, key=self._fitted(known).of) if left else None

    def _fitted(self, known: dict[MixtureShape, str]) -> DamagePrediction:
        return self.prediction.fitted({s: self.losses.increase(name) for s, name in known.items() if not s.merged})

    def _choose_criterion(self) -> None:
        """Measure the criteria on one shape that drops experts, and keep the best."""
        total = self.budget.original.experts
        dropping = [s for s in (*self.alone, *sorted(self.shapes, key=self.prediction.of)) if s.experts < total]
        if not dropping:
            return
        first = dropping[0]
        names: dict[str, MeasuredCriterion] = {f"{first.name}, {by}": by for by in CANDIDATES}
        plans = {name: self.steps.planned(first, by) for name, by in names.items()}
        self.losses.add({ORIGINAL: self.plan, **plans})
        best = self.losses.cheapest(names)
        self.by, self.edited[first] = names[best], best

    def _measure(self, *shapes: MixtureShape) -> None:
        new = {shape: shape.name for shape in shapes if shape not in self.edited}
        plans = {name: self.steps.planned(shape, self.by) for shape, name in new.items()}
        self.losses.add({ORIGINAL: self.plan, **plans})
        self.edited |= new

    def _repair(self, shape: MixtureShape) -> None:
        """Repair and measure a shape. Forms of one shape share its repair."""
        assert self.repair is not None
        self._measure(shape)
        plain = _plain(shape)
        if not self._repairs(shape):
            self.repaired[shape] = self.edited[shape]
            return
        if plain not in self.folders:
            cache = self.cache.of_candidate(plain.name)
            self.folders[plain] = Path(cache.repair(self.steps.planned(plain, self.by), self.repair))
        name = f"{shape.name}, refit {self.repair.kind}"
        self.losses.add({name: self.steps.planned(shape, self.by, str(self.folders[plain]))})
        self.repaired[shape] = name

    def _repairs(self, shape: MixtureShape) -> bool:
        """Whether a repair does anything: not where only the form changes, and not where blocks are tied after it."""
        return not shape.tied and _plain(shape) != self.budget.original

    def tell_apart(self) -> None:
        """Measure the shapes that the held-out windows do not tell from the best on more text, where there is more."""
        final = list((self.repaired or self.edited).values())
        near = self.losses.near(final, self.losses.cheapest(final))
        if len(near) > 1 and (domains := [domain for domain in self.further() if len(domain.windows)]):
            self.told_apart = HeldOutLosses(self.losses.settings, domains, self.losses.reporter)
            self.told_apart.add({ORIGINAL: self.plan} | {name: self.losses.plans[name] for name in near})

    def record(self) -> FitRecord:
        """Return what was measured and the best of it, whose repair gets the usual name; the others are deleted."""
        final = self.repaired or self.edited
        further, tokens = {}, 0
        best = min(final, key=lambda shape: self.losses.increase(final[shape]))
        if (more := self.told_apart) is not None:
            further = {shape: more.increase(name) for shape, name in final.items() if name in more.found}
            tokens, before = more.tokens, self.losses.tokens
            best = min(further, key=lambda shape: tokens * further[shape] + before * self.losses.increase(final[shape]))
        _keep_one(self.folders, _plain(best), self.refit_folder)
        for experts in {s.experts for s in self.edited if s.merged and not (best.merged and s.experts == best.experts)}:
            Path(self.steps.merge_parameters(experts)["fit"]).unlink()
        return FitRecord(
            best.name,
            self.by,
            self.prediction.prices,
            {shape.name: self.losses.increase(name) for shape, name in self.edited.items()},
            {shape.name: self.losses.increase(name) for shape, name in self.repaired.items()},
            self.losses.outcome(final[best]),
            {shape.name: increase for shape, increase in further.items()},
            tokens,
        )

    @property
    def refit_folder(self) -> Path:
        return self.cache.output.with_name(f"{self.cache.output.name}.refit")

    def outcome(self, record: FitRecord) -> Fitted:
        """Return the winner of a search, by its record, and its plan."""
        a, b, c, d, e = record.prices
        prediction = replace(self.prediction, prices=(a, b, c, d, e))
        self.shapes |= {
            merged: cost
            for shape, cost in self.shapes.items()
            if (merged := replace(shape, merged=True)).name in record.repaired
        }
        candidates = [
            Candidate(
                shape, cost, prediction.of(shape), record.measured.get(shape.name), record.repaired.get(shape.name)
            )
            for shape, cost in self.shapes.items()
        ]
        winner = next(candidate for candidate in candidates if candidate.shape.name == record.taken)
        by: Any = record.by
        plain, folder = _plain(winner.shape), None
        if self.repair is not None and self._repairs(winner.shape):
            folder = replace(self.cache, force=False).repair(
                self.steps.planned(plain, by), self.repair
            )  # made just now
        steps, plan = self.steps.steps(winner.shape, by, folder), self.steps.planned(winner.shape, by, folder)
        chosen_by = by if winner.shape.experts < self.budget.original.experts else None
        about = self.cache.run.about
        more = (record.further, record.further_tokens)
        return Fitted(plan, steps, winner, candidates, record.heldout, prediction, chosen_by, self.repair, about, *more)


def _plain(shape: MixtureShape) -> MixtureShape:
    return replace(shape, form=AS_STORED)


def _changed(shape: MixtureShape, original: MixtureShape) -> list[str]:
    names = ("experts", "width", "top_k", "form", "tied")
    return [name for name in names if getattr(shape, name) != getattr(original, name)]


def _near(shape: MixtureShape, other: MixtureShape, original: MixtureShape) -> bool:
    """Whether two shapes are so near that measuring one says what the other costs."""
    return (
        (shape.top_k, shape.form, shape.tied) == (other.top_k, other.form, other.tied)
        and abs(shape.experts - other.experts) < max(1, _NEAR * original.experts)
        and abs(shape.width - other.width) < max(1, _NEAR * original.width)
    )


def _keep_one(folders: dict[MixtureShape, Path], best: MixtureShape, target: Path) -> None:
    """Give the best shape's repair, if it has one, the usual name, and delete the others."""
    if folders and target.exists():
        shutil.rmtree(target)
    for shape, folder in folders.items():
        if shape == best:
            folder.rename(target)
        else:
            shutil.rmtree(folder)
