"""What config.json says of single layers follows a new stack, or is refused by name.

The reference is transformers: its config objects, made of the source's config.json and of the output's, must say the
same of a layer and of its origin; and the output computes what transformers' own modules do in the new order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.families.config_keys import Settings
from moesurgery.families.layer_config import LayerOrigin, restacked_config, without_prediction
from moesurgery.families.table import by_model_type
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.families import ROWS
from tests.tiny import PROMPT, build, load, logits, read_config, read_tensors, save_tiny

Cli = Callable[..., Result]
LONGER = [0, 1, 1]


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = read_config(path)
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def stacked(path: Path, out: Path, blocks: list[int], **parameters: Any) -> Path:
    plan = plan_of(open_checkpoint(path))
    write_plan(apply(plan, "tie-blocks", blocks=blocks, materialize=True, distances="none", **parameters), out)
    return out


def merged(path: Path, out: Path, blocks: list[int], cli: Cli) -> Result:
    """Stack single layers by a merge recipe."""
    slices = "\n".join(f"- sources: [{{model: {path}, layer_range: [{b}, {b + 1}]}}]" for b in blocks)
    (out.parent / "stack.yaml").write_text(f"slices:\n{slices}\nmerge_method: passthrough\n")
    return cli("merge", out.parent / "stack.yaml", "-o", out)


def said_by_transformers(path: Path, layer: int) -> dict[str, Any]:
    """Return all that transformers' config object says of one layer."""
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    depth = config.num_hidden_layers
    lists = {k: v for k, v in config.to_dict().items() if isinstance(v, (list, tuple)) and len(v) == depth}
    chance = ("architectures", "time_step_limit", "mtp_layers_block_type", "kv_source_layers")
    found = {key: value[layer] for key, value in lists.items() if key not in chance}
    if config.is_heterogeneous:
        found["per_layer_config"] = json.loads(config.per_layer_config[layer].to_json_string())
    return found


# Every family


@pytest.mark.parametrize("model_type", ROWS)
def test_every_family_says_the_same_of_a_layer_in_its_new_place(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "m")
    if model_type in REFUSED:
        with pytest.raises(RefusedError, match=REFUSED[model_type]):
            stacked(tmp_path / "m", tmp_path / "out", LONGER)
        return
    stacked(tmp_path / "m", tmp_path / "out", LONGER)
    assert bool(logits(load(tmp_path / "out")).isfinite().all())
    for new, old in enumerate(LONGER):
        after, before = said_by_transformers(tmp_path / "out", new), said_by_transformers(tmp_path / "m", old)
        for said in (after, before):  # the counts differ
            for key in ("num_hidden_layers", "layer_types", "mlp_layer_types", "indexer_types", "layers_block_type"):
                said.get("per_layer_config", {}).pop(key, None)
        assert after == before


REFUSED = {
    "jamba": "attn_layer_period is 2",
    "minimax": "the decay of its linear attention goes by the number of the layer",
    "gemma4": "hidden_size_per_layer_input: the embeddings of all layers stand in one tensor",
    "diffusion_gemma": "one stack of blocks",
    "inkling2": "attention residuals go by blocks of layers",
    "inkling2_loop": "attention residuals go by blocks of layers",
    "switch_transformers": "an encoder and a decoder",
    "nllb-moe": "an encoder and a decoder",
    "zaya": "router states flow from layer to layer",
    "longcat_flash": "there is no block 1",
    "qwen3_omni_moe": "two stacks of layers",
}


# Forms of config.json, with the forward pass of transformers' modules in the new order


def nemotron(path: Path) -> torch.nn.Module:
    kinds = ["linear_attention", "full_attention", "mlp", "moe"]
    model = build("nemotron_h", num_hidden_layers=4, layers_block_type=kinds)
    model.save_pretrained(path, save_original_format=True)
    return model


def test_nemotron_as_transformers_saves_it(tmp_path: Path, cli: Cli, ok: Cli) -> None:
    """`layers_block_type` and no number of layers: the list is what says how deep the model is."""
    blocks = [0, 1, 2, 3, 1, 2, 3]
    model = nemotron(tmp_path / "m")
    before = read_config(tmp_path / "m")
    assert "num_hidden_layers" not in before
    assert "1 MoE layers of 4 x 8 experts" in ok("count-params", tmp_path / "m").out
    stacked(tmp_path / "m", tmp_path / "tied", blocks)
    assert merged(tmp_path / "m", tmp_path / "merged", blocks, cli).code == 0
    expected = in_order(model, blocks, "layers_block_type")
    for out in (tmp_path / "tied", tmp_path / "merged"):
        assert read_config(out) == before | {"layers_block_type": [before["layers_block_type"][b] for b in blocks]}
        assert torch.equal(logits(load(out)), expected)
        assert not validate_checkpoint(out, level="config").findings


