"""Options of operations that take statistics: collect them first, and measure the outcome before anything is written.

`rescale MODEL --top-k 3 --scale measured --text F` is `collect MODEL --top-k 3 --text F -o S` followed by
`rescale MODEL --top-k 3 --scale measured --stats S`. `merge-experts` runs the model a second time, when it is known
which experts go together, and leaves what it found of them in a file of its own. On held-out text, `rescale` measures
every rule, other operations what they cost, and `merge-experts` what dropping as many experts would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.cli import _group_fit, _run_options
from moesurgery.cli._cache import CalibrationCache
from moesurgery.cli._console import console
from moesurgery.cli._writing import WriterFlags
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.reader import RecipeStep
from moesurgery.recipe.registry import Operation, apply

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.text_windows import Domain

PARAMETER = "stats"
MERGE_EXPERTS = "merge-experts"
HELD_OUT_SHARE = 4  # one window in so many of the text is kept for measuring
HELD_OUT_WINDOWS = 20
KINDS = ("none", "scalar", "expert", "down", "all")
AUTO = "auto"

_Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help=f"Collect the statistics first, on {measuring.FORMS}; FILE=3 for three times the tokens; repeat for more.",
    ),
]
_HeldOut = Annotated[
    list[str] | None,
    typer.Option("--heldout", help="Text to measure the outcome on; a quarter of --text is kept for it by default."),
]
_Refit = Annotated[
    str | None,
    typer.Option(
        "--refit",
        help="Repair the outcome by least squares on --text: none, scalar, expert, down or all."
        " [default: none; down for merge-experts]",
    ),
]
_Ridge = Annotated[
    str,
    typer.Option("--ridge", help="How strongly --refit is drawn to no change: a number, or auto, by held-out windows."),
]
_Sweeps = Annotated[int, typer.Option("--sweeps", min=1, help="How often --refit down and all go over the experts.")]
_Limit = Annotated[int, typer.Option("--limit", min=1, help="Windows per file of --heldout at most.")]
_NoHeldOut = Annotated[bool, typer.Option("--no-heldout", help="Do not measure the outcome.")]

OPTIONS: dict[str, tuple[Any, Any]] = {
    "text": (_Texts, None),
    "refit": (_Refit, None),
    "ridge": (_Ridge, AUTO),
    "sweeps": (_Sweeps, 1),
    "heldout": (_HeldOut, None),
    "limit": (_Limit, HELD_OUT_WINDOWS),
    "no_heldout": (_NoHeldOut, False),
    "window": (_run_options.Window, 512),
    "tokens": (_run_options.CalibrationTokens, _run_options.TOKENS),
    "dtype": (_run_options.DtypeOption, _run_options.AUTO),
    "device": (_run_options.DeviceOption, "cpu"),
    "memory": (_run_options.Memory, ""),
    "apart": (_run_options.Apart, False),
    "assistant_only": (_run_options.AssistantOnly, False),
}


def takes_statistics(found: Operation) -> bool:
    return PARAMETER in found.parameters


@dataclass(frozen=True)
class Calibration:
    """The options above, as they were given."""

    text: list[str] | None = None
    refit: str | None = None
    ridge: str = AUTO
    sweeps: int = 1
    heldout: list[str] | None = None
    limit: int = HELD_OUT_WINDOWS
    no_heldout: bool = False
    window: int = 512
    tokens: int = _run_options.TOKENS
    dtype: str = _run_options.AUTO
    device: str = "cpu"
    memory: str = ""
    apart: bool = False
    assistant_only: bool = False

    def check(self) -> None:
        if self.refit not in (None, *KINDS):
            raise RecipeError(f"--refit is {self.refit!r}, expected one of {', '.join(KINDS)}")
        if self.refit not in (None, "none") and not self.text:
            raise RecipeError("--refit needs text to fit on", "give --text FILE")
        if self.ridge != AUTO and _number(self.ridge) is None:
            raise RecipeError(f"--ridge is {self.ridge!r}, expected {AUTO} or a number that is not negative")

    def options(self, operation: str) -> RepairOptions | None:
        """Return how to repair: a merge, which costs more than a drop, is repaired unless told not to be."""
        from moesurgery.fitting.layer_fit import RepairOptions

        kind = self.refit or ("down" if operation == MERGE_EXPERTS and self.text else "none")
        return None if kind == "none" else RepairOptions(kind, _number(self.ridge), self.sweeps)  # type: ignore[arg-type]

    def run(self, seed: int, operation: str) -> _run_options.Run:
        dtype = self.dtype
        if dtype == _run_options.AUTO and self.options(operation) is not None:
            dtype = "float32"  # what is fitted is small beside what rounding leaves
        return _run_options.Run(
            self.window, None, seed, self.device, dtype, self.memory, self.apart, self.assistant_only
        )


def _number(text: str) -> float | None:
    """Return a number from zero on; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


