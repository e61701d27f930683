"""What is easily got wrong about a family, each with a test; and the families whose code is not in transformers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, count_params, open_checkpoint, plan_of, recognise, write_plan
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.routing import routing_class
from moesurgery.families.table import FAMILIES
from tests.families import ROWS
from tests.headers import header_checkpoint
from tests.quantise import rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits


def anatomy_of(path: Path) -> Anatomy:
    checkpoint = open_checkpoint(path)
    return recognise(checkpoint.config, checkpoint.tensors)


def rescaled(path: Path, out: Path, **parameters: Any) -> dict[str, Any]:
    plan = apply(plan_of(open_checkpoint(path)), "rescale", **parameters)
    write_plan(plan, out)
    return dict(plan.steps[0].report)


# One name, two orientations


@pytest.mark.parametrize("width", [24, 16, 32])  # 16: gate_up is square; 32: down is
def test_two_orientations_under_one_name(models: Any, tmp_path: Path, width: int) -> None:
    """Qwen3-VL is published [E, in, out] and saved by transformers 5 as [E, out, in], under the same names."""
    text = {**ROWS["qwen3_vl_moe"]["text_config"], "moe_intermediate_size": width}
    saved = models("qwen3_vl_moe", text_config=text)
    turned = {n: t.transpose(1, 2) if ".mlp.experts." in n else t for n, t in read_tensors(saved).items()}
    rewrite(saved, tmp_path / "hub", turned, {})
    for path, order in ((saved, "oi"), (tmp_path / "hub", "io")):
        anatomy = anatomy_of(path)
        assert {m.part.order for b in anatomy.blocks for m in b.members if m.part} == {order}
        assert anatomy.notes == []


def test_the_published_orientation_is_edited_as_such(models: Any, tmp_path: Path) -> None:
    saved = models("qwen3_vl_moe")
    turned = {n: t.transpose(1, 2) if ".mlp.experts." in n else t for n, t in read_tensors(saved).items()}
    rewrite(saved, tmp_path / "hub", turned, {})
    rescaled(tmp_path / "hub", tmp_path / "out", top_k=3, scale=0.5)
    rescaled(saved, tmp_path / "reference", top_k=3, scale=0.5)
    expected = logits(load(tmp_path / "reference"))
    assert torch.equal(logits(load(tmp_path / "out")), expected)


# A top-k that is fixed in the code


@pytest.mark.parametrize("model_type", ["phimoe"])
def test_transformers_ignores_the_key_that_we_refuse_to_edit(models: Any, model_type: str) -> None:
    path = models(model_type)
    assert torch.equal(logits(load(path)), logits(load(path, num_experts_per_tok=3)))
    with pytest.raises(RefusedError, match="always uses top-2"):
        apply(plan_of(open_checkpoint(path)), "rescale", top_k=3)


@pytest.mark.parametrize(
    ("model_type", "top_k"), [("phimoe", 2), ("switch_transformers", 1), ("nllb-moe", 2), ("zaya", 1)]
)
def test_the_count_uses_the_top_k_of_the_code(models: Any, model_type: str, top_k: int) -> None:
    path = models(model_type)
    checkpoint = open_checkpoint(path)
    assert count_params(anatomy_of(path), checkpoint.tensors).top_k == top_k


# Hash-routed layers


def test_hash_routed_layers(models: Any) -> None:
    """tid2eid [vocabulary, k] names experts and is counted apart; tests/commands/test_hash_layers.py edits it."""
    path = models("deepseek_v4")
    anatomy = anatomy_of(path)
    tables = [m for b in anatomy.blocks for m in b.members if m.role == "expert_table"]
    assert [m.name for m in tables] == ["model.layers.0.ffn.gate.tid2eid"]
    assert read_tensors(path)[tables[0].name].shape == (64, 2)
    assert count_params(anatomy, open_checkpoint(path).tensors).not_counted["integer_tables"] == 128
    (correction,) = {m.name.rsplit(".", 1)[1] for b in anatomy.blocks for m in b.members if m.role == "correction_bias"}
    assert correction == "bias"  # `gate.bias` selects here; it is no bias of the logits


# Several sets of experts


def test_two_mixtures_per_layer(models: Any, tmp_path: Path) -> None:
    """JetMoE: attention heads are experts too; one top-k drives both, and the biases are added once per layer."""
    path = models("jetmoe")
    anatomy = anatomy_of(path)
    assert [b.where for b in anatomy.blocks if b.layer == 0] == ["model.layers.0", "model.layers.0.self_attention"]
    counts = count_params(anatomy, open_checkpoint(path).tensors)
    experts = 2 * 8 * (3 * 24 * 32 + 2 * 16 * 32)
    assert counts.components["routed_experts"] == experts
    assert counts.active is not None
    assert counts.active["all"] == counts.total - experts * 6 // 8
    report = rescaled(path, tmp_path / "out", top_k=4, scale=2.0)
    assert len(report["layers"]) == 4
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        assert same_bits(after[name], tensor * 2 if "output_linear" in name else tensor), name
    assert load(tmp_path / "out").config.num_attention_heads == 8  # it was 4


@pytest.mark.parametrize("fused", [False, True])
def test_image_experts_beside_text_experts(models: Any, fused: bool) -> None:
    """ERNIE-VL: two sets of different width; published under one range of numbers, with routers [H, E]."""
    path = models("ernie4_5_vl_moe", fused=fused)
    anatomy = anatomy_of(path)
    text, vision = anatomy.blocks
    assert (text.experts, vision.experts) == (8, 8)
    assert vision.where == text.where + ".vision_moe"
    shapes = {n: t.shape for n, t in read_tensors(path).items()}
    for block, width in ((text, 24), (vision, 16)):
        assert {width in shapes[m.name] for m in block.named("down")} == {True}
        assert block.router is not None
        assert block.router.axis == (0 if fused else 1)
    counts = count_params(anatomy, open_checkpoint(path).tensors)
    text_experts, vision_experts = 8 * 3 * 24 * 32, 8 * 3 * 16 * 32
    assert counts.components["routed_experts"] == text_experts + vision_experts
    assert counts.active is not None
    language = counts.total - counts.components["vision"]
    assert counts.active["all"] == language - vision_experts - text_experts * 6 // 8
    with pytest.raises(RefusedError, match="one range of numbers"):
        anatomy.require_family("drop-experts")


def test_a_second_stack_stays_as_it_is(models: Any, tmp_path: Path) -> None:
    """Qwen3-Omni's talker is another mixture with another config; its experts are not the thinker's."""
    path = models("qwen3_omni_moe")
    rescaled(path, tmp_path / "out", top_k=4, scale=0.5)
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        scaled = name.startswith("thinker.") and name.endswith("down_proj.weight") and ".experts." in name
        assert same_bits(after[name], tensor * 0.5 if scaled else tensor), name
    config = read_config(tmp_path / "out")
    assert config["thinker_config"]["text_config"]["num_experts_per_tok"] == 4
    assert config["talker_config"]["text_config"]["num_experts_per_tok"] == 2


def test_experts_of_a_vision_tower_are_not_the_language_models(models: Any, tmp_path: Path) -> None:
    path = models("dots3_note")
    assert {b.where for b in anatomy_of(path).blocks} == {"model.layers.1"}
    rescaled(path, tmp_path / "out", top_k=4, scale=0.5, where="weights")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    assert all(same_bits(after[n], t) for n, t in before.items() if n.startswith("vision_encoder."))


# Identity experts


def test_identity_experts_have_router_rows_and_no_weights(tmp_path: Path) -> None:
    """LongCat as published: 4 experts and 2 identities in the router, and tensors for the 4 only."""
    config = {
        "model_type": "longcat_flash",
        "num_layers": 1,
        "hidden_size": 16,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    }
    shapes: dict[str, Any] = {
        "model.layers.0.mlp.router.classifier.weight": [6, 16],
        "model.layers.0.mlp.router.e_score_correction_bias": [6],
    }
    shapes |= {f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": [8, 16] for e in range(4) for p in ("gate", "up")}
    shapes |= {f"model.layers.0.mlp.experts.{e}.down_proj.weight": [16, 8] for e in range(4)}
    header_checkpoint(tmp_path / "m", config, shapes, sparse=True)
    (block,) = anatomy_of(tmp_path / "m").blocks
    assert block.experts == 4
    assert {m.along.extra for m in block.members if m.along} == {True}
    counts = count_params(anatomy_of(tmp_path / "m"), open_checkpoint(tmp_path / "m").tensors)
    assert counts.total == 6 * 16 + 4 * 3 * 8 * 16
    without = {n: t for n, t in open_checkpoint(tmp_path / "m").tensors.items() if "experts.3.down" not in n}
    with pytest.raises(CheckpointError, match="down_proj of expert 3 is missing"):
        recognise(config, without)


# Router data among the experts, gates and ups in turn, experts without a gate


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("laguna", "model.layers.1.mlp.experts.e_score_correction_bias"),
        ("kolibri1", "model.layers.1.moe.router.expert_bias"),
    ],
)
def test_router_data_filed_under_experts(models: Any, model_type: str, name: str) -> None:
    anatomy = anatomy_of(models(model_type))
    assert anatomy.component[name] == "router"
    (member,) = [m for b in anatomy.blocks for m in b.members if m.name == name]
    assert member.role == "correction_bias"


def test_gates_and_ups_in_turn() -> None:
    interleaved = {f.name for f in FAMILIES for la in f.layouts for p in la.parts if p.interleaved}
    assert interleaved == {"gpt_oss", "gpt_oss_puzzle", "inkling", "inkling2"}


def test_experts_without_a_gate(models: Any) -> None:
    for model_type, gated in (("nemotron_h", False), ("switch_transformers", False), ("mixtral", True)):
        for block in anatomy_of(models(model_type)).blocks:
            assert block.layout is not None
            assert block.layout.gated == gated


@pytest.mark.parametrize(
    ("model_type", "operation", "reason"),
    [
        ("zaya", "tie-blocks", "router states flow"),
        ("doge", "drop-experts", "pairs of keys"),
        ("jetmoe", "drop-experts", "one config number"),
        ("switch_transformers", "tie-blocks", "encoder and a decoder"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(
    models: Any, model_type: str, operation: str, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        anatomy_of(models(model_type)).require_family(operation)


# Groups, layers for multi-token prediction, lists per layer


def test_groups_bound_the_top_k(models: Any) -> None:
    """One of two groups of four experts is kept: no more than four can be chosen."""
    for model_type in ("deepseek_v3", "glm4_moe", "mistral4", "deepseek_v2"):
        with pytest.raises(RefusedError, match="1 of 2 groups, 4 experts"):
            apply(plan_of(open_checkpoint(models(model_type))), "rescale", top_k=5)


def test_prediction_layers_follow_and_are_not_counted(models: Any, tmp_path: Path) -> None:
    """A layer past num_hidden_layers predicts further tokens: edited with the others, counted apart."""
    path = models("glm4_moe", num_hidden_layers=3)
    rewrite(path, tmp_path / "m", read_tensors(path), {"num_hidden_layers": 2})
    anatomy = anatomy_of(tmp_path / "m")
    assert [(b.layer, b.mtp) for b in anatomy.blocks] == [(1, False), (2, True)]
    counts = count_params(anatomy, open_checkpoint(tmp_path / "m").tensors)
    shorter = count_params(anatomy_of(models("glm4_moe")), open_checkpoint(models("glm4_moe")).tensors)
    assert counts.total == shorter.total
    report = rescaled(tmp_path / "m", tmp_path / "out", top_k=4, scale=0.5, where="weights")
    assert len(report["layers"]) == 2
    name = "model.layers.2.mlp.experts.0.down_proj.weight"
    assert same_bits(read_tensors(tmp_path / "out")[name], read_tensors(path)[name] * 0.5)


def test_lists_per_layer_stay_lists(models: Any, tmp_path: Path) -> None:
    """Hunyuan as published gives the top-k per layer."""
    path = models("hunyuan_v1_moe")
    rewrite(path, tmp_path / "m", read_tensors(path), {"moe_topk": [2, 2], "num_experts": [8, 8]})
    rescaled(tmp_path / "m", tmp_path / "out", top_k=3, scale=1.0)
    assert read_config(tmp_path / "out")["moe_topk"] == [3, 3]
    assert read_config(tmp_path / "out")["num_experts"] == [8, 8]


def test_a_null_is_a_number_or_an_off_switch(models: Any, tmp_path: Path) -> None:
    """routed_scaling_factor null is 1 (MiMo); moe_normalize_expert_weights null is raw weights (DBRX)."""
    mimo = models("mimo_v2_flash")
    rewrite(mimo, tmp_path / "mimo", read_tensors(mimo), {"routed_scaling_factor": None})
    rescaled(tmp_path / "mimo", tmp_path / "out", top_k=4, scale=0.5)
    assert read_config(tmp_path / "out")["routed_scaling_factor"] == 0.5
    dbrx = models("dbrx")
    for value, kind in ((1, "A"), (1.0, "A"), (None, "B")):
        ffn = {**read_config(dbrx)["ffn_config"], "moe_normalize_expert_weights": value}
        assert routing_class(recognise({**read_config(dbrx), "ffn_config": ffn}, {}).settings) == kind


def test_layers_by_the_config_are_a_check_on_the_tensors(models: Any) -> None:
    path = models("qwen3_moe")
    checkpoint = open_checkpoint(path)
    anatomy = recognise({**checkpoint.config, "mlp_only_layers": [1]}, checkpoint.tensors)
    assert anatomy.notes == ["config.json makes layers 0, 2 MoE, the tensors 1-2: the tensors count"]
    assert {b.layer for b in anatomy.blocks} == {1, 2}


@pytest.mark.parametrize(
    "settings", [{"num_hidden_layers": 10**15}, {"mlp_only_layers": 3}, {"decoder_sparse_step": "two"}]
)
def test_a_config_that_makes_no_sense_gives_no_note(models: Any, settings: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(models("qwen3_moe"))
    anatomy = recognise({**checkpoint.config, **settings}, checkpoint.tensors)
    assert anatomy.notes == []


# Families whose code is not in transformers: published names, small shapes


def experts_of(
    layer: str, names: dict[str, str], hidden: int = 16, width: int = 8, count: int = 4
) -> dict[str, list[int]]:
    """Return the shapes of the experts of one layer; `names` holds templates with `{e}` for the number."""
    found = {}
    for role, name in names.items():
        for e in range(count):
            found[f"{layer}.{name.format(e=e)}"] = [hidden, width] if role == "down" else [width, hidden]
    return found


LLAMA_NAMES = {p: f"mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down")}
W123 = {"gate": "w1", "up": "w3", "down": "w2"}
MIXTRAL_NAMES = {role: f"block_sparse_moe.experts.{{e}}.{w}.weight" for role, w in W123.items()}
GROK_NAMES = {
    role: f"moe_block.experts.{{e}}.{w}.weight"
    for role, w in {"gate": "linear", "up": "linear_v", "down": "linear_1"}.items()
}
LLAMA_MOE_NAMES = {p: f"mlp.calculator.experts.weight_{p}.{{e}}" for p in ("gate", "up", "down")}
MOE_KEYS = {"num_hidden_layers": 2, "hidden_size": 16, "num_experts_per_tok": 2}
REMOTE_CASES: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, list[int]], str, str]] = {
    # name: (config, experts, the other tensors of layer 1, routing class, family)
    "DeepSeekMoE 16B": (
        {"model_type": "deepseek", "n_routed_experts": 4, "first_k_dense_replace": 1, "norm_topk_prob": False},
        LLAMA_NAMES,
        {"mlp.gate.weight": [4, 16], "mlp.shared_experts.down_proj.weight": [16, 16]},
        "B",
        "deepseek",
    ),
    "Kimi-K2": (
        {"model_type": "kimi_k2", "n_routed_experts": 4, "first_k_dense_replace": 1},
        LLAMA_NAMES,
        {"mlp.gate.weight": [4, 16], "mlp.gate.e_score_correction_bias": [4]},
        "A",
        "deepseek_v3",
    ),
    "Arctic": (
        {"model_type": "arctic", "num_local_experts": 4, "moe_layer_frequency": 2},
        MIXTRAL_NAMES,
        {"block_sparse_moe.gate.weight": [4, 16], "residual_mlp.w1.weight": [16, 16]},
        "A",
        "arctic",
    ),
    "Grok-1": (
        {"model_type": "grok-1", "num_experts": 4},
        GROK_NAMES,
        {"moe_block.gate.weight": [4, 16], "post_moe_norm.scale": [16]},
        "C",
        "grok1",
    ),
    "Ling-lite": (
        {"model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"], "num_experts": 4},
        LLAMA_NAMES,
        {"mlp.gate.weight": [4, 16]},
        "A",
        "bailing_moe",
    ),
    "Ling-2": (
        {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"], "num_experts": 4}
        | {"routed_scaling_factor": 2.5},
        LLAMA_NAMES,
        {"mlp.gate.weight": [4, 16], "mlp.gate.expert_bias": [4]},
        "A",
        "bailing_moe_v2",
    ),
    "LLaMA-MoE": (
        {"model_type": "llama_moe", "num_experts": 4, "num_selects": 2, "score_scale_factor": 4.0},
        LLAMA_MOE_NAMES,
        {"mlp.gate.gate_network.0.weight": [4, 16], "mlp.gate.gate_network.2.weight": [4, 4]},
        "E",
        "llama_moe",
    ),
    "OpenMoE": (
        {"model_type": "llama", "architectures": ["OpenMoeForCausalLM"], "num_experts": 4, "router_topk": 2}
        | {"moe_layer_interval": 2},
        {},
        {
            **{f"mlp.experts.{name}": [4, 16, 8] for name in ("wi_gate", "wi_up")},
            "mlp.experts.wo": [4, 8, 16],
            "mlp.gate_weight": [4, 16],
            "extra_mlp.up_proj.weight": [8, 16],
            "pre_extra_mlp_layernorm.weight": [16],
        },
        "E",
        "openmoe",
    ),
    "Skywork-MoE": (
        {"model_type": "skywork_moe", "num_experts": [4]},
        LLAMA_NAMES,
        {"mlp.gate.wg.weight": [4, 16]},
        "E",
        "skywork_moe",
    ),
}


def remote_checkpoint(folder: Path, name: str) -> tuple[Any, str]:
    config, experts, others, kind, _ = REMOTE_CASES[name]
    layer = "model.layers.1"
    shapes: dict[str, Any] = {"model.embed_tokens.weight": [32, 16], f"{layer}.self_attn.q_proj.weight": [16, 16]}
    shapes |= experts_of(layer, experts) | {f"{layer}.{n}": s for n, s in others.items()}
    config = MOE_KEYS | config
    if "num_selects" in config or "router_topk" in config:
        del config["num_experts_per_tok"]
    header_checkpoint(folder, config, shapes, sparse=True)
    assert anatomy_of(folder).family is not None
    return shapes, kind


@pytest.mark.parametrize("name", REMOTE_CASES)
def test_families_outside_transformers(tmp_path: Path, name: str) -> None:
    shapes, kind = remote_checkpoint(tmp_path / "m", name)
    anatomy = anatomy_of(tmp_path / "m")
    assert anatomy.family is not None
    assert anatomy.family.name == REMOTE_CASES[name][4]
    assert routing_class(anatomy.settings) == kind
    (block,) = anatomy.blocks
    assert (block.experts, anatomy.experts, block.where) == (4, 4, "model.layers.1")
    counts = count_params(anatomy, open_checkpoint(tmp_path / "m").tensors)
    elements = sum(math.prod(s) for s in shapes.values())
    biases = sum(s[0] for n, s in shapes.items() if n.endswith("bias"))
    assert counts.total == elements - biases
    assert counts.unrecognised == []
    assert counts.components["routed_experts"] == 4 * 3 * 16 * 8
    assert counts.active is not None
    assert counts.active["all"] == counts.total - 2 * 3 * 16 * 8


def test_rescaling_families_outside_transformers(tmp_path: Path) -> None:
    """Where the factor goes: the config number, the down-projections, or nowhere."""
    for name, expected in (("Kimi-K2", "config"), ("Arctic", "weights"), ("Grok-1", None), ("LLaMA-MoE", "config")):
        remote_checkpoint(tmp_path / name, name)
        plan = apply(plan_of(open_checkpoint(tmp_path / name)), "rescale", top_k=3, scale=0.5)
        assert plan.steps[0].report["where"] == expected
        if name == "Arctic":
            write_plan(plan, tmp_path / "out")
            changed = {n for n in plan.tensors if n not in set(plan.untouched())}
            assert changed == {f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)}
        if name == "LLaMA-MoE":
            assert (plan.config["score_scale_factor"], plan.config["num_selects"]) == (2.0, 3)


def test_speech_model_with_experts_as_nemo_writes_them(tmp_path: Path) -> None:
    config = {
        "model_type": "nemo_speechlm",
        "text_config": {"model_type": "nemotron_h", "hidden_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    }
    shapes = {
        "llm.model.layers.1.mixer.experts.gate_and_up_projs": [4, 16, 8],
        "llm.model.layers.1.mixer.experts.down_projs": [4, 8, 16],
        "llm.model.layers.1.mixer.gate.weight": [4, 16],
    }
    header_checkpoint(tmp_path / "m", config, shapes, sparse=True)
    (block,) = anatomy_of(tmp_path / "m").blocks
    assert {(m.part.role, m.part.order) for m in block.members if m.part} == {("up", "io"), ("down", "io")}


def test_kimi_k3s_experts_work_in_a_space_of_their_own(tmp_path: Path) -> None:
    """Names by llama.cpp's converter: latent projections and a norm beside the experts, which a factor cannot pass."""
    stack = "language_model.model.layers"
    shapes: dict[str, Any] = {f"{stack}.0.mlp.{p}_proj.weight": [40, 16] for p in ("gate", "up")}
    shapes |= {f"{stack}.0.mlp.down_proj.weight": [16, 40]} | experts_of(
        f"{stack}.1", MIXTRAL_NAMES, hidden=8, width=12
    )
    others = {"gate.weight": [4, 16], "gate.e_score_correction_bias": [4], "routed_expert_norm.weight": [8]}
    others |= {"routed_expert_down_proj.weight": [8, 16], "routed_expert_up_proj.weight": [16, 8]}
    others |= {"shared_experts.down_proj.weight": [16, 24], "shared_experts.up_proj.weight": [24, 16]}
    shapes |= {f"{stack}.1.block_sparse_moe.{name}": shape for name, shape in others.items()}
    text = {"model_type": "kimi_linear", "num_experts": 4, "num_experts_per_token": 2, "first_k_dense_replace": 1}
    text |= {"moe_intermediate_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "routed_scaling_factor": 2.5}
    header_checkpoint(tmp_path / "m", {"model_type": "kimi_k3", "text_config": text}, shapes, sparse=True)
    plan = plan_of(open_checkpoint(tmp_path / "m"))
    counts = count_params(plan.anatomy, plan.checkpoint.tensors)
    assert (counts.unrecognised, counts.num_experts, counts.top_k) == ([], 4, 2)
    assert counts.active is not None
    assert counts.total - counts.active["all"] == 2 * 3 * 8 * 12
    dropped = apply(plan, "drop-experts", experts=[1])
    assert dropped.tensors[f"{stack}.1.block_sparse_moe.gate.weight"].shape == (3, 16)
    assert dropped.config["text_config"]["num_experts"] == 3
    rescaled = apply(plan, "rescale", top_k=3, scale=0.5)
    assert rescaled.steps[0].report["where"] is None
    assert set(rescaled.untouched()) == set(rescaled.tensors)


UNEVEN: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    # type: (config, shapes, experts of each layer)
    "deepseek_v41": (
        {"text_config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}},
        {
            name: shape
            for layer, count in (("layers.0", 4), ("layers.1", 4), ("mtp.0", 2))
            for name, shape in {
                **experts_of(layer, {r: f"ffn.experts.{{e}}.{w}.weight" for r, w in W123.items()}, count=count),
                f"{layer}.ffn.gate.weight": [count, 16],
                f"{layer}.ffn.gate.bias": [count],
                f"{layer}.ffn.gate.bias_vl": [count],
            }.items()
        },
        [4, 4],
    ),
    "nemotron_h_puzzle": (
        {
            "n_routed_experts": 4,
            "block_configs": [
                {"block_type": "moe", "moe_intermediate_size": 8, "num_experts_per_tok": 1},
                {"block_type": "moe", "moe_intermediate_size": 24, "num_experts_per_tok": 2},
            ],
        },
        {
            name: shape
            for layer, width in (("model.layers.0", 8), ("model.layers.1", 24))
            for name, shape in {
                **experts_of(layer, {r: f"mixer.experts.{{e}}.{r}_proj.weight" for r in ("up", "down")}, width=width),
                f"{layer}.mixer.gate.weight": [4, 16],
                f"{layer}.mixer.gate.e_score_correction_bias": [4],
            }.items()
        },
        [4, 4],
    ),
    "gpt_oss_puzzle": (
        {"num_experts_per_tok": 2, "block_configs": [{"num_local_experts": 8}, {"num_local_experts": 4}]},
        {
            f"model.layers.{layer}.mlp.{name}": [count, *shape]
            for layer, count in ((0, 8), (1, 4))
            for name, shape in (
                ("experts.gate_up_proj", (16, 24)),
                ("experts.gate_up_proj_bias", (24,)),
                ("experts.down_proj", (12, 16)),
                ("experts.down_proj_bias", (16,)),
                ("router.weight", (16,)),
                ("router.bias", ()),
            )
        },
        [8, 4],
    ),
}


@pytest.mark.parametrize("model_type", UNEVEN)
def test_layers_that_differ_are_counted_and_not_edited(tmp_path: Path, model_type: str, ok: Any) -> None:
    config, shapes, experts = UNEVEN[model_type]
    config = {"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 16, **config}
    header_checkpoint(tmp_path / "m", config, shapes, sparse=True)
    plan = plan_of(open_checkpoint(tmp_path / "m"))
    assert [block.experts for block in plan.anatomy.main_blocks] == experts
    assert plan.anatomy.notes == []
    counts = count_params(plan.anatomy, plan.checkpoint.tensors)
    main = {n: s for n, s in shapes.items() if not n.startswith("mtp.") and not re.search("gate.*bias", n)}
    main |= {n: s for n, s in shapes.items() if "gate_up_proj_bias" in n}
    assert counts.total == sum(math.prod(s) for s in main.values())
    assert counts.unrecognised == []
    if model_type == "gpt_oss_puzzle":
        idle = (6 + 2) * (16 * 24 + 24 + 12 * 16 + 16)
        assert counts.active is not None
        assert counts.active["all"] == counts.total - idle
    edits: list[tuple[str, dict[str, Any]]] = [
        ("drop-experts", {"count": 1}),
        ("rescale", {"top_k": 1, "scale": 1.0}),
        ("merge-experts", {"groups": [[0, 1]]}),
        ("convert", {"quantize": "fp8"}),
    ]
    for operation, values in edits:
        with pytest.raises(RefusedError, match=r"block_configs|draft layers"):
            apply(plan, operation, **values)
    ok("count-params", tmp_path / "m")
    ok("convert", tmp_path / "m", "-o", tmp_path / "copy")


# Unknown families


def test_an_unknown_mixture_counts_and_validates(models: Any, tmp_path: Path, ok: Any, cli: Any) -> None:
    path = models("mixtral")
    rewrite(path, tmp_path / "m", read_tensors(path), {"model_type": "zebra", "architectures": ["ZebraForCausalLM"]})
    found = ok("count-params", tmp_path / "m", "--json").json
    known = ok("count-params", path, "--json").json
    assert found["total_params"] == known["total_params"]
    assert found["active_params"] is None
    ok("validate", tmp_path / "m", "--level", "container")
    refused = cli("rescale", tmp_path / "m", "--top-k", 3)
    assert refused.code == 2
    assert "zebra" in refused.err
    assert "docs/families.md" in refused.err
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "zebra"
