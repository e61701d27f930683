"""To dense: it undoes an upcycle to the byte, and computes what it says otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.decoders.dense_names import DENSE_NAMES, MOE_KEYS, DensePair
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.config_keys import (
    EXPERTS_KEYS,
    GROUPS_KEYS,
    PREDICTION_KEYS,
    TOP_GROUPS_KEYS,
    TOP_K_KEYS,
)
from tests.conftest import Result
from tests.quantise import make_fp8, rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits, save_tiny

Cli = Callable[..., Result]
IDS = [f"{pair.source}-{pair.target}" for pair in DENSE_NAMES]

# What the MoE config adds when a tiny dense model of width 48 is upcycled to it, and tiny sizes of the dense one.
WIDTH = 48
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {**EXPERTS, "moe_intermediate_size": WIDTH, "norm_topk_prob": True, "shared_expert_intermediate_size": WIDTH}
UPCYCLES: dict[str, dict[str, Any]] = {
    "mixtral-mistral": LOCAL,
    "mixtral-llama": {**LOCAL, "sliding_window": None},
    "qwen2_moe-qwen2": QWEN,
    "qwen2_moe-llama": {**QWEN, "qkv_bias": False},
    "qwen3_moe-qwen3": QWEN,
    "granitemoe-granite": LOCAL,
    "granitemoeshared-granite": {**LOCAL, "shared_intermediate_size": WIDTH},
    "deepseek_v3-youtu": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": WIDTH,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
    "lfm2_moe-lfm2": {
        **EXPERTS,
        "moe_intermediate_size": WIDTH,
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "norm_topk_prob": True,
    },
}
DENSE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 1.5},
    "youtu": {
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "qwen3": {"head_dim": 8},
}


def save_dense(target: str, path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    save_tiny(target, path, **{"intermediate_size": WIDTH, **DENSE.get(target, {}), **changes})
    return read_tensors(path)


def upcycled(dense: Path, target: Path, pair: DensePair, first_dense: int = 0) -> None:
    """Write the MoE with four copies of every FFN and random routers: a few lines, apart from the product's own."""
    before, after = read_tensors(dense), {}
    extra = UPCYCLES[f"{pair.source}-{pair.target}"]
    generator = torch.Generator().manual_seed(1)
    hidden = 32
    for name, tensor in before.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(mlp|feed_forward)\.(\w+)\.weight", name)
        if not found or int(found[1]) < first_dense:
            after[name] = tensor
            continue
        layer, kind = f"model.layers.{found[1]}", found[3]
        role = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(kind, kind)
        zero = torch.zeros_like(tensor) if role == "down_proj" else tensor.clone()
        if pair.source == "mixtral":
            w = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[role]
            after |= {f"{layer}.block_sparse_moe.experts.{e}.{w}.weight": tensor.clone() for e in range(4)}
            after[f"{layer}.block_sparse_moe.gate.weight"] = 0.2 * torch.randn(4, hidden, generator=generator)
        elif pair.source.startswith("granitemoe"):
            moe = f"{layer}.block_sparse_moe"
            after[f"{moe}.router.layer.weight"] = 0.2 * torch.randn(4, hidden, generator=generator)
            if role == "down_proj":
                after[f"{moe}.output_linear.weight"] = torch.stack([tensor] * 4)
            elif role == "gate_proj":
                both = torch.cat([tensor, before[name.replace("gate_proj", "up_proj")]])
                after[f"{moe}.input_linear.weight"] = torch.stack([both] * 4)
                if "shared" in pair.source:
                    after[f"{layer}.shared_mlp.input_linear.weight"] = both
                    after[f"{layer}.shared_mlp.output_linear.weight"] = torch.zeros(hidden, WIDTH)
        elif pair.source == "lfm2_moe":
            after |= {f"{layer}.feed_forward.experts.{e}.{kind}.weight": tensor.clone() for e in range(4)}
            after[f"{layer}.feed_forward.gate.weight"] = 0.2 * torch.randn(4, hidden, generator=generator)
            after[f"{layer}.feed_forward.expert_bias"] = torch.randn(4, generator=generator)
        else:
            part = tensor / 2 if pair.source == "deepseek_v3" and role == "down_proj" else tensor
            after |= {f"{layer}.mlp.experts.{e}.{role}.weight": part.clone() for e in range(4)}
            after[f"{layer}.mlp.gate.weight"] = 0.2 * torch.randn(4, hidden, generator=generator)
            if pair.source == "qwen2_moe":
                after[f"{layer}.mlp.shared_expert.{role}.weight"] = zero
                after[f"{layer}.mlp.shared_expert_gate.weight"] = torch.randn(1, hidden, generator=generator)
            if pair.source == "deepseek_v3":
                after[f"{layer}.mlp.shared_experts.{role}.weight"] = zero
                after[f"{layer}.mlp.gate.e_score_correction_bias"] = torch.randn(4, generator=generator)
    architecture = transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[pair.source]].__name__
    rewrite(dense, target, after, {"model_type": pair.source, "architectures": [architecture], **extra})


