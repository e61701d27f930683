"""What dropping experts costs the drafts of a prediction (MTP) layer: the table of docs/surgery.md.

    python benchmarks/mtp_acceptance.py FOLDER --text TRAINING… --heldout OTHER…

Trains a byte-level BPE and a small GLM-4-MoE with one prediction layer, as in section 2.2 of arXiv 2412.19437 (loss
weight 0.3, embedding and head shared, router biases moved towards even use of experts), into FOLDER/model; one that is
there is taken as it is. Then drops experts, those of the trunk by statistics and those of the prediction layer by
statistics, by router norms (statistics that lack the layer) and at random, writes each outcome and reads it back.

Prints the trunk's loss on held-out text in nats per token and the acceptance, the mean over positions t of
sum over v of min(p(v), q(v)): p is the trunk's distribution of token t + 2 given those up to t + 1, q the prediction
layer's. That is the probability with which speculative sampling (arXiv 2211.17192) takes over the first drafted token,
here on given text, not on text that the model wrote. Models run in transformers' classes and plain torch, not in
moesurgery's engine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.collector import collect
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.bootstrap import interval
from moesurgery.plan.plan import Plan

TOKENIZER = "tokenizer.json"
OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
RATE = 4e-3  # of learning, at most
DRAWS = 5  # of experts at random


def with_prediction(model: Glm4MoeForCausalLM) -> nn.Module:
    """Make the last decoder layer a prediction layer, which the trunk no longer runs; return it."""
    width, layer = model.config.hidden_size, model.model.layers[-1]
    for name in ("enorm", "hnorm"):
        layer.add_module(name, nn.RMSNorm(width, model.config.rms_norm_eps))
    layer.eh_proj = nn.Linear(2 * width, width, bias=False)
    nn.init.normal_(layer.eh_proj.weight, std=model.config.initializer_range)
    layer.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(width, model.config.rms_norm_eps)})
    model.config.num_hidden_layers -= 1  # as many of its layers the model runs
    return layer


def logits_of(model: Glm4MoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the trunk [B, S, V] and of the prediction layer [B, S - 1, V] for token ids [B, S].

    Those of the trunk at t are for token t + 1, those of the prediction layer for t + 2.
    """
    trunk, layer = model.model, model.model.layers[-1]
    states = trunk(ids, use_cache=False).last_hidden_state  # after the last norm
    both = torch.cat([layer.enorm(trunk.embed_tokens(ids[:, 1:])), layer.hnorm(states[:, :-1])], dim=-1)
    places = torch.arange(both.shape[1])[None]
    drafted = layer(
        layer.eh_proj(both),
        attention_mask=torch.full((both.shape[1],) * 2, -math.inf).triu(1)[None, None],
        position_ids=places,
        position_embeddings=trunk.rotary_emb(both, places),
    )
    return model.lm_head(states), model.lm_head(layer.shared_head["norm"](drafted))


def train_tokenizer(given: argparse.Namespace) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=given.vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file) for file in given.text], trainer)
    return tokenizer