@pytest.mark.parametrize("stated", [True, False])
def test_nemotron_as_it_is_published(tmp_path: Path, stated: bool) -> None:
    """`hybrid_override_pattern`, a letter for each layer, with or without the number of them."""
    model = nemotron(tmp_path / "m")
    edited(tmp_path / "m", lambda c: c.pop("layers_block_type"))
    letters = {"hybrid_override_pattern": "M*-E"} | ({"num_hidden_layers": 4} if stated else {})
    edited(tmp_path / "m", lambda c: c.update(letters))
    blocks = [0, 1, 3, 2, 3]
    stacked(tmp_path / "m", tmp_path / "out", blocks)
    assert read_config(tmp_path / "out")["hybrid_override_pattern"] == "M*E-E"
    assert read_config(tmp_path / "out").get("num_hidden_layers") == (5 if stated else None)
    assert torch.equal(logits(load(tmp_path / "out")), in_order(model, blocks, "layers_block_type"))


def in_order(model: torch.nn.Module, blocks: list[int], *lists: str) -> torch.Tensor:
    """Return the logits of transformers' own modules with its layers in another order; `model` is not used again."""
    inner = model.get_submodule("model")
    inner = getattr(inner, "language_model", inner)
    inner.layers = torch.nn.ModuleList([inner.layers[b] for b in blocks])
    config = inner.config
    for key in lists:
        setattr(config, key, [getattr(config, key)[b] for b in blocks])
    if isinstance(getattr(type(config), "num_hidden_layers", None), property) is False:
        config.num_hidden_layers = len(blocks)
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT, use_cache=False).logits.float()


def step(path: Path) -> dict[str, Any]:
    """Save Step-3.5 as it is published: lists go on with an entry for each prediction layer, MoE layers are text."""
    save_tiny("step3p7", path, num_hidden_layers=2)

    def publish(config: dict[str, Any]) -> None:
        text = config["text_config"]
        for key in ("mlp_layer_types", "per_layer_config", "rope_parameters"):
            text.pop(key, None)
        text |= {
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
            "moe_layers_enum": "1,2",
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_theta": [5e6, 1e4, 2e4],
            "partial_rotary_factors": [0.5, 1, 1],
            "swiglu_limits": [0, 7.0, 3.0],
            "swiglu_limits_shared": [0, 5.0, 2.0],
            "sliding_window": 16,
        }

    edited(path, publish)
    text: dict[str, Any] = read_config(path)["text_config"]
    return text


@pytest.mark.parametrize("blocks", [[0, 1, 1], [0, 1, 0, 1], [1], [0, 0, 1]])
def test_lists_that_go_on_with_prediction_layers(tmp_path: Path, cli: Cli, blocks: list[int]) -> None:
    before = step(tmp_path / "m")
    stacked(tmp_path / "m", tmp_path / "tied", blocks)
    assert merged(tmp_path / "m", tmp_path / "merged", blocks, cli).code == 0
    for out in (tmp_path / "tied", tmp_path / "merged"):
        text = read_config(out)["text_config"]
        for key in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
            assert text[key] == [before[key][b] for b in (*blocks, 2)]
        sparse = [new for new, old in enumerate(blocks) if old == 1]
        assert text["moe_layers_enum"] == ",".join(map(str, (*sparse, len(blocks))))
        assert text["num_hidden_layers"] == len(blocks)
        for new, old in enumerate(blocks):
            after, source = said_by_transformers(out, new), said_by_transformers(tmp_path / "m", old)
            assert [after[k] for k in ("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared")] == [
                source[k] for k in ("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared")
            ]
        assert bool(logits(load(out)).isfinite().all())
    none = stacked(tmp_path / "m", tmp_path / "none", blocks, prediction_layers="drop")
    text = read_config(none)["text_config"]
    assert text["num_nextn_predict_layers"] == 0
    assert text["layer_types"] == [before["layer_types"][b] for b in blocks]
    assert text["moe_layers_enum"] == ",".join(map(str, sparse))
    load(none)


