"""The table of architectures, held to transformers' config classes: defaults, keys, what is written and read back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moesurgery.decoders.architecture import TRAITS, Architecture
from moesurgery.decoders.lookup import DENSE_TYPES, MOE_TYPES, architecture
from moesurgery.decoders.pairs import PAIRS
from moesurgery.errors import CheckpointError

ALL = (*DENSE_TYPES, *MOE_TYPES)
SIZES = {
    "vocab_size": 300_000,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# Config keys of these types that change nothing at step 0: training, caches, and what other settings switch off.
IDLE = {
    *("use_cache", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("embd_pdrop", "resid_pdrop", "residual_dropout", "eod_token_id", "sep_token_id"),
    "original_max_position_embeddings",  # phi3: read by its RoPE, and by the RoPE of whatever type it is copied to
    *("attn_scale", "floor_scale", "attention_chunk_size", "intermediate_size_mlp"),  # llama4: no tuning, no chunks
    *("prefix_dense_intermediate_size", "prefix_dense_sliding_window_pattern"),  # cohere2_moe: no dense layers
    "moe_norm_min",  # ernie4_5_moe: gates sum to more
    "num_local_experts",  # qwen3_moe: an alias
    # granitemoehybrid: no mamba layers
    *(f"mamba_{key}" for key in ("d_state", "n_groups", "d_conv", "chunk_size", "expand", "conv_bias", "proj_bias")),
    *("position_embedding_type", "time_step_floor", "time_step_limit", "time_step_max", "time_step_min"),
}
# granitemoehybrid: no layer of these mixes otherwise.
ONLY_ATTENTION = {"lfm2_moe": "full_attention", "granitemoehybrid": "attention"}
# Configs that leave out most, and some that say more.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": None, "rms_norm_eps": 1e-3},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    {"rope_theta": 500.0, "tie_word_embeddings": True, "attention_bias": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}},
]


def plain(traits: dict[str, Any]) -> dict[str, Any]:
    """Return traits without what transformers writes down redundantly."""
    rope = traits["rope"]
    redundant = {"type", "max_position_embeddings"} if "rope_type" in rope.rules else set()
    rules = {k: v for k, v in rope.rules.items() if k not in redundant and (k, v) != ("rope_type", "default")}
    found = {**traits, "rope": rope._replace(rules=rules)}
    if found.get("layer_rope_theta") == [rope.theta] * SIZES["num_hidden_layers"]:
        found["layer_rope_theta"] = None
    return found


def expanded(entry: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with every default that transformers fills in."""
    return CONFIG_MAPPING[entry.model_type](**config).to_dict()


def small(entry: Architecture) -> dict[str, Any]:
    return {**SIZES, **(entry.moe.settings if entry.moe else {})}


def accepted() -> list[Any]:
    """Return the entries with each variant that means something to their config class."""
    found = []
    for entry in ALL:
        for number, variant in enumerate(VARIANTS):
            config = {**small(entry), **{k: v for k, v in copy.deepcopy(variant).items() if k in entry.keys}}
            if entry.model_type == "olmo3" and "rope_parameters" in config:
                continue  # keyed by layer type there; transformers overlooks others, and the proof refuses them
            if entry.model_type in ONLY_ATTENTION:
                config["layer_types"] = [ONLY_ATTENTION[entry.model_type]] * SIZES["num_hidden_layers"]
            try:
                full = expanded(entry, copy.deepcopy(config))
            except (ValueError, TypeError, StrictDataclassError):
                continue  # such as null for a number that must be there
            found.append(pytest.param(entry, config, full, id=f"{entry.model_type}-{number}"))
    return found


@pytest.mark.parametrize(("entry", "config", "full"), accepted())
def test_what_a_config_leaves_out_is_read_as_in_transformers(
    entry: Architecture, config: dict[str, Any], full: dict[str, Any]
) -> None:
    a, b = plain(entry.read(config)), plain(entry.read(full))
    assert {k: (a[k], b[k]) for k in a if a[k] != b[k]} == {}


def test_most_variants_are_accepted() -> None:
    assert len(accepted()) > 4 * len(ALL)


@pytest.mark.parametrize("entry", ALL, ids=lambda e: e.model_type)
def test_every_key_of_the_config_class_is_known(entry: Architecture) -> None:
    keys = set(expanded(entry, small(entry))) - set(transformers.PretrainedConfig().to_dict())
    known = {*entry.keys, *SIZES, *IDLE}
    if entry.moe:
        flags = getattr(entry.family.routing.renormalised, "keys", ())
        known |= {entry.family.experts_key, entry.family.top_k_key, entry.moe.width, *flags}
        known |= {*entry.moe.settings, *entry.moe.per_layer}
        if shared := entry.moe.shared:
            known |= {str(shared.width), str(shared.count), *shared.settings}
    assert keys - known == set()


@pytest.mark.parametrize("entry", ALL, ids=lambda e: e.model_type)
def test_traits_are_named_and_classes_exist(entry: Architecture) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[entry.model_type] == entry.causal_lm
    unnamed = {t for t in entry.traits if t not in TRAITS}
    # Shapes of a kind of attention or mixer that both sides of a pair must have.
    assert all(
        t.startswith(("linear_", "conv_", "qk_nope", "v_head", "kv_lora", "q_lora", "layer_rope")) for t in unnamed
    )
    assert (entry.ffn is None) == (entry.moe is not None)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.source_type}-{p.target_type}")
def test_a_written_config_reads_back_as_the_same_traits(pair: Any) -> None:
    config = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "qkv_bias": False}
    if pair.source_type == "mistral":
        config["sliding_window"] = None
    if pair.source_type in ("qwen3_5_text", "lfm2"):
        config["layer_types"] = ["full_attention"] * 6
    if pair.source_type == "olmo3":
        config["layer_types"] = ["full_attention"] * 6
    if pair.source_type == "ministral3":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    if pair.source_type == "granite_swa":
        config["layer_types"] = ["full_attention", "sliding_attention"] * 3
    conversion, reasons = pair.conversion(config)
    assert reasons == []
    wanted = pair.source.read(config)
    if pair.source_type == "cohere":  # RoPE comes with a window there: one that no context fills
        wanted["layers"] = tuple(layer._replace(window=1 << 20) for layer in wanted["layers"])
    for rewrite in conversion.rewrites:
        wanted.update({rewrite.trait: rewrite.after, **rewrite.then})
    found = pair.target.read(conversion.config)
    # Through transformers, too: what we leave out must not get another meaning there.
    assert plain({k: found[k] for k in wanted if k in found}) == plain({k: v for k, v in wanted.items() if k in found})
    full = pair.target.read(expanded(pair.target, {**conversion.config, **small(pair.target)}))
    assert plain({k: full[k] for k in wanted if k in full}) == plain({k: v for k, v in wanted.items() if k in full})


def test_configs_that_make_no_sense_are_refused() -> None:
    entry = architecture("llama")
    assert entry is not None
    with pytest.raises(CheckpointError, match="num_hidden_layers is 'two'"):
        entry.read({**SIZES, "num_hidden_layers": "two"})
    assert architecture("gpt2") is None