def train(texts: Sequence[torch.Tensor], given: argparse.Namespace) -> Glm4MoeForCausalLM:
    """Return a model trained for `given.steps` batches of windows from random places of the texts."""
    torch.manual_seed(given.seed)
    config = Glm4MoeConfig(
        vocab_size=given.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,  # the last is the prediction layer
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        num_nextn_predict_layers=1,
    )
    model = Glm4MoeForCausalLM(config)
    with_prediction(model)
    used: dict[nn.Module, torch.Tensor] = {}  # how often each expert of a router was chosen

    def count(router: nn.Module, inputs: Any, outputs: Any) -> None:
        used[router] = torch.bincount(outputs[2].flatten(), minlength=config.n_routed_experts)

    for layer in model.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(count)
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, given.steps, pct_start=0.1, cycle_momentum=False)
    share, start = torch.tensor([float(len(text)) for text in texts]), time.monotonic()
    for step in range(given.steps):
        rows = [texts[i] for i in torch.multinomial(share, given.batch, replacement=True)]
        places = [int(torch.randint(len(row) - given.window, ())) for row in rows]
        ids = torch.stack([row[i : i + given.window] for row, i in zip(rows, places, strict=True)])
        trunk, drafted = logits_of(model, ids)
        loss = cross_entropy(trunk[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        further = cross_entropy(drafted[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
        optimiser.zero_grad()
        (loss + 0.3 * further).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        rate.step()
        for router, times in used.items():
            router.e_score_correction_bias += 1e-3 * (times.float().mean() - times).sign()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step}: {loss:.3f}, two ahead {further:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return model


def load(folder: Path) -> Glm4MoeForCausalLM:
    """Read the trunk and the decoder layer behind it with transformers, the rest of the prediction layer by name."""
    config = Glm4MoeConfig.from_pretrained(folder)
    config.num_hidden_layers += 1
    model = Glm4MoeForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    layer = with_prediction(model)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    where = f"model.layers.{model.config.num_hidden_layers}"
    layer.load_state_dict({f"{name}.weight": tensors[f"{where}.{name}.weight"] for name in OWN}, strict=False)
    return model.eval()


@torch.no_grad()
def measured(model: Glm4MoeForCausalLM, windows: torch.Tensor) -> np.ndarray:
    """Return the trunk's loss and the acceptance of each window [2, windows]."""
    found = []
    for ids in windows.split(1):
        trunk, drafted = (logits.double().log_softmax(-1) for logits in logits_of(model, ids))
        accepted = torch.minimum(trunk[:, 1:], drafted).exp().sum(-1).mean()
        found.append([float(cross_entropy(trunk[0, :-1], ids[0, 1:])), float(accepted)])
    return np.array(found).T


def chosen(plan: Plan) -> dict[str, list[int]]:
    return {layer["layer"]: layer["dropped"] for layer in plan.steps[-1].report["layers"]}


def shown(values: np.ndarray, sign: str = "") -> str:
    low, high = interval(values)
    return f"{values.mean():{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 8, 4])
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=49_152, help="tokens of --text that statistics are collected of")
    parser.add_argument("--limit", type=int, default=20, help="windows of each held-out file, evenly spaced")
    given = parser.parse_args()
    folder = given.folder / "model"
    trained = folder.exists()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER)) if trained else train_tokenizer(given)
    texts, others = (
        [torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8")).ids) for file in files]
        for files in (given.text, given.heldout)
    )
    if not trained:
        train(texts, given).save_pretrained(folder)
        tokenizer.save(str(folder / TOKENIZER))
    size = given.window
    starts = [int(i) for ids in others for i in np.linspace(0, len(ids) - size, given.limit)]
    windows = torch.stack([others[i // given.limit][start : start + size] for i, start in enumerate(starts)])

    plan = plan_of(open_checkpoint(folder))
    experts, last = plan.anatomy.experts, plan.anatomy.blocks[-1].layer_path
    run = read_calibration(RunSettings(size, seed=0), plan, given.text, given.tokens)
    stats = collect(run.settings.engine(plan, run.windows), run.windows)
    all_stats = str(stats.save(given.folder / "stats"))
    without = replace(stats, prediction={}, about={**stats.about, "prediction": []})
    trunk_stats = str(without.save(given.folder / "trunk-stats"))

    def after(edited: Plan) -> np.ndarray:
        write_plan(edited, given.folder / "edited", WriteOptions(force=True, durable=False))
        return measured(load(given.folder / "edited"), windows)

    print(f"{len(windows)} windows of {size} tokens, intervals 95 % by bootstrap over windows\n")
    print("| experts | those of the prediction layer by | loss | acceptance | over router norms |")
    print("| --- | --- | --- | --- | --- |")
    loss, accepted = measured(load(folder), windows)
    print(f"| {experts} | | {loss.mean():.4f} | {shown(accepted)} | |", flush=True)
    for keep in given.keep:
        drop = partial(apply, plan, "drop-experts")
        by_stats, by_norms = (drop(count=experts - keep, stats=file) for file in (all_stats, trunk_stats))
        draws = [drop(count=experts - keep, by="random", seed=seed) for seed in range(DRAWS)]
        trunk = chosen(by_stats)
        at_random = [drop(experts={**trunk, last: chosen(draw)[last]}) for draw in draws]
        base = after(by_norms)
        rows = {"statistics": after(by_stats), "router norms": base}
        for name, edits in (("random", at_random), ("random, the trunk's too", draws)):
            found = np.array([after(edited) for edited in edits])
            low, *_, high = sorted(found[:, 1].mean(axis=1))
            rows[f"{name}: mean of {DRAWS} draws, {low:.4f} to {high:.4f}"] = found.mean(axis=0)
        for name, (loss, accepted) in rows.items():
            over = "" if name == "router norms" else shown(accepted - base[1], "+")
            print(f"| {keep} | {name} | {loss.mean():.4f} | {shown(accepted)} | {over} |", flush=True)


if __name__ == "__main__":
    main()