@pytest.mark.parametrize("pair", DENSE_NAMES, ids=IDS)
def test_it_undoes_an_upcycle_to_the_byte(tmp_path: Path, pair: DensePair) -> None:
    dense = tmp_path / "dense"
    changes = {"attention_bias": False} if pair.target == "llama" else {}
    before = save_dense(pair.target, dense, **changes)
    first_dense = 1 if pair.source in ("deepseek_v3", "lfm2_moe") else 0
    upcycled(dense, tmp_path / "moe", pair, first_dense)
    expected = logits(load(dense))
    assert (logits(load(tmp_path / "moe")) - expected).abs().max() < 1e-5  # the pair itself is exact
    plan = apply(plan_of(open_checkpoint(tmp_path / "moe")), "to-dense", expert=2, to=pair.target)
    write_plan(plan, tmp_path / "back")
    after = read_tensors(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert torch.equal(logits(load(tmp_path / "back")), expected)
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / n).to_dict() for n in ("back", "dense")]
    assert {k: v for k, v in configs[0].items() if k != "_name_or_path"} == {
        k: v for k, v in configs[1].items() if k != "_name_or_path"
    }


@pytest.mark.parametrize("pair", DENSE_NAMES, ids=IDS)
def test_keys_and_defaults_are_those_of_transformers(pair: DensePair) -> None:
    """A key that a config leaves out means another value in the dense family: each of those is written."""
    moe, dense = (transformers.CONFIG_MAPPING[t]().to_dict() for t in (pair.source, pair.target))
    derived = {"head_dim", "layer_types", "intermediate_size", "model_type", "architectures"}
    differing = {k: v for k, v in moe.items() if k in dense and v != dense[k] and k not in derived}
    if (rope := differing.pop("rope_parameters", None)) is not None:
        differing["rope_theta"] = rope["rope_theta"]
    if "sliding_window" in differing and not differing["sliding_window"]:
        differing["sliding_window"] = pair.defaults.get("sliding_window", moe["sliding_window"])
    if pair.source == "qwen2_moe":
        differing.pop("sliding_window", None)  # 0 there, None here: no window, both
    assert differing == dict(pair.defaults)
    left = moe.keys() - dense.keys() - MOE_KEYS - set(pair.drops) - {"sliding_window"}
    assert not left


def test_no_key_of_a_mixture_stays_under_any_of_its_names(models: Any, tmp_path: Path) -> None:
    """Whatever name a config has for a number of the mixture, a dense model must not keep it."""
    keys = {*EXPERTS_KEYS, *TOP_K_KEYS, *GROUPS_KEYS, *TOP_GROUPS_KEYS, *PREDICTION_KEYS}
    assert keys <= MOE_KEYS
    path = models("mixtral")
    rewrite(path, tmp_path / "model", read_tensors(path), {"top_k_experts": 2, "num_selects": 2, "router_topk": 2})
    after = apply(plan_of(open_checkpoint(tmp_path / "model")), "to-dense", expert=0).config
    assert not keys & after.keys()