def test_objects_keyed_by_layer(tmp_path: Path) -> None:
    """`per_layer_config`: what differs in single layers, by their numbers."""
    save_tiny("step3p7", tmp_path / "m", num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    entry = {"query_pre_attn_scalar": 2}
    edited(tmp_path / "m", lambda c: c["text_config"].update(per_layer_config={"1": entry}))
    out = stacked(tmp_path / "m", tmp_path / "out", [1, 0, 1])
    assert read_config(out)["text_config"]["per_layer_config"] == {"0": entry, "2": entry}
    configs = transformers.AutoConfig.from_pretrained(out).text_config.per_layer_config
    assert [config.query_pre_attn_scalar for config in configs] == [2, 8, 2]
    expected = in_order(load(tmp_path / "m"), [1, 0, 1], "layer_types")
    found = logits(load(out))
    assert torch.equal(found, expected)
    edited(out, lambda c: c["text_config"].update(per_layer_config={"1": entry}))
    assert not torch.equal(logits(load(out)), expected)  # else the test could not fail


def test_an_object_keyed_by_layer_follows_the_number_of_experts(tmp_path: Path) -> None:
    save_tiny("step3p7", tmp_path / "m", num_hidden_layers=2)
    entry = {"n_routed_experts": 8, "num_experts_per_tok": 2, "sliding_window": 3}
    edited(tmp_path / "m", lambda c: c["text_config"].update(per_layer_config={"1": entry}))
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "drop-experts", experts=[7])
    plan = apply(plan, "rescale", top_k=3, scale="none")
    found = plan.config["text_config"]["per_layer_config"]
    assert found == {"1": {"n_routed_experts": 7, "num_experts_per_tok": 3, "sliding_window": 3}}
    edited(tmp_path / "m", lambda c: c["text_config"]["per_layer_config"]["1"].update(num_experts_per_tok=4))
    with pytest.raises(RefusedError, match="gives layer 1 a num_experts_per_tok of 4, the others have 2") as caught:
        apply(plan_of(open_checkpoint(tmp_path / "m")), "rescale", top_k=3, scale="none")
    assert "take num_experts_per_tok out of per_layer_config" in str(caught.value.hint)


def settings(model_type: str, **config: Any) -> Settings:
    return Settings(by_model_type(model_type)[0], {"model_type": model_type, "num_hidden_layers": 4, **config})


def new_config(model: Settings, blocks: list[int]) -> dict[str, Any]:
    return restacked_config(model, [LayerOrigin(model, block) for block in blocks])


