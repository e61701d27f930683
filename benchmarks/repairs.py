"""What each edit costs, and what each repair gives back: tables of docs/measure-tables.md and surgery.md, for a model.

    python benchmarks/repairs.py MODEL --text CALIBRATION… --heldout OTHER… [--count 2] [--by reap-sum…] [--refit down…]

Drops `count` experts of every layer by each criterion, with statistics of `--tokens` tokens of the texts, repairs the
outcome by each kind of `--refit`, and prints by how much the loss on the first `--limit` windows of each held-out file
is above the original's, in nats per token: one column per file, the mean, and its 95 % interval by bootstrap over
windows. Nothing is left behind.

With `--top-k K` the edit is another top-k, and `--by` are rules of `rescale`. With `--to N` it is a merge, and `--by`
are ways to merge: a group with parameters, such as `msmoe,router=lse`, or `default`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.group_fit import fit_groups
from moesurgery.fitting.layer_fit import SWEEPS, RepairOptions, fit_layers
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.bootstrap import interval
from moesurgery.forward.engine import Engine
from moesurgery.forward.loss import losses, mean_loss
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan
from moesurgery.stats.group_fit_file import save_group_fits
from moesurgery.stats.repair_file import RepairWriter
from moesurgery.surgery import group_experts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--top-k", type=int, help="change the top-k instead of dropping experts; --by are rules then")
    parser.add_argument("--to", type=int, help="merge instead of dropping experts; --by are ways to merge then")
    parser.add_argument("--by", nargs="+", help="reap-sum, frequency and reap, every rule, or the default merge")
    parser.add_argument("--refit", nargs="*", default=["scalar", "expert", "router", "down", "all"])
    parser.add_argument("--ridge", type=float, help="found on held-out windows by default")
    parser.add_argument("--sweeps", type=int, help="over the experts; by default as the command's")
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def merged(plan: Plan, engine: Engine, windows: Tokens, way: str, to: int, place: Path, stats: str) -> Plan:
    """Merge by a way such as `msmoe,router=lse`, with the fit that it needs."""
    group, *parameters = way.split(",")
    values: dict[str, Any] = {"to": to, **dict(p.split("=") for p in parameters)}
    if group != "default":
        values["group"] = group
    if values.get("weights") not in ("equal", "router-norm") or group != "router-rows":
        values["stats"] = stats
    merge = group_experts.merger(plan, **values, fitted=True)
    if merge.needs_fit:
        values["fit"] = str(place / f"{way}.safetensors")
        save_group_fits(Path(values["fit"]), fit_groups(engine, windows, merge), merge, {"tokens": windows.count})
    return apply(plan, "merge-experts", **values)


def main() -> None:
    given = arguments()
    usual = ["none", "measured", "measured-expert"] if given.top_k else ["reap-sum", "frequency", "reap"]
    choices = given.by or (["default"] if given.to else usual)
    plan = plan_of(open_checkpoint(given.model))
    run = RunSettings(given.window, None, 0, given.device, "float32")
    windows = read_calibration(run, plan, given.text, given.tokens).windows
    held_out = RunSettings(given.window, given.limit, None, given.device, "float32").domains(
        plan.checkpoint, given.heldout
    )

    def loss(variant: Plan) -> tuple[list[float], np.ndarray]:
        found = losses(run.engine(variant, windows), held_out)
        return [mean_loss(found).nats, *(f.nats for f in found)], mean_loss(found).by_window

    base, base_windows = loss(plan)
    tokens = sum(domain.tokens for domain in held_out)
    print(f"{windows.count:,} calibration tokens; {tokens:,} held out, loss {base[0]:.4f}")
    wide = max(16, *(len(choice) for choice in choices))
    print(
        f"{'choice':<{wide}} {'repair':<8}"
        + "".join(f"{d.name[-10:]:>11}" for d in held_out)
        + "        all     95 % interval    seconds"
    )

    def show(choice: str, repair: str, variant: Plan, seconds: float) -> None:
        found, by_window = loss(variant)
        total, *each = (after - before for after, before in zip(found, base, strict=True))
        low, high = interval(by_window - base_windows)
        print(
            f"{choice:<{wide}} {repair:<8}"
            + "".join(f"{x:>+11.4f}" for x in each)
            + f" {total:>+10.4f}  {low:+.4f} to {high:+.4f} {seconds:>8.0f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as place:
        recon = [plan.anatomy.experts - given.count] if "recon" in choices else []
        other = [given.top_k] if given.top_k else []
        stats = collect(run.engine(plan, windows), windows, other, recon, every_expert=given.to is not None)
        file = str(stats.save(Path(place, "stats")))
        for choice in choices:
            if given.to:
                edited = merged(plan, run.engine(plan, windows), windows, choice, given.to, Path(place), file)
            elif given.top_k:
                edited = apply(plan, "rescale", top_k=given.top_k, scale=choice, stats=file)
            else:
                edited = apply(plan, "drop-experts", count=given.count, by=choice, stats=file)
            show(choice, "none", edited, 0)
            for kind in given.refit:
                folder = Path(place, f"{choice}-{kind}")
                writer = RepairWriter(folder)
                start = time.monotonic()
                options = RepairOptions(kind, given.ridge, given.sweeps or SWEEPS[kind])
                fit_layers(*run.pair(plan, edited, windows), windows, options, writer.add)
                seconds = time.monotonic() - start
                writer.close({"kind": kind, "tokens": windows.count})
                show(choice, kind, apply(edited, "refit", repair=str(folder)), seconds)


if __name__ == "__main__":
    main()
