"""`moesurgery inspect`: what is recognised of a model, in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.headers import header_checkpoint
from tests.quantise import make_form, rewrite
from tests.tiny import read_tensors


def test_a_mixture(demo: Path, ok: Any) -> None:
    found = ok("inspect", demo).out
    assert "family          mixtral" in found
    assert "layout          per-expert" in found
    assert "moe layers      0-5" in found
    assert "experts         8 per layer (num_local_experts)" in found
    lines = [" ".join(line.split()) for line in found.splitlines()]
    group = "48 model.layers.[0-5].block_sparse_moe.experts.[0-7].w1.weight BF16 256 x 192 routed experts"
    assert group in lines


def test_groups_hold_every_tensor_and_every_byte(models: Any, ok: Any) -> None:
    path = models("deepseek_v3")
    document = ok("inspect", path, "--json").json
    stored = read_tensors(path)
    assert sum(group["count"] for group in document["tensors"]) == len(stored)
    assert sum(group["bytes"] for group in document["tensors"]) == sum(t.nbytes for t in stored.values())
    assert document["groups"] == "1 of 2 kept"
    assert document["moe_layers"] == "1"
    assert document["unrecognised"] == []


def test_quantised_prediction_layers_and_strangers(models: Any, tmp_path: Path, ok: Any) -> None:
    path = models("glm4_moe", num_hidden_layers=3)
    tensors = read_tensors(path) | {"model.zebra": read_tensors(path)["model.norm.weight"]}
    rewrite(path, tmp_path / "plain", tensors, {"num_hidden_layers": 2})
    make_form(tmp_path / "plain", tmp_path / "m", "fp8-block")
    document = ok("inspect", tmp_path / "m", "--json").json
    assert document["quantisation"] == "fp8"
    assert (document["moe_layers"], document["prediction_layers"]) == ("1", "2")
    assert document["unrecognised"] == ["model.zebra"]
    groups = {(g["tensors"], g["component"]): g for g in document["tensors"]}
    down = "mlp.experts.[0-7].down_proj.weight"
    assert groups[f"model.layers.1.{down}", "routed_experts"]["dtype"] == "F8_E4M3"
    assert groups[f"model.layers.2.{down}", "mtp"]["count"] == 8
    assert groups[f"model.layers.1.{down}_scale_inv", "routed_experts"]["dtype"] == "F32"


def test_dense_and_unknown_models(tmp_path: Path, ok: Any) -> None:
    shapes: dict[str, Any] = {"model.layers.0.mlp.up_proj.weight": [8, 4]}
    header_checkpoint(tmp_path / "dense", {"model_type": "llama"}, shapes, sparse=False)
    assert ok("inspect", tmp_path / "dense", "--json").json["family"] == "dense"
    shapes = {"model.layers.0.experts.0.up.weight": [8, 4]}
    header_checkpoint(tmp_path / "zebra", {"model_type": "zebra", "num_experts": 4}, shapes, sparse=False)
    assert "docs/families.md" in ok("inspect", tmp_path / "zebra").out


def test_what_config_and_tensors_disagree_on_is_noted(models: Any, tmp_path: Path, ok: Any) -> None:
    path = models("qwen3_moe")
    rewrite(path, tmp_path / "m", read_tensors(path), {"mlp_only_layers": [1]})
    assert "config.json makes layers 0, 2 MoE, the tensors 1-2" in ok("inspect", tmp_path / "m").out


def test_a_broken_model_is_shown_with_what_is_wrong(models: Any, tmp_path: Path, ok: Any) -> None:
    tensors = read_tensors(models("mixtral"))
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    rewrite(models("mixtral"), tmp_path / "m", tensors, {"num_local_experts": 9, "num_experts_per_tok": "two"})
    document = ok("inspect", tmp_path / "m", "--json").json
    assert "w2 of expert 3 is missing" in document["notes"][0]
    assert document["experts"] == "config.json says 9 experts, the tensors hold 8"
    assert "'two', expected a whole number" in document["top_k"]
    assert sum(group["count"] for group in document["tensors"]) == len(tensors)
