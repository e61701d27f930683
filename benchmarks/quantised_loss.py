"""What edits cost on a quantised model against the same on a plain one: the table of docs/quantised.md.

    python benchmarks/quantised_loss.py MODEL FOLDER --text CALIBRATION… --heldout OTHER… [--forms fp8-block int4]

Quantises MODEL into FOLDER, then prints the loss on held-out text, in nats per token, of the plain and the quantised
model: as they are, with a quarter of the experts dropped, one more expert per token, experts merged, a drop repaired
(`--refit down`), and a random LoRA adapter of rank 4 on all experts, alone and averaged with the model. The quantised
edits are written to disk and read back. Choices are made once, by statistics of the plain model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from moesurgery import CalibrationOptions, WriteOptions, apply, calibrate, open_checkpoint, plan_of, write_plan
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.comparison import over_interval
from moesurgery.forward.loss import Loss, losses, mean_loss
from moesurgery.forward.tokens import joined
from moesurgery.merge.merge_recipe import parse_merge_recipe
from moesurgery.plan.plan import Plan


def make_adapter(model: Path, folder: Path, rank: int = 4) -> None:
    """Write a random adapter of PEFT's form for every expert, its change 5 % of each weight's norm."""
    generator = torch.Generator().manual_seed(0)
    plan = plan_of(open_checkpoint(model))
    factors = {}
    for block in plan.anatomy.blocks:
        for member in block.members:
            if member.part and member.expert is not None:
                out, into = plan.tensors[member.name].shape
                a, b = (torch.randn(*s, generator=generator) for s in ((rank, into), (out, rank)))
                module = f"base_model.model.{member.name.removesuffix('.weight')}"
                size = 0.05 * 0.03 * (out * into) ** 0.5  # of weights whose entries are about 0.03
                factors[f"{module}.lora_A.weight"] = a
                factors[f"{module}.lora_B.weight"] = b * size / float((b @ a).norm())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [], "peft_version": "0.19.1"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def merged(model: Path, *others: str, method: str = "passthrough") -> Plan:
    weight = ", parameters: {weight: 0.5}" if method == "linear" else ""
    models = "\n".join(f"- {{model: {model}{other}{weight}}}" for other in others)
    return parse_merge_recipe(f"models:\n{models}\nmerge_method: {method}\n").plan()


def above(loss: Loss, base: Loss) -> str:
    """Return by how much a loss is above another, with its 95 % interval."""
    low, high = over_interval(base, loss)
    return f"{loss.nats - base.nats:+.4f} ({low:+.4f} to {high:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--forms", nargs="+", default=["fp8-block", "int4"])
    parser.add_argument("--rows", nargs="+", default=[""], help="edits to measure, by what they begin with")
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--limit", type=int, default=10)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = RunSettings(limit=options.limit)
    plain = plan_of(open_checkpoint(options.model))
    domains = settings.domains(plain.checkpoint, options.heldout)
    windows = joined([domain.as_tokens for domain in domains])
    stats = options.folder / "stats.safetensors"
    experts, top_k = plain.anatomy.experts, plain.anatomy.settings.top_k
    if not stats.exists():
        run = read_calibration(RunSettings(), plain, options.text, options.tokens)
        collect(RunSettings().engine(plain, run.windows), run.windows, [top_k + 1]).save(stats)
    adapter = options.folder / "adapter"
    make_adapter(options.model, adapter)
    known = str(stats)
    fewer = experts - experts // 4

    def refit(model: Path) -> Plan:
        repair = CalibrationOptions(text=options.text, refit="down", no_heldout=True, tokens=options.tokens)
        drop = {"count": experts // 4, "stats": known}
        return calibrate(model, "drop-experts", drop, repair, options.folder / f"{model.name}-refit", force=True).plan

    edits: dict[str, Callable[[Path], Plan]] = {
        "as it is": lambda model: plan_of(open_checkpoint(model)),
        f"drop {experts} to {fewer}": lambda model: apply(
            plan_of(open_checkpoint(model)), "drop-experts", count=experts // 4, stats=known
        ),
        f"rescale {top_k} to {top_k + 1}, in the weights": lambda model: apply(
            plan_of(open_checkpoint(model)), "rescale", top_k=top_k + 1, scale="measured", stats=known, where="weights"
        ),
        f"merge-experts {experts} to {fewer}": lambda model: apply(
            plan_of(open_checkpoint(model)), "merge-experts", to=fewer
        ),
        "LoRA": lambda model: merged(model, f"+{adapter}"),
        "merge with its LoRA": lambda model: merged(model, "", f"+{adapter}", method="linear"),
        f"drop {experts} to {fewer}, refit down": refit,
    }
    models = {"plain": options.model}
    for form in options.forms:
        models[form] = options.folder / f"{options.model.name}-{form}"
        write_plan(apply(plain, "convert", quantize=form), models[form], WriteOptions(force=True, durable=False))
    print(
        "| edit |", " | ".join(f"{name}, loss" for name in models), "| what quantising adds, with the 95 % interval |"
    )
    for edit, make in edits.items():
        if not edit.startswith(tuple(options.rows)):
            continue
        found = {}
        for name, model in models.items():
            plan = make(model)
            if name != "plain":
                out = options.folder / "out"
                write_plan(plan, out, WriteOptions(force=True, durable=False))
                plan = plan_of(open_checkpoint(out))
            found[name] = mean_loss(losses(settings.engine(plan, windows), domains))
        added = [f"{name} {above(found[name], found['plain'])}" for name in options.forms]
        print(
            f"| {edit} |",
            " | ".join(f"{loss.nats:.4f}" for loss in found.values()),
            f"| {', '.join(added)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
