"""Options of operations that take statistics: collect them first, and measure the outcome before anything is written.

`rescale MODEL --top-k 3 --scale measured --text F` is `collect MODEL --top-k 3 --text F -o S` followed by
`rescale MODEL --top-k 3 --scale measured --stats S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.cli import measuring
from moesurgery.cli.collect import collect_stats, stats_path
from moesurgery.cli.console import console
from moesurgery.cli.writing import WriterFlags
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.surgery.operation import Operation, apply
from moesurgery.surgery.rules import Rule

if TYPE_CHECKING:
    from moesurgery.measure.text import Domain

PARAMETER = "stats"
HELD_OUT_SHARE = 4  # one window in so many of the text is kept for measuring
HELD_OUT_WINDOWS = 20

_Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Calibration text or JSONL: collects the statistics first; repeat for more."),
]
_HeldOut = Annotated[
    list[Path] | None,
    typer.Option("--heldout", help="Text to measure the rules on; a quarter of --text is kept for it by default."),
]
_Limit = Annotated[int, typer.Option("--limit", min=1, help="Windows per file of --heldout at most.")]
_NoHeldOut = Annotated[bool, typer.Option("--no-heldout", help="Do not measure the rules.")]

OPTIONS: dict[str, tuple[Any, Any]] = {
    "text": (_Texts, None),
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
    heldout: list[Path] | None = None
    limit: int = HELD_OUT_WINDOWS
    no_heldout: bool = False
    window: int = 512
    tokens: int = measuring.TOKENS
    dtype: str = "float32"
    device: str = "cpu"

    def run(self, seed: int) -> measuring.Run:
        return measuring.Run(self.window, None, seed, self.device, self.dtype)


def prepare(
    found: Operation, model: str, values: Mapping[str, Any], given: Calibration, flags: WriterFlags
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an operation's parameters with statistics, and what was measured, for the JSON answer.

    Without --text and --heldout nothing is run.
    """
    values = dict(values)
    if not given.text and not given.heldout:
        return values, {}
    plan = plan_of(open_checkpoint(model))
    run = given.run(int(values.get("seed", 0)))
    run.check()
    held_out: list[Domain] = []
    if given.heldout and not given.no_heldout:
        held_out = replace(run, limit=given.limit, seed=None).domains(plan.checkpoint, given.heldout)
    if given.text:
        name = flags.output or Path(f"{plan.checkpoint.name}-{found.name}")
        target = stats_path(name.with_name(f"{name.name}.stats"), force=flags.force)
        keep = 0 if given.heldout or given.no_heldout else HELD_OUT_SHARE
        top_k = [values["top_k"]] if "top_k" in values else []
        stats, kept = collect_stats(plan, given.text, run, given.tokens, top_k, hold_out=keep)
        stats.save(target)
        console.note(f"statistics of {stats.about['tokens']:,} tokens are in {target}")
        values[PARAMETER] = str(target)
        held_out = held_out or kept
    if found.name != "rescale" or not held_out:
        return values, {}
    measured = measured_rules(plan, values, run, held_out)
    if not flags.as_json:
        show_rules(measured)
    return values, {"heldout": measured}


def measured_rules(plan: Plan, values: Mapping[str, Any], run: measuring.Run, domains: list[Domain]) -> dict[str, Any]:
    """Measure what every rule of `rescale` costs, writing none of them."""
    from moesurgery.errors import SurgeryError
    from moesurgery.measure.perplexity import losses, mean
    from moesurgery.surgery.rules import DATA_RULES

    rules = [r for r in get_args(Rule) if r not in DATA_RULES or values.get(PARAMETER)]
    plans = {"original": plan}
    for rule in [*rules, *({values["scale"]} - set(rules) if "scale" in values else ())]:
        try:
            plans[str(rule)] = apply(plan, "rescale", **{**values, "scale": rule})
        except SurgeryError as error:
            console.note(f"--scale {rule} is not measured: {error.message}")
    found: dict[str, float] = {}
    windows = sum(d.windows.numel() for d in domains)
    tokens = 0
    with console.progress("measuring the rules", windows * len(plans), of_bytes=False) as watch:
        for rule, variant in plans.items():
            loss = mean(losses(run.engine(variant), domains))
            found[rule], tokens = loss.nats, loss.tokens
            watch.progress(windows)
    return {"tokens": tokens, "nats": found}


def show_rules(measured: Mapping[str, Any]) -> None:
    """Print what the rules cost, the cheapest first."""
    nats = dict(measured["nats"])
    base = nats.pop("original")
    console.table(
        ("rule", "held-out loss", "over the original"),
        [(rule, f"{n:.4f}", f"{n - base:+.4f}") for rule, n in sorted(nats.items(), key=lambda item: item[1])],
        right=(1, 2),
    )
    console.result(f"nats per token over {measured['tokens']:,} predicted tokens; the original has {base:.4f}")
    console.result()
