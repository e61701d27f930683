"""A data-driven edit, from text to a plan: collect statistics, choose experts, edit, repair, and measure the loss.

`calibrate(model, "rescale", {"top_k": 3, "scale": "measured"}, CalibrationOptions(text=["F"]))` is `moesurgery collect
MODEL --top-k 3 --text F -o S` followed by `moesurgery rescale MODEL --top-k 3 --scale measured --stats S`. What is
collected, whether the model runs a second time, and what else is measured, the operation declares
(`recipe.text_needs`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.heldout import ORIGINAL, HeldOut, HeldOutLosses
from moesurgery.fitting.reporter import SILENT, Reporter
from moesurgery.fitting.run_settings import AUTO, TOKENS, WINDOW, RunSettings
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.reader import RecipeStep
from moesurgery.recipe.registry import Operation, apply, checked_operation
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values, Variant
from moesurgery.stats.statistics_file import SUFFIX

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.text_windows import Domain

HELD_OUT_SHARE = 4  # one window in so many of the text is kept for measuring
HELD_OUT_WINDOWS = 20
KINDS = ("none", "scalar", "expert", "router", "down", "all")


@dataclass(frozen=True)
class CalibrationOptions:
    """What text to use, and for what; each field is the command line's option of its name.

    `text` are calibration files, FILE or FILE=WEIGHT, of which `tokens` are read in windows of `window`; one window in
    four is kept out to measure the outcome on, or the first `limit` windows of each file of `heldout`, unless
    `no_heldout`. `refit` is the kind of repair (none, scalar, expert, router, down, all; None for what is usual with
    the operation), `ridge` a number, or "auto" to find it on held-out windows, and `sweeps` how often `down` and `all`
    go over the experts (None: `layer_fit.SWEEPS`). The rest is as in `RunSettings`.
    """

    text: Sequence[str | Path] | None = None
    refit: str | None = None
    ridge: float | str = AUTO
    sweeps: int | None = None
    heldout: Sequence[str | Path] | None = None
    limit: int = HELD_OUT_WINDOWS
    no_heldout: bool = False
    window: int = WINDOW
    tokens: int = TOKENS
    dtype: str = AUTO
    device: str = "cpu"
    memory: str = ""
    apart: bool = False
    assistant_only: bool = False

    def check(self) -> None:
        """Raise RecipeError for options that are wrong by themselves, before a model is opened."""
        for name, files in (("text", self.text), ("heldout", self.heldout)):
            if isinstance(files, (str, Path)):
                raise RecipeError(f"{name} is {str(files)!r}, expected a list of files", f"{name}=[{str(files)!r}]")
        if self.refit not in (None, *KINDS):
            raise RecipeError(f"--refit is {self.refit!r}, expected one of {', '.join(KINDS)}")
        if self.refit not in (None, "none") and not self.text:
            raise RecipeError("--refit needs text to fit on", "give --text FILE")
        if self.ridge != AUTO and _number(self.ridge) is None:
            raise RecipeError(f"--ridge is {self.ridge!r}, expected {AUTO} or a number that is not negative")
        for name, least in (("sweeps", 1), ("limit", 1), ("window", 2), ("tokens", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise RecipeError(f"--{name} is {value}, expected {least} or more")

    def repair(self, usual: str) -> RepairOptions | None:
        """Return how to repair, `usual` being the kind where none is asked for; None for not at all."""
        from moesurgery.fitting.layer_fit import SWEEPS, RepairOptions

        kind: Any = (self.refit or usual) if self.text else "none"
        return None if kind == "none" else RepairOptions(kind, _number(self.ridge), self.sweeps or SWEEPS[kind])

    def run_settings(self, seed: int, usual: str, *, fits: bool = False) -> RunSettings:
        """Return how the model is run, `usual` being the kind of repair where none is asked for.

        `fits`: weights are fitted, whether or not there is a repair.
        """
        # The fitted changes are small relative to rounding errors, so "auto" is float32 for a repair, also on a GPU.
        dtype = "float32" if self.dtype == AUTO and (fits or self.repair(usual) is not None) else self.dtype
        memory, apart = self.memory, self.apart
        return RunSettings(self.window, None, seed, self.device, dtype, memory, apart, self.assistant_only)


def _number(value: float | str) -> float | None:
    """Return a number from zero on; None for anything else."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


@dataclass(frozen=True)
class Calibrated:
    """The edited plan, ready to be written; the steps that make it again from the files beside the output, as a recipe
    has them; and what was measured, where it was."""

    plan: Plan
    steps: tuple[RecipeStep, ...]
    heldout: HeldOut | None = None


