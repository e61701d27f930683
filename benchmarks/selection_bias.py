"""What a fit of the selection bias gives back after experts were dropped: a table of docs/measure-tables.md.

    python benchmarks/selection_bias.py FOLDER --text TRAINING… --heldout OTHER… [--keep 12 8] [--refit none router all]

FOLDER/model is the GLM-4-MoE that `mtp_acceptance.py FOLDER --steps 2500` trains, 16 experts to a block, chosen by
sigmoid scores plus a bias. Drops experts by statistics, repairs the outcome by each kind of `--refit` (of which
`router` fits the biases too), and then changes the biases alone:

    before  as the original has them
    zero    no bias
    even    moved as in training, until the experts that are left are used evenly on the calibration text
    fitted  by the error of the layer's output against the original's, block after block, each on what the edited
            model gives it with all biases before it already fitted. The bias of one expert after the other is set to
            the best of a path of steps, as often as anything gets better: an exact search, with the outputs of all
            experts, where `--refit router` looks at one exchange per token. What even windows give is judged on odd
            ones, whole, halved and quartered; where none lessens the error there, the biases stay.

Prints the loss over the original's on held-out windows in nats per token, with 95 % intervals by bootstrap, that of the
biases' change alone, and for `fitted` by how much the error of the blocks' outputs fell, in the sum over blocks, on the
windows that they were fitted on and on the others. Models run in transformers' classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Glm4MoeForCausalLM

from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.bootstrap import interval
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import RepairWriter

STEPS = (0.03, 0.1, 0.3, 1.0)  # of a bias, up and down, over the standard deviation of all scores
SWEEPS = 4
Bias = torch.Tensor
Model = Any  # a Glm4MoeForCausalLM: torch knows no types of a module's parts


def blocks(model: Model) -> Iterator[Any]:
    return (layer for layer in model.model.layers if hasattr(layer.mlp, "gate"))


@contextmanager
def seen(module: torch.nn.Module, take: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `take` with what a module is given and what it returns, each [tokens, hidden]."""
    hook = module.register_forward_hook(lambda m, given, out: take(given[0].flatten(0, -2), out.flatten(0, -2)))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def through(model: Model, module: torch.nn.Module, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the inputs and outputs of a module for all tokens, [windows * length, hidden] each."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with seen(module, lambda given, out: found.append((given, out))):
        for part in windows.split(8):
            model.model(part, use_cache=False)
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


class Block:
    """One block of the edited model on its inputs: its scores [T, E], and the error of its routed output by token for
    any biases, as a quadratic form in the weights of the experts."""

    def __init__(self, mlp: Any, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        gate = mlp.gate
        self.top_k, self.normed, self.scaling = gate.top_k, gate.norm_topk_prob, gate.routed_scaling_factor
        assert gate.num_group == 1
        self.scores = (inputs @ gate.weight.T).sigmoid()
        outputs = []
        for into, back in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
            gated, up = (inputs @ into.T).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gated) * up) @ back.T)
        each = torch.stack(outputs, dim=1)  # [T, E, H]
        wanted = (self.weights(gate.e_score_correction_bias)[:, None] @ each)[:, 0] + missing
        self.square, self.along, self.rest = each @ each.mT, (each @ wanted[..., None])[..., 0], wanted.pow(2).sum(1)

    def weights(self, bias: Bias, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of each expert [T, E], zero for those that are not chosen."""
        scores = self.scores if rows is None else self.scores[rows]
        chosen = (scores + bias).topk(self.top_k, dim=1).indices
        taken = scores.gather(1, chosen)
        if self.normed:
            taken = taken / taken.sum(1, keepdim=True)
        return torch.zeros_like(scores).scatter(1, chosen, taken * self.scaling)

    def error(self, bias: Bias, rows: torch.Tensor) -> float:
        g = self.weights(bias, rows)
        by_token = ((self.square[rows] @ g[..., None])[..., 0] - 2 * self.along[rows]) * g
        return float((by_token.sum(1) + self.rest[rows]).sum(dtype=torch.float64))

    def solve(self, bias: Bias, rows: torch.Tensor) -> Bias:
        """Return biases with a lesser error on some tokens, or the same."""
        bias, least = bias.clone(), self.error(bias, rows)
        steps = self.scores.std() * torch.tensor([sign * step for step in STEPS for sign in (1, -1)])
        for _ in range(SWEEPS):
            before = least
            for expert in range(len(bias)):
                tried = bias.repeat(len(steps), 1)
                tried[:, expert] += steps
                errors = [self.error(each, rows) for each in tried]
                best = int(np.argmin(errors))
                if errors[best] < least:
                    bias, least = tried[best], errors[best]
            if least == before:
                break
        return bias

    def even(self, bias: Bias) -> Bias:
        """Return biases with which experts are used about evenly, moved as in training."""
        bias = bias.clone()
        for step in torch.logspace(-1, -4, 300) * self.scores.std():
            used = (self.weights(bias) > 0).float().sum(0)
            bias += step * (used.mean() - used).sign()
        return bias


def fit(original: Model, edited: Model, windows: torch.Tensor) -> tuple[float, float, float]:
    """Fit the biases of the edited model in place; return the sums over blocks of the squared error before, and of the
    changes on the tokens that were fitted on and on the others."""
    length = windows.shape[1]
    odd = (torch.arange(windows.numel()) // length) % 2 == 1
    even, other = (torch.nonzero(rows)[:, 0] for rows in (~odd, odd))
    every = torch.arange(windows.numel())
    sums = np.zeros(3)
    for layer, reference in zip(blocks(edited), blocks(original), strict=True):
        _, wanted = through(original, reference, windows)
        _, output = through(edited, layer, windows)
        inputs, _ = through(edited, layer.mlp, windows)
        with torch.no_grad():
            block = Block(layer.mlp, inputs, wanted - output)
            bias = layer.mlp.gate.e_score_correction_bias
            found, base = block.solve(bias, even), block.error(bias, other)
            judged = {share: block.error(bias + share * (found - bias), other) - base for share in (1.0, 0.5, 0.25)}
            share = min(judged, key=judged.__getitem__)
            sums += block.error(bias, every), block.error(found, even) - block.error(bias, even), min(0, judged[share])
            if judged[share] < 0:
                bias += share * (block.solve(bias, every) - bias)
    return float(sums[0]), float(sums[1]), float(sums[2])


def set_even(edited: Model, windows: torch.Tensor) -> None:
    for layer in blocks(edited):
        inputs, _ = through(edited, layer.mlp, windows)
        with torch.no_grad():
            bias = layer.mlp.gate.e_score_correction_bias
            bias.copy_(Block(layer.mlp, inputs, torch.zeros_like(inputs)).even(bias))


@torch.no_grad()
def losses(model: Model, windows: torch.Tensor) -> np.ndarray:
    return np.array([float(cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])) for ids in windows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 8])
    parser.add_argument("--by", default="gram")
    parser.add_argument("--refit", nargs="+", default=["none", "router", "all"])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--limit", type=int, default=50, help="windows of each held-out file, evenly spaced")
    given = parser.parse_args()
    folder, size = given.folder / "model", given.window
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    others = [torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8")).ids) for file in given.heldout]
    heldout = torch.stack(
        [ids[int(i) : int(i) + size] for ids in others for i in np.linspace(0, len(ids) - size, given.limit)]
    )
    plan = plan_of(open_checkpoint(folder))
    run = read_calibration(RunSettings(size, seed=0), plan, given.text, given.tokens)
    tokens = run.windows
    stats = str(collect(run.settings.engine(plan, tokens), tokens).save(given.folder / "bias-stats"))

    def load(edited: Plan) -> Model:
        write_plan(edited, given.folder / "edited", WriteOptions(force=True, durable=False))
        return Glm4MoeForCausalLM.from_pretrained(given.folder / "edited", dtype=torch.float32).eval()

    original = load(plan)
    assert all(bool(layer.mlp.gate.e_score_correction_bias.any()) for layer in blocks(original))
    base = losses(original, heldout)
    print(f"{tokens.count:,} calibration tokens; {heldout.numel():,} held out, loss {base.mean():.4f}\n")
    print("| experts | repair | biases | loss over the original | of the change | block error, fitted on | others |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for keep in given.keep:
        dropped = apply(plan, "drop-experts", keep=keep, by=given.by, stats=stats)
        unrepaired = load(dropped)
        for kind in given.refit:
            edited = dropped
            if kind != "none":
                writer = RepairWriter(given.folder / f"{keep}-{kind}")
                fit_layers(*run.settings.pair(plan, dropped, tokens), tokens, RepairOptions(kind), writer.add)
                writer.close({"kind": kind, "tokens": tokens.count})
                edited = apply(dropped, "refit", repair=str(given.folder / f"{keep}-{kind}"))
            before = None
            for biases in ("as repaired", "before", "zero", "even", "fitted"):
                model, errors = load(edited), ("", "")
                if biases in ("before", "zero"):
                    for layer, other in zip(blocks(model), blocks(unrepaired), strict=True):
                        bias = other.mlp.gate.e_score_correction_bias
                        layer.mlp.gate.e_score_correction_bias.copy_(bias * (biases == "before"))
                elif biases == "even":
                    set_even(model, tokens.ids)
                elif biases == "fitted":
                    total, inside, outside = fit(original, model, tokens.ids)
                    errors = f"{200 * inside / total:+.2f} %", f"{200 * outside / total:+.2f} %"  # of half the tokens
                found = losses(model, heldout)
                before = found if before is None else before
                over, change = (
                    f"{v.mean():+.4f} ({low:+.4f} to {high:+.4f})"
                    for v in (found - base, found - before)
                    for low, high in [interval(v)]
                )
                row = (keep, kind, biases, over, "" if biases == "as repaired" else change, *errors)
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