def test_a_silent_config_keeps_the_familys_defaults(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    config = {
        k: v for k, v in read_config(path).items() if k not in ("rope_parameters", "sliding_window", "rms_norm_eps")
    }
    rewrite(path, tmp_path / "model", read_tensors(path), {})
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    after = apply(plan_of(open_checkpoint(tmp_path / "model")), "to-dense", expert=0).config
    assert after["rope_theta"] == 1e6
    assert after["sliding_window"] is None
    assert after["rms_norm_eps"] == 1e-5


# What is computed


class _Sum(torch.nn.Module):
    """Some experts, side by side: each always on, with one weight."""

    def __init__(self, experts: torch.nn.Module, chosen: list[int], weight: float) -> None:
        super().__init__()
        self.experts, self.chosen, self.weight = experts, chosen, weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = torch.zeros_like(flat)
        for expert in self.chosen:
            index = torch.full((len(flat), 1), expert)
            total += self.experts(flat, index, torch.full((len(flat), 1), self.weight))
        return total.view(hidden.shape)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("model_type", "routed_scale_key"), [("mixtral", 1.0), ("deepseek_v3", 2.5), ("granitemoe", 1.0)]
)
def test_experts_side_by_side(
    models: Any, tmp_path: Path, model_type: str, routed_scale_key: float, fused: bool
) -> None:
    changes = {"first_k_dense_replace": 0} if model_type == "deepseek_v3" else {}
    path = models(model_type, fused=fused, **changes)
    plan = apply(plan_of(open_checkpoint(path)), "to-dense", concat_top=3, shared="drop")
    write_plan(plan, tmp_path / "out")
    model = load(path)
    for entry, layer in zip(plan.steps[0].report["layers"], model.model.layers, strict=True):
        name = "block_sparse_moe" if hasattr(layer, "block_sparse_moe") else "mlp"
        setattr(layer, name, _Sum(getattr(layer, name).experts, entry["experts"], routed_scale_key / 3))
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 5e-6


def test_side_by_side_takes_the_longest_router_rows(models: Any) -> None:
    path = models("mixtral")
    report = apply(plan_of(open_checkpoint(path)), "to-dense", concat_top=3).steps[0].report
    for entry in report["layers"]:
        rows = read_tensors(path)[f"{entry['layer']}.block_sparse_moe.gate.weight"]
        assert entry["experts"] == sorted((rows - rows.mean(0)).norm(dim=1).argsort()[-3:].tolist())


