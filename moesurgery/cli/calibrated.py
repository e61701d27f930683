"""Options of operations that take statistics: collect them first, and measure the outcome before anything is written.

`rescale MODEL --top-k 3 --scale measured --text F` is `collect MODEL --top-k 3 --text F -o S` followed by
`rescale MODEL --top-k 3 --scale measured --stats S`. `merge-experts` runs the model a second time, when it is known
which experts go together, and leaves what it found of them in a file of its own. On held-out text, `rescale` measures
every rule, other operations what they cost, and `merge-experts` what dropping as many experts would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.cli import group_fit, measuring
from moesurgery.cli.collect import collect_stats, output_file
from moesurgery.cli.console import console
from moesurgery.cli.writing import WriterFlags
from moesurgery.errors import RecipeError, SurgeryError
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipes import RecipeStep
from moesurgery.surgery.operation import Operation, apply

if TYPE_CHECKING:
    from moesurgery.measure.text import Domain
    from moesurgery.measure.tokens import Tokens

PARAMETER = "stats"
MERGE = "merge-experts"
NAMED = {"experts", "keep"}  # experts chosen by number: no statistics are needed
HELD_OUT_SHARE = 4  # one window in so many of the text is kept for measuring
HELD_OUT_WINDOWS = 20
KINDS = ("none", "scalar", "expert", "down")
RIDGE = 0.1

_Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Calibration text or JSONL: collects the statistics first; repeat for more."),
]
_HeldOut = Annotated[
    list[Path] | None,
    typer.Option("--heldout", help="Text to measure the outcome on; a quarter of --text is kept for it by default."),
]
_Refit = Annotated[
    str | None,
    typer.Option(
        "--refit",
        help="Repair the outcome by least squares on --text: none, scalar, expert or down."
        " [default: none; down for merge-experts]",
    ),
]
_Ridge = Annotated[float, typer.Option("--ridge", min=0.0, help="How strongly --refit is drawn to no change.")]
_Sweeps = Annotated[int, typer.Option("--sweeps", min=1, help="How often --refit down goes over the experts.")]
_Limit = Annotated[int, typer.Option("--limit", min=1, help="Windows per file of --heldout at most.")]
_NoHeldOut = Annotated[bool, typer.Option("--no-heldout", help="Do not measure the outcome.")]

OPTIONS: dict[str, tuple[Any, Any]] = {
    "text": (_Texts, None),
    "refit": (_Refit, None),
    "ridge": (_Ridge, RIDGE),
    "sweeps": (_Sweeps, 1),
    "heldout": (_HeldOut, None),
    "limit": (_Limit, HELD_OUT_WINDOWS),
    "no_heldout": (_NoHeldOut, False),
    "window": (measuring.Window, 512),
    "tokens": (measuring.CalibrationTokens, measuring.TOKENS),
    "dtype": (measuring.Dtype, "float32"),
    "device": (measuring.Device, "cpu"),
}


def takes_statistics(found: Operation) -> bool:
    return PARAMETER in found.parameters


@dataclass(frozen=True)
class Calibration:
    """The options above, as they were given."""

    text: list[Path] | None = None
    refit: str | None = None
    ridge: float = RIDGE
    sweeps: int = 1
    heldout: list[Path] | None = None
    limit: int = HELD_OUT_WINDOWS
    no_heldout: bool = False
    window: int = 512
    tokens: int = measuring.TOKENS
    dtype: str = "float32"
    device: str = "cpu"

    def check(self) -> None:
        if self.refit not in (None, *KINDS):
            raise RecipeError(f"--refit is {self.refit!r}, expected one of {', '.join(KINDS)}")
        if self.refit not in (None, "none") and not self.text:
            raise RecipeError("--refit needs text to fit on", "give --text FILE")

    def repair(self, operation: str) -> str:
        """Return which repair an operation gets: a merge, which costs more than a drop, gets one unless told not to."""
        return self.refit or ("down" if operation == MERGE and self.text else "none")

    def run(self, seed: int) -> measuring.Run:
        return measuring.Run(self.window, None, seed, self.device, self.dtype)


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
    run = given.run(int(values.get("seed", 0)))
    run.check()
    held_out: list[Domain] = []
    if given.heldout and not given.no_heldout:
        held_out = replace(run, limit=given.limit, seed=None).domains(plan.checkpoint, given.heldout)
    name = flags.output or Path(f"{plan.checkpoint.name}-{found.name}")
    windows: Tokens | None = None
    if given.text:
        keep = 0 if given.heldout or given.no_heldout else HELD_OUT_SHARE
        windows, kept = run.calibration(plan.checkpoint, given.text, given.tokens, keep)
        held_out = held_out or kept
        if found.name == MERGE:
            group_fit.check_merge(plan, values)
        if PARAMETER not in values and not values.keys() & NAMED:
            target = output_file(name.with_name(f"{name.name}.stats"), force=flags.force)
            stats = collect_stats(plan, windows, run, given.text, **_asked(plan, found, values))
            stats.save(target)
            console.note(f"statistics of {windows.count:,} tokens are in {target}")
            values[PARAMETER] = str(target)
        if found.name == MERGE:
            fit = name.with_name(f"{name.name}.fit")
            values = group_fit.with_fit(plan, values, windows, run, given.text, fit, force=flags.force)
    steps = [RecipeStep(found.name, values)]
    edited = apply(plan, found.name, **values)
    plans = {"original": plan}
    if held_out:
        plans |= every_rule(plan, values) if found.name == "rescale" else {found.name: edited}
        plans |= group_fit.the_drop(plan, values) if found.name == MERGE else {}
    kind = given.repair(found.name)
    if kind != "none":
        assert windows is not None
        folder = name.with_name(f"{name.name}.refit")
        make_repair(kind, plan, edited, windows, run, given, folder, force=flags.force)
        steps.append(RecipeStep("refit", {"repair": str(folder)}))
        plans[f"{values.get('scale', found.name)}, refit {kind}"] = apply(edited, "refit", repair=str(folder))
    if not held_out:
        return Prepared(tuple(steps))
    measured = measure(plans, run, held_out)
    if not flags.as_json:
        show(measured, "rule" if found.name == "rescale" else "")
    return Prepared(tuple(steps), {"heldout": measured})


def make_repair(
    kind: str,
    plan: Plan,
    edited: Plan,
    windows: Tokens,
    run: measuring.Run,
    given: Calibration,
    folder: Path,
    *,
    force: bool,
) -> None:
    """Fit the edited model to the original, and leave the repair in a folder."""
    from moesurgery.measure.refit import Options, refit
    from moesurgery.measure.repair import RepairWriter

    options = Options(kind, given.ridge, given.sweeps)  # type: ignore[arg-type]
    original, other = run.engine(plan), run.engine(edited)
    writer = RepairWriter(folder, force=force)
    with console.progress("refitting", 2 * original.work(windows), of_bytes=False) as watch:
        refit(original, other, windows, options, writer.add, watch.progress)
    about: dict[str, Any] = {"kind": kind, "tokens": windows.count, "ridge": given.ridge, "sweeps": given.sweeps}
    writer.close(about | run.about(given.text or []))
    console.note(f"the repair is in {folder}")


def _asked(plan: Plan, found: Operation, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an operation needs beyond the usual sums, as parameters of `collect_stats`."""
    return {
        "top_k": [values["top_k"]] if "top_k" in found.parameters else [],
        "keep": [plan.anatomy.experts - values.get("count", 0)] if values.get("by") == "recon" else [],
        "every_expert": found.name == MERGE and group_fit.compares_all(values),
    }


def every_rule(plan: Plan, values: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the plan of every rule of `rescale` that can be had, and of the factor that was asked for."""
    from moesurgery.surgery.rules import DATA_RULES, Rule

    rules = [r for r in get_args(Rule) if r not in DATA_RULES or values.get(PARAMETER)]
    plans = {"original": plan}
    for rule in [*rules, *({values["scale"]} - set(rules) if "scale" in values else ())]:
        try:
            plans[str(rule)] = apply(plan, "rescale", **{**values, "scale": rule})
        except SurgeryError as error:
            console.note(f"--scale {rule} is not measured: {error.message}")
    return plans


def measure(plans: Mapping[str, Plan], run: measuring.Run, domains: list[Domain]) -> dict[str, Any]:
    """Return the held-out loss of every plan; none of them is written."""
    from moesurgery.measure.perplexity import losses, mean

    found: dict[str, float] = {}
    windows = sum(d.windows.numel() for d in domains)
    tokens = 0
    with console.progress("measuring", windows * len(plans), of_bytes=False) as watch:
        for name, variant in plans.items():
            loss = mean(losses(run.engine(variant), domains))
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
