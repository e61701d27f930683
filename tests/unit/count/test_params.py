"""Counting: to the digit for ten releases, equal to transformers for every family, and the roofline's figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgery import count_params, open_checkpoint, recognise
from moesurgery.count.accelerators import ACCELERATORS
from moesurgery.count.roofline import roofline
from tests.conftest import ROOT, Result
from tests.headers import header_checkpoint
from tests.tiny import TINY, load

Cli = Callable[..., Result]
PUBLIC = json.loads((ROOT / "tests" / "data" / "counts_public.json").read_text())["models"]


def names_of(template: str, count: int, layers: int, experts: int) -> list[str]:
    """Spell out `model.layers.#.…`: experts are numbered, and fewer than all layers means some of them."""
    if "#" not in template:
        return [template]
    if template.count("#") == 1:
        moe = any(word in template for word in ("experts", "gate.weight", "router", "shared", "expert_bias"))
        chosen = range(layers - count, layers) if moe else range(count)
        return [template.replace("#", str(i)) for i in chosen]
    first = layers - count // experts
    return [
        template.replace("#", str(layer), 1).replace("#", str(expert), 1)
        for layer in range(first, layers)
        for expert in range(experts)
    ]


def public_shapes(name: str) -> dict[str, list[int]]:
    model = PUBLIC[name]
    layers = model["config"]["num_hidden_layers"]
    return {
        tensor: shape
        for template, count, shape in model["disk_layout_main"]
        for tensor in names_of(template, count, layers, model["num_experts"])
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_counts_to_the_digit(name: str, tmp_path: Path, ok: Cli) -> None:
    model = PUBLIC[name]
    header_checkpoint(tmp_path / "m", model["config"], public_shapes(name), sparse=True, shards=3)
    found = ok("count-params", tmp_path / "m", "--json").json
    assert found["total_params"] == model["total"]
    assert found["active_params"] == {
        "all": model["active"],
        "without_input_embedding": model["active_no_input_embedding"],
        "without_embeddings": model["active_no_embedding_no_head"],
    }
    assert found["components"]["routed_experts"] == model["routed_expert_params"]
    assert found["components"]["embedding"] == model["input_embedding"]
    assert found["components"].get("head", 0) == model["lm_head"]
    assert found["not_counted"].get("router_bias", 0) == model["router_bias_buffers"]
    assert found["num_experts"] == model["num_experts"]
    assert found["top_k"] == model["experts_per_token"]
    assert found["stored_bytes"] == 2 * model["header_elements_main"]
    assert sum(found["components"].values()) == found["total_params"]
    assert found["unrecognised"] == []


def test_mixtral_has_256_experts(tmp_path: Path, ok: Cli) -> None:
    name = "Mixtral-8x7B-v0.1"
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], public_shapes(name), sparse=False)
    result = ok("count-params", tmp_path / "m")
    assert "46,702,792,704" in result.out
    assert "32 x 8 experts = 256" in result.out
    assert "some shards end before their data does" in result.out
    assert ok("count-params", tmp_path / "m", "--json").json["headers_only"] is True


def test_headers_alone_cannot_be_edited(tmp_path: Path, cli: Cli) -> None:
    name = "granite-3.0-1b-a400m"
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], public_shapes(name), sparse=False)
    result = cli("rescale", tmp_path / "m", "--top-k", 4, "--scale", "none")
    assert result.code == 2
    assert "truncated" in result.err


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_active_for_another_top_k(tmp_path: Path, ok: Cli, top_k: int) -> None:
    name = "Mixtral-8x7B-v0.1"
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], public_shapes(name), sparse=True)
    found = ok("count-params", tmp_path / "m", "--top-k", top_k, "--json").json
    routed = PUBLIC[name]["routed_expert_params"]
    assert found["active_params"]["all"] == PUBLIC[name]["total"] - routed + routed * top_k // 8


@pytest.mark.parametrize("change", [{"head_dim": "2"}, {"head_dim": [16]}, {"num_attention_heads": 0}])
def test_an_attention_that_cannot_be_is_unknown(demo: Path, tmp_path: Path, ok: Cli, change: dict[str, Any]) -> None:
    shutil.copytree(demo, tmp_path / "m")
    config = json.loads((demo / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    assert "unknown attention layout" in ok("count-params", tmp_path / "m").out


def test_layers_that_the_config_makes_up_are_said(demo: Path, tmp_path: Path, ok: Cli) -> None:
    shutil.copytree(demo, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100}))
    (note,) = ok("count-params", tmp_path / "m", "--json").json["notes"]
    assert note.startswith("config.json makes layers 0-99 MoE, the tensors 0-")
    assert note in ok("count-params", tmp_path / "m").out
    assert ok("count-params", demo, "--json").json["notes"] == []


def test_no_layers_by_the_config(demo: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(demo, tmp_path / "m")
    config = json.loads((demo / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    result = cli("count-params", tmp_path / "m")
    assert result.code == 2
    assert "config.json says 0 layers" in result.err


def test_a_top_k_that_cannot_be(demo: Path, cli: Cli) -> None:
    result = cli("count-params", demo, "--top-k", 9)
    assert result.code == 2
    assert "8 experts" in result.err


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", TINY)
def test_totals_equal_transformers(models: Any, model_type: str, fused: bool) -> None:
    path = models(model_type, fused=fused)
    checkpoint = open_checkpoint(path)
    counts = count_params(recognise(checkpoint.config, checkpoint.tensors), checkpoint.tensors)
    model = load(path)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.unrecognised == []


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_counts_once(tmp_path: Path, stored: bool) -> None:
    shapes = {"model.embed_tokens.weight": [64, 32], "model.layers.0.mlp.gate_proj.weight": [48, 32]}
    if stored:
        shapes["lm_head.weight"] = [64, 32]
    header_checkpoint(tmp_path / "m", {"model_type": "llama", "tie_word_embeddings": True}, shapes, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    counts = count_params(recognise(checkpoint.config, checkpoint.tensors), checkpoint.tensors)
    assert counts.total == 64 * 32 + 48 * 32
    assert counts.tied_embeddings
    assert counts.active is not None
    assert counts.active["without_input_embedding"] == counts.total
    assert counts.memory_bytes == counts.stored_bytes - (64 * 32 * 2 if stored else 0)


def test_prediction_layers_vision_and_tables_have_lines_of_their_own(tmp_path: Path) -> None:
    name = "DeepSeek-V2-Lite"
    shapes = public_shapes(name)
    shapes |= {"model.layers.27.eh_proj.weight": [2048, 4096], "model.layers.27.mlp.experts.0.up_proj.weight": [10, 10]}
    shapes |= {"visual.blocks.0.attn.qkv.weight": [30, 10], "model.layers.0.self_attn.rotary_emb.inv_freq": [32]}
    shapes |= {"mtp.layers.0.mlp.gate.weight": [64, 2048]}
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], shapes, sparse=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    tensors = {n: t for n, t in checkpoint.tensors.items() if "27.mlp.experts" not in n}
    counts = count_params(recognise(checkpoint.config, tensors), tensors)
    assert counts.not_counted["mtp"] == 2048 * 4096 + 64 * 2048
    assert counts.not_counted["buffers"] == 32
    assert counts.components["vision"] == 300
    assert counts.total == PUBLIC[name]["total"] + 300
    assert counts.active is not None
    assert counts.active["all"] == PUBLIC[name]["active"]  # vision is not active per text token


def test_an_unknown_family_still_counts(tmp_path: Path, ok: Cli, cli: Cli) -> None:
    shapes = {"model.embed.weight": [64, 32], "model.layers.0.zebra.experts.0.up.weight": [48, 32]}
    header_checkpoint(tmp_path / "m", {"model_type": "zebra_moe", "num_experts": 1}, shapes, sparse=True)
    found = ok("count-params", tmp_path / "m", "--json").json
    assert found["total_params"] == 64 * 32 + 48 * 32
    assert found["active_params"] is None
    assert found["family"] is None
    assert "unknown" in ok("count-params", tmp_path / "m").out
    result = cli("rescale", tmp_path / "m", "--top-k", 1)
    assert result.code == 2
    assert "zebra_moe" in result.err


def test_by_layer(demo: Path, ok: Cli) -> None:
    found = ok("count-params", demo, "--by-layer", "--json").json
    assert [entry["layer"] for entry in found["layers"]] == list(range(6))
    assert sum(e["params"] for e in found["layers"]) + 2048 * 192 + 192 == found["total_params"]
    assert "routed experts" in ok("count-params", demo, "--by-layer").out


# The roofline: figures computed independently for the reference models, 2 bytes, context 4096.
@pytest.mark.parametrize(
    ("name", "density", "batch_1", "batch_32", "kv_kib", "kv_equals"),
    [
        ("Mixtral-8x7B-v0.1", 0.273, 25.5, 93.1, 128, 194_532),
        ("Qwen1.5-MoE-A2.7B", 0.166, 4.8, 25.3, 192, 24_190),
        ("Qwen3-30B-A3B", 0.100, 6.1, 53.1, 96, 61_887),
    ],
)
def test_roofline(
    tmp_path: Path, name: str, density: float, batch_1: float, batch_32: float, kv_kib: float, kv_equals: int
) -> None:
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], public_shapes(name), sparse=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    anatomy = recognise(checkpoint.config, checkpoint.tensors)
    cost = roofline(anatomy, checkpoint.tensors, count_params(anatomy, checkpoint.tensors), 4096, ACCELERATORS["h100"])
    assert cost is not None
    assert round(cost.density, 3) == density
    assert round(cost.weight_bytes[1] / 1e9, 1) == batch_1
    assert round(cost.weight_bytes[32] / 1e9, 1) == batch_32
    assert cost.kv_bytes_per_token == kv_kib * 1024
    assert cost.kv_equals_weights_at == kv_equals
    assert cost.compute_bound_batch is None  # at 4096 tokens of context KV reads dominate


def test_short_contexts_become_compute_bound_where_the_formula_says(tmp_path: Path) -> None:
    name = "Mixtral-8x7B-v0.1"
    header_checkpoint(tmp_path / "m", PUBLIC[name]["config"], public_shapes(name), sparse=True)
    checkpoint = open_checkpoint(tmp_path / "m")
    anatomy = recognise(checkpoint.config, checkpoint.tensors)
    counts = count_params(anatomy, checkpoint.tensors)
    cost = roofline(anatomy, checkpoint.tensors, counts, 1, ACCELERATORS["h100"])
    assert cost is not None
    # ridge * stored / executed, once all experts are hit
    expected = ACCELERATORS["h100"].ridge * cost.weight_bytes[512] / cost.flops_weights
    assert cost.compute_bound_batch == pytest.approx(expected, rel=0.01)


# A trillion parameters


def kimi_k2(folder: Path) -> None:
    """A header set of Kimi-K2's shape: 61 layers, 384 experts, about 70,000 tensors, 1 T parameters."""
    config = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 61,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "hidden_size": 7168,
        "num_attention_heads": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "routed_scaling_factor": 2.827,
        "n_group": 1,
        "topk_group": 1,
    }
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [163840, 7168], "lm_head.weight": [163840, 7168]}
    for layer in range(61):
        p = f"model.layers.{layer}."
        shapes[f"{p}self_attn.q_a_proj.weight"] = [1536, 7168]
        shapes[f"{p}self_attn.q_b_proj.weight"] = [12288, 1536]
        shapes[f"{p}self_attn.kv_a_proj_with_mqa.weight"] = [576, 7168]
        shapes[f"{p}self_attn.kv_b_proj.weight"] = [16384, 512]
        shapes[f"{p}self_attn.o_proj.weight"] = [7168, 8192]
        if layer == 0:
            for part in ("gate_proj", "up_proj", "down_proj"):
                shapes[f"{p}mlp.{part}.weight"] = [7168, 18432] if part == "down_proj" else [18432, 7168]
            continue
        shapes[f"{p}mlp.gate.weight"] = [384, 7168]
        shapes[f"{p}mlp.gate.e_score_correction_bias"] = [384]
        for part in ("gate_proj", "up_proj", "down_proj"):
            shape = [7168, 2048] if part == "down_proj" else [2048, 7168]
            shapes[f"{p}mlp.shared_experts.{part}.weight"] = shape
            for expert in range(384):
                shapes[f"{p}mlp.experts.{expert}.{part}.weight"] = shape
    header_checkpoint(folder, config, shapes, sparse=True, shards=61)


def test_a_trillion_parameters_from_headers_without_torch(tmp_path: Path) -> None:
    kimi_k2(tmp_path / "k2")
    program = (
        "import sys; from moesurgery.cli import main; code = main();"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, "count-params", tmp_path / "k2", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1.02e12 < found["total_params"] < 1.03e12
    assert 32e9 < found["active_params"]["all"] < 34e9
    assert found["num_experts"] == 384
    # No bound on time here (benchmarks/ has it); a run of minutes would mean something quadratic.
    assert seconds < 60