BLOCKS = [0, 1, 2, 3, 1, 2, 3]
SHARING = ["full", "full", "shared", "full", "full", "shared", "full"]


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [
        # Kimi-Linear counts its layers from 1, in an object of their own.
        (
            "kimi_linear",
            {"linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4}},
            {"linear_attn_config": {"kda_layers": [1, 2, 3, 5, 6], "full_attn_layers": [4, 7], "num_heads": 4}},
        ),
        ("qwen4_exp", {"ple_layer_ids": [2, 3]}, {"ple_layer_ids": [2, 3, 5, 6]}),
        (
            "minimax_m3_vl",
            {"sparse_attention_config": {"sparse_attention_freq": [0, 1, 0, 1], "sparse_topk_blocks": 16}},
            {"sparse_attention_config": {"sparse_attention_freq": [0, 1, 0, 1, 1, 0, 1], "sparse_topk_blocks": 16}},
        ),
        ("inkling_mm_model", {"local_layer_ids": [0, 2]}, {"local_layer_ids": [0, 2, 5]}),
        ("mistral_large4", {"kv_source_layers": [0, 1, 2, 3]}, {"kv_source_layers": list(range(7))}),
        (
            "laguna",
            {"num_attention_heads_per_layer": [4, 8, 4, 9]},
            {"num_attention_heads_per_layer": [4, 8, 4, 9, 8, 4, 9]},
        ),
        (
            "deepseek_v4",
            {"num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 4, 0]},
            {"num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 4, 4, 128, 4, 0]},
        ),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1, 1, 0]}, {"hybrid_layer_pattern": [0, 1, 1, 0, 1, 1, 0]}),
        ("qwen3_moe", {"moe_layer_freq": [0, 1, 1, 1]}, {"moe_layer_freq": [0, 1, 1, 1, 1, 1, 1]}),
        ("glm_moe_dsa", {"indexer_types": ["full", "full", "shared", "full"]}, {"indexer_types": SHARING}),
        ("glm_moe_dsa", {"index_topk_pattern": "FFSF"}, {"index_topk_pattern": "FFSFFSF"}),
        ("qwen3_moe", {"inner": {"mlp_only_layers": [0]}}, {"inner": {"mlp_only_layers": [0]}}),
        (
            "qwen3_moe",
            {"rope_scaling": {"mrope_section": [1, 2, 3, 4]}},
            {"rope_scaling": {"mrope_section": [1, 2, 3, 4]}},
        ),
    ],
)
def test_keys_of_single_families(model_type: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    model = settings(model_type, **before)
    found = new_config(model, BLOCKS)
    assert {key: found[key] for key in after} == after
    assert found["num_hidden_layers"] == 7
    assert {k: v for k, v in found.items() if k not in (*before, "num_hidden_layers")} == {"model_type": model_type}


@pytest.mark.parametrize(
    ("model_type", "config", "blocks", "message"),
    [
        ("qwen3_moe", {"layer_gain": [1, 2, 3, 4]}, BLOCKS, "layer_gain has as many entries as there are layers"),
        (
            "qwen3_moe",
            {"layer_gain": [1, 2, 3, 4, 5], "num_nextn_predict_layers": 1},
            BLOCKS,
            "layer_gain has as many entries as there are layers",
        ),
        ("qwen3_moe", {"inner": {"layer_gain": [1, 2, 3, 4]}}, BLOCKS, "layer_gain has as many entries"),
        ("qwen3_moe", {"gains": {"0": 1.0, "3": 2.0}}, BLOCKS, "gains is keyed by numbers"),
        ("qwen3_moe", {"wide_layers": [1, 3]}, BLOCKS, "wide_layers names numbers that may be those of layers"),
        ("qwen3_moe", {"wide_layers": "1,3"}, [3, 2, 1, 0], "wide_layers names numbers that may be those of layers"),
        ("qwen3_moe", {"wide_pattern": "ABAB"}, BLOCKS, "wide_pattern has as many letters as there are layers"),
        (
            "qwen3_moe",
            {"layer_types": ["full_attention"] * 6, "num_nextn_predict_layers": 1},
            BLOCKS,
            "layer_types has 6 entries for 4 layers and 1 for multi-token prediction",
        ),
        ("mistral_large4", {"kv_source_layers": [0, 1, 1, 3]}, BLOCKS, "kv_source_layers: the last layers use"),
        (
            "glm_moe_dsa",
            {"indexer_types": ["full", "shared", "full", "shared"]},
            [0, 1, 3, 2],
            "layer 3 shares the indexer of layer 2",
        ),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "full"]}, [1, 2, 3], "layer 1 shares the indexer"),
        ("glm_moe_dsa", {"index_topk_freq": 4}, BLOCKS, "index_topk_freq is 4"),
        ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1}, [0, 2, 1, 3], "attn_layer_period is 3"),
        ("hunyuan_v1_moe", {"use_cla": True}, BLOCKS, "use_cla: layers use the keys and values of earlier ones"),
        ("minicpm3", {"scale_depth": 1.4}, [0, 1, 2], "scale_depth: what a layer adds is divided by"),
        ("diffllama", {}, BLOCKS, "diffllama: its attention subtracts a share"),
        ("recurrent_gemma", {"block_types": ["recurrent", "recurrent", "attention"]}, [0, 1, 3], "block_types is"),
        ("zaya", {}, BLOCKS, "zaya: router states flow from layer to layer"),
        (
            "qwen3_moe",
            {"quantization_config": {"ignore": [r"re:.*layers\.(0|1)\..*"]}},
            BLOCKS,
            r"quantization_config names layers\\.\(0\|1\)",
        ),
        (
            "qwen3_moe",
            {"quantization_config": {"dynamic": {"-:model.layers.2.mlp": {}}}},
            BLOCKS,
            "quantization_config names layers.2",
        ),
    ],
)
def test_what_cannot_follow_is_refused_by_name(
    model_type: str, config: dict[str, Any], blocks: list[int], message: str
) -> None:
    families = by_model_type(model_type) or by_model_type("qwen3_moe")
    model = Settings(families[0], {"model_type": model_type, "num_hidden_layers": 4, **config})
    with pytest.raises(RefusedError, match=message) as caught:
        new_config(model, blocks)
    assert caught.value.hint
    assert new_config(model, [0, 1, 2, 3]) == model.config


