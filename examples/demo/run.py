"""The main job on a trained model: count it, rescale it to top-3 under each rule, measure every result.

Run by `make demo`. Every step is a moesurgery command, printed before it runs; only the control, a copy whose
router rows are shuffled, is made here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
TEXT = [HERE / "heldout-code.txt", HERE / "heldout-manual.txt"]
RULES = ("router", "norm", "published", "none")
WINDOWS = 24  # of 512 tokens, per text


def moesurgery(*arguments: str | Path, capture: bool = False) -> str:
    """Run one command as a user would."""
    words = [
        str(a.relative_to(Path.cwd())) if isinstance(a, Path) and a.is_relative_to(Path.cwd()) else str(a)
        for a in arguments
    ]
    print(f"\n$ moesurgery {' '.join(words)}", flush=True)
    command = [str(Path(sys.executable).parent / "moesurgery"), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE if capture else None, text=True)
    return done.stdout if capture else ""


def shuffled_router(model: Path, output: Path) -> None:
    """Copy `model` with the rows of every router in another order: the control that has not learnt to route."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, output)
    generator = torch.Generator().manual_seed(0)
    for path in output.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith("block_sparse_moe.gate.weight")]:
            order = torch.randperm(len(tensors[name]), generator=generator)
            tensors[name] = tensors[name][order].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/demo")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    moesurgery("count-params", MODEL)
    for rule in RULES:
        quiet = [] if rule == "router" else ["-q"]
        moesurgery("rescale", MODEL, "--top-k", "3", "--scale", rule, "-o", out / f"top3-{rule}", *quiet)
    shuffled_router(MODEL, out / "shuffled-router")
    measured = {}
    models = {"original, top-2": MODEL}
    models |= {f"top-3, --scale {rule}": out / f"top3-{rule}" for rule in RULES}
    models["router rows shuffled"] = out / "shuffled-router"
    for label, model in models.items():
        answer = moesurgery("perplexity", model, *TEXT, "--limit", str(WINDOWS), "--json", capture=True)
        measured[label] = {d["name"]: d for d in json.loads(answer)["domains"]}
    base = measured["original, top-2"]["all"]["nats"]
    print(f"\nheld-out perplexity, {measured['original, top-2']['all']['tokens']:,} tokens of the Python library\n")
    print(f"{'':24} {'code':>9} {'manual':>9} {'all':>9} {'nats/token over the original':>30}")
    for label, domains in measured.items():
        code, manual, both = (domains[d]["perplexity"] for d in ("heldout-code", "heldout-manual", "all"))
        print(f"{label:24} {code:9.3f} {manual:9.3f} {both:9.3f} {domains['all']['nats'] - base:+30.4f}")
    print(f"\nthe outputs lie in {out}/: each loads with transformers, and moesurgery.json in it says what was done")


if __name__ == "__main__":
    main()
