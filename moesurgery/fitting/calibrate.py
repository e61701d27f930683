"""An edit by data, from text to a plan: collect statistics, choose, edit, repair, and measure what it costs.

`calibrate(model, "rescale", {"top_k": 3, "scale": "measured"}, CalibrationOptions(text=["F"]))` is `moesurgery collect
MODEL --top-k 3 --text F -o S` followed by `moesurgery rescale MODEL --top-k 3 --scale measured --stats S`. What is
collected, whether the model runs a second time, and what is measured beside the edit, the operation declares
(`recipe.text_needs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.reporter import SILENT, Reporter
from moesurgery.fitting.run_settings import TOKENS, WINDOW, RunSettings
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
KINDS = ("none", "scalar", "expert", "down", "all")
AUTO = "auto"


@dataclass(frozen=True)
class CalibrationOptions:
    """What text to use, and for what; each field is the command line's option of its name.

    `text` are calibration files, of which `tokens` are read in windows of `window`; one window in four is kept out to
    measure the outcome on, or the first `limit` windows of each file of `heldout`, unless `no_heldout`. `refit` is the
    kind of repair (none, scalar, expert, down, all; None for what is usual with the operation), `ridge` a number, or
    "auto" to find it on held-out windows, and `sweeps` how often `down` and `all` go over the experts.
    """

    text: Sequence[str | Path] | None = None
    refit: str | None = None
    ridge: float | str = AUTO
    sweeps: int = 1
    heldout: Sequence[str | Path] | None = None
    limit: int = HELD_OUT_WINDOWS
    no_heldout: bool = False
    window: int = WINDOW
    tokens: int = TOKENS
    dtype: str = "float32"
    device: str = "cpu"

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
            if getattr(self, name) < least:
                raise RecipeError(f"--{name} is {getattr(self, name)}, expected {least} or more")

    def repair(self, usual: str) -> RepairOptions | None:
        """Return how to repair, `usual` being the kind where none is asked for; None for not at all."""
        from moesurgery.fitting.layer_fit import RepairOptions

        kind: Any = (self.refit or usual) if self.text else "none"
        return None if kind == "none" else RepairOptions(kind, _number(self.ridge), self.sweeps)

    def run_settings(self, seed: int) -> RunSettings:
        return RunSettings(self.window, None, seed, self.device, self.dtype)


def _number(value: float | str) -> float | None:
    """Return a number from zero on; None for anything else."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


@dataclass(frozen=True)
class HeldOut:
    """Nats per predicted token on held-out text, by name: "original", the edit, what it was compared with, repaired."""

    tokens: int
    nats: Mapping[str, float]


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

    `output` is where the plan is to be written: statistics, fits and repairs go beside it and are used again there;
    with `force` they are replaced. It is named after model and operation by default. Where experts are to be chosen
    by statistics that are yet to be collected, what none could make possible is refused before the model runs; the
    edit itself is planned once. Without text it is `apply`.

    Raises RecipeError for wrong parameters and options, RefusedError where the edit has no meaning for the model,
    OutputError where the files beside the output are of something else.
    """
    options.check()
    declared = checked_operation(operation, parameters)
    plan = model if isinstance(model, Plan) else plan_of(open_checkpoint(str(model)))
    values = dict(parameters)
    if not needs_run(declared, values, options):
        return Calibrated(apply(plan, operation, **values), (RecipeStep(operation, values),))
    if not declared.takes_statistics:
        raise RecipeError(f"{operation} has no parameter `stats`, so no text says anything of it", "leave text out")
    settings = options.run_settings(int(values.get("seed", 0)))
    settings.check()
    for name in _own_texts(declared, values):
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
        values = _with_measured(values, declared.text, cache)
    edited = repaired = apply(plan, operation, **values)
    steps = [RecipeStep(operation, values)]
    plans = {"original": plan}
    if held_out:
        plans |= _variants(plan, declared, values, edited, reporter)
    repair = options.repair(declared.text.repair)
    if repair is not None and cache is not None:
        steps.append(RecipeStep("refit", {"repair": cache.repair(edited, repair)}))
        repaired = apply(edited, "refit", **steps[-1].parameters)
        plans[f"{values.get(declared.text.named_by, operation)}, refit {repair.kind}"] = repaired
    return Calibrated(repaired, tuple(steps), _measure(plans, settings, held_out, reporter) if held_out else None)


def needs_run(operation: Operation, values: Values, options: CalibrationOptions) -> bool:
    """Return whether a model has to be run over text for an edit, or to measure it."""
    return bool(options.text or options.heldout or _own_texts(operation, values))


def _own_texts(operation: Operation, values: Values) -> list[str]:
    """Return the parameters that name a text where its statistics are wanted."""
    return [name for name in operation.text.own_text if name in values and not values[name].endswith(SUFFIX)]


def _with_measured(values: Values, needs: TextNeeds, cache: CalibrationCache) -> dict[str, Any]:
    """Return the parameters with statistics and, for the groups that these give, a fit, where they are needed."""
    values, plan = dict(values), cache.run.plan
    statistics = needs.statistics(plan, values)
    if statistics is not None and "stats" not in values:
        values["stats"] = cache.statistics(statistics)
    groups = needs.groups(plan, values) if needs.groups else None
    if groups is not None:
        values["fit"] = cache.group_fits(groups)
    return values


def _variants(plan: Plan, declared: Operation, values: Values, edited: Plan, reporter: Reporter) -> dict[str, Plan]:
    """Return the plans to measure, by name: `edited`, which is not planned again, and what is compared with it."""
    usual = [Variant(declared.name, declared.name, values)]
    plans = {}
    for variant in declared.text.variants(plan, values) if declared.text.variants else usual:
        try:
            same = (variant.operation, variant.parameters) == (declared.name, values)
            plans[variant.name] = edited if same else apply(plan, variant.operation, **variant.parameters)
        except SurgeryError as error:
            reporter.note(f"{variant.called} is not measured: {error.message}")
    return plans


def _measure(plans: Mapping[str, Plan], settings: RunSettings, domains: list[Domain], reporter: Reporter) -> HeldOut:
    """Return the held-out loss of every plan; none of them is written."""
    from moesurgery.forward.loss import losses, mean_loss

    windows = sum(d.windows.numel() for d in domains)
    by_name = {}
    with reporter.progress("measuring", windows * len(plans)) as progress:
        for name, plan in plans.items():
            by_name[name] = mean_loss(losses(settings.engine(plan), domains))
            progress(windows)
    return HeldOut(by_name["original"].tokens, {name: loss.nats for name, loss in by_name.items()})