@pytest.mark.parametrize(
    "config",
    [
        {"wide_layers": [8, 16]},  # numbers that no layer has
        {"id2label": {"0": "a", "1": "b"}},
        {"mtp_layer_types": ["full_attention"] * 4},
        {"vision_config": {"depth": 4, "fullatt_block_indexes": [1, 3], "widths": [1, 2, 3, 4]}},
        {"quantization_config": {"ignore": ["lm_head", r"re:.*layers\.\d+\.mlp\.gate"]}},
        {"rope_parameters": {"long_factor": [1.0, 1.0, 1.0, 1.0]}},
    ],
)
def test_what_is_not_about_layers_stays(config: dict[str, Any]) -> None:
    model = settings("qwen3_moe", **config)
    assert new_config(model, BLOCKS) == {**model.config, "num_hidden_layers": 7}


def test_entries_of_prediction_layers_go_with_them() -> None:
    model = settings(
        "qwen3_moe", num_nextn_predict_layers=2, layer_types=["a", "b", "c", "d", "e", "f"], moe_layers=[1, 3, 5]
    )
    found = without_prediction(model)
    assert (found["num_nextn_predict_layers"], found["layer_types"], found["moe_layers"]) == (
        0,
        ["a", "b", "c", "d"],
        [1, 3],
    )


def test_slices_refuse_what_ties_do(tmp_path: Path, cli: Cli) -> None:
    """A merge of layers asks the family too: the first layer of Inkling-2 has no query of its own."""
    save_tiny("inkling2", tmp_path / "m")
    result = merged(tmp_path / "m", tmp_path / "out", [0, 1, 1], cli)
    assert result.code == 2
    assert "stack.yaml:1: inkling2: its attention residuals go by blocks of layers" in result.err
    assert "the order of its layers cannot change" in result.err


def test_a_dense_model_has_no_entries_for_prediction_layers(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "m", num_hidden_layers=2, mlp_only_layers=[])
    more = {"num_nextn_predict_layers": 1, "layer_types": ["full_attention"] * 3}
    keyed = {"per_layer_config": {"1": {"num_experts": 8, "attention_bias": False}}}
    edited(tmp_path / "m", lambda c: c.update(more | keyed))
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "to-dense", expert=0)
    assert plan.config["layer_types"] == ["full_attention"] * 2
    assert plan.config["per_layer_config"] == {"1": {"attention_bias": False}}
    write_plan(plan, tmp_path / "out")
    load(tmp_path / "out")
    edited(tmp_path / "m", lambda c: c["per_layer_config"]["1"].update(intermediate_size=9))
    with pytest.raises(RefusedError, match="per_layer_config gives layer 1 its own intermediate_size"):
        apply(plan_of(open_checkpoint(tmp_path / "m")), "to-dense", expert=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types says of 1 layers what they are; there are 2"),
        ({"per_layer_config": {"2": {"head_dim": 8}}}, "per_layer_config speaks of layer 2; there are 2 layers"),
    ],
)
def test_validate_compares_lists_with_the_stack(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_tiny("qwen3_moe", tmp_path / "m", num_hidden_layers=2)
    assert not [f for f in validate_checkpoint(tmp_path / "m", level="config").findings if f.code == "C07"]
    edited(tmp_path / "m", lambda c: c.update(change))
    found = validate_checkpoint(tmp_path / "m", level="config").findings
    assert message in [f.message for f in found if f.code == "C07"]


def test_tensors_follow_what_the_list_says(tmp_path: Path) -> None:
    """The output of a new stack holds the tensors of each origin, byte for byte."""
    nemotron(tmp_path / "m")
    stacked(tmp_path / "m", tmp_path / "out", [0, 2, 3])
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    for new, old in enumerate([0, 2, 3]):
        for name, tensor in before.items():
            if f"layers.{old}." in name:
                assert torch.equal(after[name.replace(f"layers.{old}.", f"layers.{new}.")], tensor)