def calibrate(
    model: Plan | str | Path,
    operation: str,
    parameters: Values,
    options: CalibrationOptions = CalibrationOptions(),
    output: str | Path | None = None,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Calibrated:
    """Edit a model by an operation whose missing parameters are measured on text. Nothing is written but the cache.

    `output` is where the plan is to be written: statistics, fits and repairs are written beside it and reused from
    there; with `force` they are replaced. It is named after model and operation by default. Where experts are to be
    chosen by statistics that are yet to be collected, an edit that no choice could make possible is refused before the
    model runs; the edit itself is planned once. Where the parameters do not fix the criterion, the candidates are
    measured on the held-out windows and the one with the least loss is planned. Without text this is `apply`.

    Raises RecipeError for wrong parameters and options, RefusedError where the edit has no meaning for the model,
    OutputError where the files beside the output were made from other inputs or settings.
    """
    options.check()
    declared = checked_operation(operation, parameters)
    plan = model if isinstance(model, Plan) else plan_of(open_checkpoint(str(model)))
    values = dict(parameters)
    if not needs_run(declared, values, options):
        return Calibrated(apply(plan, operation, **values), (RecipeStep(operation, values),))
    if not declared.takes_statistics:
        raise RecipeError(f"{operation} is not calibrated on text", "leave text out")
    fits = declared.text.neurons is not None
    settings = options.run_settings(int(values.get("seed", 0)), declared.text.repair, fits=fits)
    settings.check()
    for name in _own_texts(declared, values):
        declared.text.statistics(plan, values)  # raises for an impossible edit before the model runs
        run = read_calibration(settings, plan, [values[name]], options.tokens)
        beside = Path(f"{output or f'{plan.checkpoint.name}-{operation}'}.{name}")
        values[name] = CalibrationCache(beside, run, force, reporter).statistics(NeededStatistics())
    held_out: list[Domain] = []
    if options.heldout and not options.no_heldout:
        held_out = replace(settings, limit=options.limit, seed=None).domains(plan.checkpoint, options.heldout)
    cache: CalibrationCache | None = None
    if options.text:
        keep_out = 0 if options.heldout or options.no_heldout else HELD_OUT_SHARE
        run = read_calibration(settings, plan, options.text, options.tokens, keep_out)
        held_out = held_out or run.held_out
        cache = CalibrationCache(Path(output or f"{plan.checkpoint.name}-{operation}"), run, force, reporter)
        values = _with_statistics(values, declared.text, cache)
    measured = HeldOutLosses(settings, held_out, reporter)
    plans = {ORIGINAL: plan}
    chosen: str | None = None
    if held_out and declared.text.candidates is not None:
        candidates = {c.name: c for c in declared.text.candidates(plan, values)}
        planned = _planned(plan, list(candidates.values()), reporter)
        if planned:
            plans |= planned
            measured.add(plans)
            chosen = measured.cheapest(planned)
            values = dict(candidates[chosen].parameters)
    fitted = _with_fits(values, declared.text, cache, _number(options.ridge)) if cache else values
    final = chosen if fitted == values else None  # the candidate that is the edit as it stands
    edited = plans[final] if final else apply(plan, operation, **fitted)
    values = fitted
    steps = [RecipeStep(operation, values)]
    if held_out:
        usual = [Variant(declared.name, declared.name, values)]
        variants = declared.text.variants(plan, values) if declared.text.variants else usual
        if final:  # which was measured among others of its kind
            variants = [variant for variant in variants if variant.operation != operation]
        plans |= _planned(plan, variants, reporter, (steps[0], edited))
    if chosen:
        edited = _with_choice(edited, measured.outcome(chosen))
    repaired = edited
    repair = options.repair(declared.text.repair)
    if repair is not None and cache is not None:
        steps.append(RecipeStep("refit", {"repair": cache.repair(edited, repair)}))
        repaired = apply(edited, "refit", **steps[-1].parameters)
        name = final or values.get(declared.text.named_by, operation)
        plans[f"{name}, refit {repair.kind}"] = repaired
    if not held_out:
        return Calibrated(repaired, tuple(steps))
    measured.add(plans)
    return Calibrated(repaired, tuple(steps), measured.outcome(chosen))


def needs_run(operation: Operation, values: Values, options: CalibrationOptions) -> bool:
    """Return whether a model has to be run over text for an edit, or to measure it."""
    return bool(options.text or options.heldout or _own_texts(operation, values))


def _own_texts(operation: Operation, values: Values) -> list[str]:
    """Return the parameters that name a text where its statistics are wanted."""
    return [name for name in operation.text.own_text if name in values and not values[name].endswith(SUFFIX)]


def _with_statistics(values: Values, needs: TextNeeds, cache: CalibrationCache) -> dict[str, Any]:
    """Return the parameters with statistics, where they are needed."""
    statistics = needs.statistics(cache.run.plan, values)
    if statistics is None or "stats" in values:
        return dict(values)
    return {**values, "stats": cache.statistics(statistics)}


def _with_fits(values: Values, needs: TextNeeds, cache: CalibrationCache, ridge: float | None) -> dict[str, Any]:
    """Return the parameters with a fit for the groups that statistics give, or for neurons, where one is needed."""
    plan = cache.run.plan
    groups = needs.groups(plan, values) if needs.groups else None
    if groups is not None:
        return {**values, "fit": cache.group_fits(groups)}
    neurons = needs.neurons(plan, values) if needs.neurons else None
    if neurons is not None:
        return {**values, "fit": cache.neuron_fit(neurons, ridge)}
    return dict(values)


def _planned(
    plan: Plan, variants: Sequence[Variant], reporter: Reporter, made: tuple[RecipeStep, Plan] | None = None
) -> dict[str, Plan]:
    """Return the plans of edits by name, without those that are refused. `made` is a step that is not planned again."""
    plans = {}
    for variant in variants:
        step = RecipeStep(variant.operation, dict(variant.parameters))
        try:
            plans[variant.name] = (
                made[1] if made and step == made[0] else apply(plan, step.operation, **step.parameters)
            )
        except SurgeryError as error:
            reporter.note(f"{variant.called} is not measured: {error.message}")
    return plans


def _with_choice(edited: Plan, measured: HeldOut) -> Plan:
    """Return a plan whose last step records what it was chosen from, for the card and the provenance record."""
    step = edited.steps[-1]
    base = measured.nats[ORIGINAL]
    costs = ", ".join(
        f"{name} {measured.nats[name] - base:+.4f} ({low:+.4f} to {high:+.4f})"
        for name, (low, high) in measured.intervals.items()
    )
    note = f"{measured.chosen} costs least on {measured.tokens:,} held-out tokens, in nats with 95 % intervals: {costs}"
    step = replace(step, report={**step.report, "candidates": asdict(measured)}, notes=(*step.notes, note))
    return replace(edited, steps=(*edited.steps[:-1], step))
