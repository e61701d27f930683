"""What scales chosen by the squares of inputs gain over those of the largest numbers: a table of docs/quantised.md.

    python benchmarks/quantised_scales.py MODEL FOLDER --text CALIBRATION… --heldout OTHER… [--forms int4 nvfp4]

Quantises MODEL into FOLDER by `convert --quantize`: plain, with `--stats` of `collect --neurons` (down-projections),
and with an imatrix (all projections of experts). Printed is what each adds to the loss on held-out text, in nats per
token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quantised_loss import above

from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.imatrix_sums import ImatrixSums
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.loss import losses, mean_loss
from moesurgery.forward.tokens import joined
from moesurgery.stats.imatrix_file import save_imatrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--forms", nargs="+", default=["int4", "nvfp4"])
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--limit", type=int, default=6)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = RunSettings(limit=options.limit)
    plan = plan_of(open_checkpoint(options.model))
    domains = settings.domains(plan.checkpoint, options.heldout)
    windows = joined([domain.as_tokens for domain in domains])
    run = read_calibration(RunSettings(), plan, options.text, options.tokens)
    neurons, imatrix = options.folder / "neurons.safetensors", options.folder / "imatrix.gguf"
    seen = ImatrixSums()
    collect(RunSettings().engine(plan, run.windows), run.windows, neurons=True, imatrix=seen).save(neurons)
    save_imatrix(imatrix, seen.arrays(), [], 1, settings.window)
    base = mean_loss(losses(settings.engine(plan, windows), domains))
    print(f"plain weights: {base.nats:.4f}\n\n| form | scales | loss | adds |\n| --- | --- | --- | --- |")
    kinds = {"largest number": {}, "`collect --neurons`": {"stats": str(neurons)}, "imatrix": {"stats": str(imatrix)}}
    for form in options.forms:
        for kind, given in kinds.items():
            out = options.folder / "out"
            quantised = apply(plan, "convert", quantize=form, **given)
            write_plan(quantised, out, WriteOptions(force=True, durable=False))
            found = mean_loss(losses(settings.engine(plan_of(open_checkpoint(out)), windows), domains))
            print(f"| {form} | {kind} | {found.nats:.4f} | {above(found, base)} |", flush=True)


if __name__ == "__main__":
    main()
