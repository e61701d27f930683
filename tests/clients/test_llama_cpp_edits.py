"""Edits of a GGUF against llama.cpp itself: its converter on the same edit of the original, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moesurgery import open_checkpoint
from moesurgery.validate.difference import diff_checkpoints
from tests.clients import cases
from tests.clients.llama_cpp import INSTALLED, converted, log_probabilities, perplexity, trained_model
from tests.conftest import DEMO, Result
from tests.quantise import rewrite
from tests.tiny import load, read_tensors

pytestmark = INSTALLED
EXPERTS = "1,4"
Ok = Callable[..., Result]
TOLD_APART = {"name", "size_label", "tags", "moesurgery"}  # last parts of keys that converters make of folders' names


def assert_same(one: Path, other: Path) -> None:
    """Every tensor has the same bytes, every key that does not name the model the same value."""
    found = diff_checkpoints(open_checkpoint(one), open_checkpoint(other))
    assert not found.tensors
    assert {key.rpartition(".")[2] for key, *_ in found.config} <= TOLD_APART


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_drop_then_convert_is_convert_then_drop(kind: str, tmp_path: Path, ok: Ok) -> None:
    model = trained_model(tmp_path / "model")
    ok("drop-experts", model, "--experts", EXPERTS, "-o", tmp_path / "hf", "-q")
    whole, dropped = (converted(m, Path(f"{m}-{kind}"), kind) for m in (model, tmp_path / "hf"))
    ok("drop-experts", whole, "--experts", EXPERTS, "-o", tmp_path / "gguf", "-q", "--validate")
    assert_same(dropped, tmp_path / "gguf")


def test_prediction_layers_dropped_then_converted(tmp_path: Path, ok: Ok) -> None:
    """GLM-4.5 has one behind its stack; what the converter makes of the model without it is what `mtp drop` leaves."""
    changes = {
        **cases.EXPERTS,
        "n_routed_experts": 4,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    }
    cases.save(tmp_path / "trunk", "glm4_moe", changes)
    tensors = read_tensors(tmp_path / "trunk")
    layer = {n.replace(".layers.1.", ".layers.2."): t + 1 for n, t in tensors.items() if ".layers.1." in n}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        layer[f"model.layers.2.{name}.weight"] = torch.randn(128)
    layer["model.layers.2.eh_proj.weight"] = torch.randn(128, 256)
    rewrite(tmp_path / "trunk", tmp_path / "model", {**tensors, **layer}, {"num_nextn_predict_layers": 1})
    ok("mtp", "drop", tmp_path / "model", "-o", tmp_path / "hf", "-q")
    whole, dropped = (converted(tmp_path / m, tmp_path / f"{m}-f32", "f32") for m in ("model", "hf"))
    assert any("nextn" in name for name in open_checkpoint(whole).tensors)
    ok("mtp", "drop", whole, "-o", tmp_path / "gguf", "-q", "--validate")
    assert_same(dropped, tmp_path / "gguf")
    runs = tmp_path / "runs"
    runs.mkdir()
    whole.rename(runs / "whole.gguf")
    (tmp_path / "gguf" / whole.name).rename(runs / "dropped.gguf")
    found = log_probabilities(runs, cases.prompt())
    assert np.array_equal(found["whole"], found["dropped"])


def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, ok: Ok) -> None:
    """The perplexity of the pruned GGUF is that of the same prune in transformers, and so with a factor."""
    text = (DEMO.parent / "heldout-code.txt").read_text()[:2000]
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids[:96]
    model = trained_model(tmp_path / "model")
    whole = converted(model, tmp_path / "whole", "f32")
    runs = tmp_path / "runs"
    runs.mkdir()
    wanted = {}
    for name, command in {
        "dropped": ("drop-experts", "--experts", EXPERTS),
        "rescaled": ("rescale", "--top-k", 3, "--scale", 1.1),
    }.items():
        for source, out in ((model, tmp_path / f"{name}-hf"), (whole, tmp_path / f"{name}-gguf")):
            ok(command[0], source, *command[1:], "-o", out, "-q")
        (tmp_path / f"{name}-gguf" / whole.name).rename(runs / f"{name}.gguf")
        with torch.no_grad():
            logits = load(tmp_path / f"{name}-hf")(torch.tensor([tokens])).logits[0]
        wanted[name] = perplexity(logits.log_softmax(-1).double().numpy(), tokens)
    found = {name: perplexity(rows, tokens) for name, rows in log_probabilities(runs, tokens).items()}
    for name, expected in wanted.items():
        assert found[name] == pytest.approx(expected, rel=1e-3)
        print(f"{name}: {found[name]:.5f} in llama.cpp, {expected:.5f} in transformers")
