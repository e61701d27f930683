"""Which experts to drop, which of their neurons to keep, which factor to take without text: docs/measure-tables.md.

    python benchmarks/choices.py MODEL --text CALIBRATION… --heldout OTHER… --count 16 32 [--by gram hope…]
    python benchmarks/choices.py MODEL --text CALIBRATION… --heldout OTHER… --width 48 32 [--refit]
    python benchmarks/choices.py MODEL --heldout OTHER… --top-k 4 6 12 16 [--rho 0 0.1 0.2]

Prints by how much the loss on the first `--limit` windows of each held-out file is above the original's, in nats per
token, with its 95 % bootstrap interval over windows. Statistics are collected once, of `--tokens` tokens, or taken
from `--stats`. With `--width` the rows are neurons kept by each criterion, with down-projections as they were and
solved, and with `--refit` repaired layer by layer (`--refit down`) too. With `--top-k` the rows are no factor, the
default of `rescale`, and the factor for each `--rho`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.layer_fit import RepairOptions
from moesurgery.fitting.reporter import SILENT
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.bootstrap import interval
from moesurgery.forward.loss import losses, mean_loss
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import find_operation
from moesurgery.stats.criteria import CRITERIA
from moesurgery.surgery.choose_experts import FreeCriterion
from moesurgery.surgery.choose_neurons import NeuronCriterion

FREE = get_args(FreeCriterion)
_SLIM = "slim-experts"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--stats", help="statistics that `moesurgery collect` made, instead of --text")
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, nargs="*", default=[])
    parser.add_argument("--by", nargs="+", default=[*CRITERIA, *FREE])
    parser.add_argument("--width", type=int, nargs="*", default=[])
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--top-k", type=int, nargs="*", default=[])
    parser.add_argument("--rho", type=float, nargs="*", default=[0.0, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    plan = plan_of(open_checkpoint(given.model))
    run = RunSettings(given.window, None, 0, given.device, "float32")
    held_out = RunSettings(given.window, given.limit, None, given.device, "float32").domains(
        plan.checkpoint, given.heldout
    )

    def by_window(variant: Plan) -> np.ndarray:
        return mean_loss(losses(run.engine(variant, held_out[0].as_tokens), held_out)).by_window

    base = by_window(plan)
    print(f"{sum(domain.tokens for domain in held_out):,} tokens held out, loss {base.mean():.4f}")

    def show(name: str, variant: Plan) -> None:
        over = by_window(variant) - base
        low, high = interval(over)
        print(f"{name:<28} {over.mean():+.4f}  {low:+.4f} to {high:+.4f}", flush=True)

    for top_k in given.top_k:
        show(f"top-k {top_k} none", apply(plan, "rescale", top_k=top_k, scale="none"))
        show(f"top-k {top_k} default", apply(plan, "rescale", top_k=top_k))
        for rho in given.rho:
            show(f"top-k {top_k} rho {rho:g}", apply(plan, "rescale", top_k=top_k, rho=rho))
    with tempfile.TemporaryDirectory() as place:
        stats = given.stats
        if (given.count and not stats) or given.width:
            calibration = read_calibration(run, plan, given.text, given.tokens)
        if (given.count or given.width) and not stats:
            collected = collect(run.engine(plan, calibration.windows), calibration.windows, neurons=bool(given.width))
            stats = str(collected.save(Path(place, "stats")))
        for count in given.count:
            for by in given.by:
                known = {} if by in FREE else {"stats": stats}
                show(f"{count} dropped by {by}", apply(plan, "drop-experts", count=count, by=by, **known))
        for width in given.width:
            for by in get_args(NeuronCriterion):
                show(f"{width} by {by}", apply(plan, _SLIM, width=width, by=by, stats=stats))
                cache = CalibrationCache(Path(place, f"{width}-{by}"), calibration, False, SILENT)
                fit = cache.neuron_fit(find_operation(_SLIM).text.neurons(plan, {"width": width, "by": by}), None)
                solved = apply(plan, _SLIM, width=width, fit=fit)
                show(f"{width} by {by}, solved", solved)
                if given.refit:
                    repair = cache.repair(solved, RepairOptions("down"))
                    show(f"{width} by {by}, solved, down", apply(solved, "refit", repair=repair))


if __name__ == "__main__":
    main()