@dataclass(frozen=True)
class Prepared:
    """The steps of the recipe, with statistics as a parameter, and what was measured, for the JSON answer."""

    steps: tuple[RecipeStep, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    found: Operation, model: str, values: Mapping[str, Any], given: Calibration, flags: WriterFlags
) -> Prepared:
    """Run what the options ask for. Without --text and --heldout nothing is run."""
    given.check()
    values = dict(values)
    if not given.text and not given.heldout:
        return Prepared((RecipeStep(found.name, values),))
    plan = plan_of(open_checkpoint(model))
    run = given.run(int(values.get("seed", 0)), found.name)
    run.check()
    held_out: list[Domain] = []
    if given.heldout and not given.no_heldout:
        held_out = replace(run, limit=given.limit, seed=None).domains(plan.checkpoint, given.heldout)
    name = flags.output or Path(f"{plan.checkpoint.name}-{found.name}")
    beside: CalibrationCache | None = None
    if given.text:
        keep = 0 if given.heldout or given.no_heldout else HELD_OUT_SHARE
        windows, kept = run.calibration(plan.checkpoint, given.text, given.tokens, keep)
        held_out = held_out or kept
        if found.name == MERGE_EXPERTS:
            _group_fit.check_merge(plan, values)
        check_possible(plan, found, values)
        beside = CalibrationCache(name, plan, windows, run, given.text, flags.force)
        if PARAMETER not in values and not _names_experts(values):
            values[PARAMETER] = str(beside.statistics(**_asked(plan, found, values)))
        if found.name == MERGE_EXPERTS:
            values = _group_fit.with_fit(beside, values)
    steps = [RecipeStep(found.name, values)]
    edited = apply(plan, found.name, **values)
    plans = {"original": plan}
    if held_out:
        plans |= every_rule(plan, values) if found.name == "rescale" else {found.name: edited}
        plans |= _group_fit.the_drop(plan, values) if found.name == MERGE_EXPERTS else {}
    options = given.options(found.name)
    if options is not None:
        assert beside is not None
        repair = str(beside.repair(edited, options))
        steps.append(RecipeStep("refit", {"repair": repair}))
        plans[f"{values.get('scale', found.name)}, refit {options.kind}"] = apply(edited, "refit", repair=repair)
    if not held_out:
        return Prepared(tuple(steps))
    measured = measure(plans, run, held_out)
    if not flags.as_json:
        show(measured, "rule" if found.name == "rescale" else "")
    return Prepared(tuple(steps), {"heldout": measured})


def check_possible(plan: Plan, found: Operation, values: Mapping[str, Any]) -> None:
    """Refuse what no statistics could make possible before the model runs over any text."""
    if found.name == "drop-experts":
        apply(plan, found.name, **{k: v for k, v in values.items() if k in ("experts", "keep", "count")}, by="random")
    elif found.name == "rescale" and "top_k" in values:
        apply(plan, found.name, top_k=values["top_k"], scale="none")


def _names_experts(values: Mapping[str, Any]) -> bool:
    """Whether experts are chosen by their numbers, so that no statistics are needed."""
    return "experts" in values or not isinstance(values.get("keep", 0), int)


def _asked(plan: Plan, found: Operation, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an operation needs beyond the usual sums, as parameters of `CalibrationCache.statistics`."""
    by_recon = values.get("by") == "recon"
    return {
        "top_k": [values["top_k"]] if "top_k" in found.parameters else [],
        "recon": [values.get("keep", plan.anatomy.experts - values.get("count", 0))] if by_recon else [],
        "every_expert": found.name == MERGE_EXPERTS and _group_fit.compares_all(values),
    }


def every_rule(plan: Plan, values: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the plan of every rule of `rescale` that can be had, and of the factor that was asked for."""
    from moesurgery.surgery.rescale.rules import DATA_RULES, Rule

    rules = [r for r in get_args(Rule) if r not in DATA_RULES or values.get(PARAMETER)]
    plans = {"original": plan}
    for rule in [*rules, *({values["scale"]} - set(rules) if "scale" in values else ())]:
        try:
            plans[str(rule)] = apply(plan, "rescale", **{**values, "scale": rule})
        except SurgeryError as error:
            console.note(f"--scale {rule} is not measured: {error.message}")
    return plans


def measure(plans: Mapping[str, Plan], run: _run_options.Run, domains: list[Domain]) -> dict[str, Any]:
    """Return the held-out loss of every plan; none of them is written."""
    from moesurgery.forward.loss import losses, mean_loss

    found: dict[str, float] = {}
    windows = sum(d.windows.numel() for d in domains)
    tokens = 0
    with console.progress("measuring", windows * len(plans), of_bytes=False) as watch:
        for name, variant in plans.items():
            loss = mean_loss(losses(run.engine(variant), domains))
            found[name], tokens = loss.nats, loss.tokens
            watch.progress(windows)
    return {"tokens": tokens, "nats": found}


def show(measured: Mapping[str, Any], title: str) -> None:
    """Print what the variants cost, the cheapest first."""
    nats = dict(measured["nats"])
    base = nats.pop("original")
    console.table(
        (title, "held-out loss", "over the original"),
        [(name, f"{n:.4f}", f"{n - base:+.4f}") for name, n in sorted(nats.items(), key=lambda item: item[1])],
        right=(1, 2),
    )
    console.result(f"nats per token over {measured['tokens']:,} predicted tokens; the original has {base:.4f}")
    console.result()