@pytest.mark.parametrize("fused", [False, True])
def test_the_mean_of_all(models: Any, tmp_path: Path, fused: bool) -> None:
    path = models("mixtral", fused=fused)
    write_plan(apply(plan_of(open_checkpoint(path)), "to-dense", average=True), tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    hub = read_tensors(models("mixtral"))
    for layer in range(2):
        for new, old in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [hub[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{old}.weight"] for e in range(8)]
            found = after[f"model.layers.{layer}.mlp.{new}_proj.weight"]
            assert (found - torch.stack(experts).mean(0)).abs().max() < 1e-6
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


def test_another_expert_in_each_layer(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    write_plan(apply(plan_of(open_checkpoint(path)), "to-dense", expert={0: 5, 1: 2}), tmp_path / "out")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    for layer, expert in ((0, 5), (1, 2)):
        source = before[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"]
        assert same_bits(after[f"model.layers.{layer}.mlp.down_proj.weight"], source)


def test_shared_experts_join_with_half_their_size_in_place_of_a_gate(models: Any, tmp_path: Path) -> None:
    """With a gate of zero the shared expert of Qwen2-MoE counts half, and then joining it is exact."""
    path = models("qwen2_moe", norm_topk_prob=True)
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if "shared_expert_gate" in name:
            tensor.zero_()
        if match := re.search(r"experts\.(\d)\.", name):
            tensors[name] = tensors[name.replace(f"experts.{match[1]}.", "experts.0.")].clone()
    rewrite(path, tmp_path / "model", tensors, {})
    plan = apply(plan_of(open_checkpoint(tmp_path / "model")), "to-dense", expert=0)
    assert plan.config["intermediate_size"] == 24 + 56
    write_plan(plan, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(load(tmp_path / "model"))).abs().max() < 5e-6
    alone = apply(plan_of(open_checkpoint(tmp_path / "model")), "to-dense", expert=0, shared="drop")
    assert alone.config["intermediate_size"] == 24


def test_quantised_experts_keep_their_scales(models: Any, tmp_path: Path) -> None:
    make_fp8(models("qwen3_moe", mlp_only_layers=[]), tmp_path / "fp8")
    plan = plan_of(open_checkpoint(tmp_path / "fp8"))
    write_plan(apply(plan, "to-dense", expert=3), tmp_path / "out")
    before, after = read_tensors(tmp_path / "fp8"), read_tensors(tmp_path / "out")
    for suffix in ("weight", "weight_scale_inv"):
        name = f"down_proj.{suffix}"
        assert same_bits(after[f"model.layers.1.mlp.{name}"], before[f"model.layers.1.mlp.experts.3.{name}"])
    with pytest.raises(RefusedError, match="quantised"):
        apply(plan, "to-dense", concat_top=2)


def test_prediction_layers_go(models: Any, tmp_path: Path) -> None:
    from tests.commands.test_drop_experts import with_prediction_layer

    with_prediction_layer(models("deepseek_v3", first_k_dense_replace=0), tmp_path / "mtp")
    plan = apply(plan_of(open_checkpoint(tmp_path / "mtp")), "to-dense", expert=0, shared="drop")
    assert not [name for name in plan.tensors if "layers.2" in name]
    assert "num_nextn_predict_layers" not in plan.config
    assert any("prediction" in note for note in plan.steps[0].notes)


# Refusals


@pytest.mark.parametrize(
    ("model_type", "changes", "parameters", "message", "hint"),
    [
        ("olmoe", {}, {"expert": 0}, "no dense family", "mixtral"),
        ("gpt_oss", {}, {"expert": 0}, "no dense family", None),
        ("mixtral", {}, {"expert": 8}, "no expert 8", None),
        ("mixtral", {}, {"expert": {0: 1}}, "no expert is named for model.layers.1", None),
        ("mixtral", {}, {"concat_top": 9}, "fewer than 9", None),
        ("mixtral", {}, {"expert": 0, "to": "qwen2"}, "does not become qwen2", "mistral, llama"),
        ("mixtral", {"sliding_window": 8}, {"expert": 0, "to": "llama"}, "sliding_window is 8", None),
        ("qwen2_moe", {"qkv_bias": False}, {"expert": 0, "to": "qwen2"}, "qkv_bias is False", None),
        ("qwen3_moe", {"use_sliding_window": True}, {"expert": 0}, "use_sliding_window is True", None),
        ("qwen3_moe", {"intermediate_size": 72}, {"expert": 0}, "width 72, the new FFNs 24", "--concat-top 3"),
        ("deepseek_v3", {}, {"expert": 0}, "width 40, the new FFNs 48", None),
    ],
)
def test_refusals(
    models: Any, model_type: str, changes: dict[str, Any], parameters: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        apply(plan_of(open_checkpoint(models(model_type, **changes))), "to-dense", **parameters)
    assert hint is None or hint in str(caught.value.hint)


def test_fine_grained_experts_fill_the_dense_width(models: Any, tmp_path: Path) -> None:
    """As in Qwen3-MoE and DeepSeek-V3, whose top-k experts are together as wide as a dense layer."""
    path = models("qwen3_moe", intermediate_size=72)
    write_plan(apply(plan_of(open_checkpoint(path)), "to-dense", concat_top=3), tmp_path / "out")
    assert read_config(tmp_path / "out")["intermediate_size"] == 72
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


@pytest.mark.parametrize("parameters", [{}, {"expert": 0, "average": True}, {"average": True, "concat_top": 2}])
def test_one_choice_and_only_one(models: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="one of expert, average and concat_top"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "to-dense", **parameters)


# The command


def test_the_command_and_its_card(demo: Path, ok: Cli, tmp_path: Path) -> None:
    out = ok("to-dense", demo, "--expert", 3, "-o", tmp_path / "out").out
    assert "mixtral -> mistral" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "this needs training" in card
    assert bool(logits(load(tmp_path / "out")).isfinite().all())
    assert "mean of all" in ok("to-dense", demo, "--average", "--dry-run", "-o", tmp_path / "x").out
