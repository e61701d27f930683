"""What each choice of experts costs, and what each repair gives back: the tables of docs/measure.md, for any model.

    python benchmarks/repairs.py MODEL --text CALIBRATION… --heldout OTHER… [--count 2] [--by reap-sum…] [--refit down…]

Drops `count` experts of every layer by each criterion, with statistics of `--tokens` tokens of the texts, repairs the
outcome by each kind of `--refit`, and prints by how much the loss on the first `--limit` windows of each held-out file
is above the original's, in nats per token: the mean, and one column per file. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.cli.measuring import Run
from moesurgery.measure.collect import collect
from moesurgery.measure.perplexity import losses, mean
from moesurgery.measure.refit import Options, refit
from moesurgery.measure.repair import RepairWriter
from moesurgery.plan.plan import Plan


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--top-k", type=int, help="change the top-k instead of dropping experts; --by are rules then")
    parser.add_argument("--by", nargs="+", default=["reap-sum", "frequency", "reap"])
    parser.add_argument("--refit", nargs="*", default=["scalar", "expert", "down"])
    parser.add_argument("--ridge", type=float, help="found on held-out windows by default")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    plan = plan_of(open_checkpoint(given.model))
    run = Run(given.window, None, 0, given.device)
    windows, _ = run.calibration(plan.checkpoint, given.text, given.tokens)
    held_out = Run(given.window, given.limit, None, given.device).domains(plan.checkpoint, given.heldout)

    def loss(variant: Plan) -> list[float]:
        found = losses(run.engine(variant), held_out)
        return [mean(found).nats, *(f.nats for f in found)]

    base = loss(plan)
    tokens = sum(domain.tokens for domain in held_out)
    print(f"{windows.count:,} calibration tokens; {tokens:,} held out, loss {base[0]:.4f}")
    print(f"{'choice':<16} {'repair':<8}" + "".join(f"{d.name[-10:]:>11}" for d in held_out) + "        all  seconds")

    def show(choice: str, repair: str, variant: Plan, seconds: float) -> None:
        total, *each = (found - before for found, before in zip(loss(variant), base, strict=True))
        print(
            f"{choice:<16} {repair:<8}" + "".join(f"{x:>+11.4f}" for x in each) + f" {total:>+10.4f} {seconds:>8.0f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as place:
        recon = [plan.anatomy.experts - given.count] if "recon" in given.by else []
        stats = collect(run.engine(plan), windows, [given.top_k] if given.top_k else [], recon)
        file = str(stats.save(Path(place, "stats")))
        for choice in given.by:
            if given.top_k:
                edited = apply(plan, "rescale", top_k=given.top_k, scale=choice, stats=file)
            else:
                edited = apply(plan, "drop-experts", count=given.count, by=choice, stats=file)
            show(choice, "none", edited, 0)
            for kind in given.refit:
                folder = Path(place, f"{choice}-{kind}")
                writer = RepairWriter(folder)
                start = time.monotonic()
                options = Options(kind, given.ridge, given.sweeps)
                refit(run.engine(plan), run.engine(edited), windows, options, writer.add)
                seconds = time.monotonic() - start
                writer.close({"kind": kind, "tokens": windows.count})
                show(choice, kind, apply(edited, "refit", repair=str(folder)), seconds)


if __name__ == "__main__":
    main()
