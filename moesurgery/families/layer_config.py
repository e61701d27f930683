"""What config.json says of single layers, and how it follows when blocks are repeated, left out or moved.

config.json speaks of layers in lists with an entry for each, in lists of layer numbers, as the first so many, and
by period. `trait` reads all of them for one layer; `restacked` writes them for a new order and then checks with
`trait` that every layer is what it was. What cannot be said in the new order is refused by key.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.families.family import LAYERS_KEYS
from moesurgery.families.settings import Settings, section

# One entry per layer.
LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list", "no_rope_layers", "moe_layer_freq"),
    *("layer_rope_theta", "sliding_window_list", "swiglu_limits", "num_experts", "moe_topk", "num_shared_expert"),
    *("moe_intermediate_size", "intermediate_size", "num_key_value_heads", "num_attention_heads"),
    "hybrid_override_pattern",  # a string with a letter per layer
)
# Numbers of layers; `moe_layers_enum` as text, "3,4,5".
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "dense_layers", "moe_layers_enum")
# The first so many layers.
FIRST = ("first_k_dense_replace", "num_dense_layers")
# By period; never rewritten, only checked.
PERIODS = (
    *("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "moe_layer_interval"),
    *("sliding_window_pattern", "attn_layer_period", "expert_layer_period", "no_rope_layer_interval"),
    "full_attention_interval",
)
# What a list of the same fact, if there is one, leaves without meaning.
OVERRULED = {
    "sliding_window_pattern": "layer_types",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
OFFSETS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
# Model types of transformers 5.23 whose layers differ in attention by number where config.json has none of these.
ATTENTION = frozenset(
    (
        *(
            "layer_types",
            "layers_block_type",
            "attn_type_list",
            "no_rope_layers",
            "full_attn_idxs",
            "attn_layer_period",
        ),
        *("attn_layer_indices", "hybrid_override_pattern", "sliding_window_list", "sliding_window_pattern"),
        *("full_attention_interval", "no_rope_layer_interval"),
    )
)
ALTERNATING = frozenset(
    (
        *("afmoe", "bailing_hybrid", "beam", "cohere2", "cohere2_moe", "cwm", "deepseek_v4", "dots3_note_text"),
        *("exaone4", "exaone_moe", "flint", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm5_next_text"),
        *("gemma4_unified_text", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2_text", "inkling_text"),
        *("kimi_linear", "kolibri1", "lfm3", "llama4_text", "mimo_v2_flash", "minimax", "mistral_large4_text"),
        *("modernbert-decoder", "muse_glimmer_text", "muse_spark_text", "olmo3", "olmo_hybrid", "qwen3_5_moe_text"),
        *("qwen3_5_text", "qwen3_next", "qwen4_exp_text", "smollm3", "vaultgemma", "zamba"),
    )
)
# Lists that may be as long as the model is deep, by chance.
NOT_BY_LAYER = frozenset(
    ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "layer_tie_map", "layer_tie_exclude")
)
# Behaviour that depends on the number of a layer, in code or by reaching into other layers.
BY_NUMBER = {
    "num_kv_shared_layers": "the last layers use the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by the number of the layer",
}


def trait(settings: Settings, layer: int) -> dict[str, Any]:
    """Return what the config says of one layer, by key."""
    found: dict[str, Any] = {}
    depth = settings.layers or 0
    for part in settings.sections():
        for key in LISTS:
            value = part.get(key)
            if isinstance(value, (list, str)) and len(value) == depth:
                found.setdefault(key, value[layer])
        for key in NUMBERS:
            if (numbers := _numbers(part.get(key))) is not None:
                found.setdefault(key, layer in numbers)
        for key in FIRST:
            if type(part.get(key)) is int:
                found.setdefault(key, layer < part[key])
        if part.get("use_sliding_window") is True and type(part.get("max_window_layers")) is int:
            found.setdefault("max_window_layers", layer >= part["max_window_layers"])
        for key in ("moe_layer_start_index", "moe_layer_end_index"):
            if type(part.get(key)) is int and part[key] >= 0:
                found.setdefault(key, layer >= part[key] if "start" in key else layer <= part[key])
        for key in PERIODS:
            period = part.get(key)
            if type(period) is int and period > 1:
                shift = part.get(OFFSETS[key], 0) if key in OFFSETS else -1
                found.setdefault(key, (layer - shift) % period == 0)
    return {key: value for key, value in found.items() if OVERRULED.get(key) not in found}


def restacked(settings: Settings, sources: Sequence[int]) -> dict[str, Any]:
    """Return the config of a model whose layer i is layer `sources[i]` of this one.

    Raises RefusedError for what the config cannot say of the new order.
    """
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    depth = settings.layers
    by_code = ALTERNATING.intersection(str(part.get("model_type")) for part in settings.sections())
    if by_code and ATTENTION.isdisjoint(trait(settings, 0)):
        raise RefusedError(
            f"config.json does not say what attention each layer has; the code of {min(by_code)} then goes by number",
            "add layer_types to config.json",
        )
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if not isinstance(part, MutableMapping) or not any(part.get(key) is not None for key in LAYERS_KEYS):
            continue
        for key, reason in BY_NUMBER.items():
            if part.get(key):
                raise RefusedError(f"config.json: {key}: {reason}", "the order of its layers cannot change")
        for key, value in part.items():
            part[key] = _moved(key, value, sources, depth)
        for key in LAYERS_KEYS:
            if part.get(key) is not None:
                part[key] = len(sources)
    after = replace(settings, config=config)
    for new, old in enumerate(sources):
        before, now = trait(settings, old), trait(after, new)
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                raise RefusedError(
                    f"config.json: {key} is {settings.first((key,))!r}, and cannot say of layer {new} what it says of"
                    f" layer {old}, whose place it takes",
                    "choose an order in which layers of a kind stand where such layers stood",
                )
    return config


def _moved(key: str, value: Any, sources: Sequence[int], depth: int | None) -> Any:
    """Return what one entry of the config becomes."""
    if key in NUMBERS and (numbers := _numbers(value)) is not None:
        moved = [new for new, old in enumerate(sources) if old in numbers]
        return ",".join(map(str, moved)) if isinstance(value, str) else moved
    if key in FIRST and type(value) is int:
        # Of the layers that were among the first, those that still are; `restacked` checks the others.
        return next((new for new, old in enumerate(sources) if old >= value), len(sources))
    if not isinstance(value, (list, str)) or len(value) != depth or key in NOT_BY_LAYER:
        return value
    if key in LISTS:
        entries = [value[old] for old in sources]
        return "".join(entries) if isinstance(value, str) else entries
    if isinstance(value, list) and (depth or 0) > 1:
        raise RefusedError(
            f"config.json: {key} has as many entries as there are layers, and it is not known whether they are theirs",
            "if they are, add the key to moesurgery/families/layer_config.py",
        )
    return value


def _numbers(value: Any) -> set[int] | None:
    """Return a list of layer numbers, also written as text, as a set; None where it is none."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return {int(part) for part in parts} if parts and all(part.isdigit() for part in parts) else None
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return set(value)
    return None
