"""What config.json says of single layers, and how it follows when blocks are repeated, left out or moved.

config.json speaks of layers in lists with an entry for each, in lists of layer numbers, as the first so many, and
by period. `layer_settings` reads all of them for one layer; `restacked_config` writes them for a new order and then checks with
`layer_settings` that every layer is what it was. What cannot be said in the new order is refused by key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.components import RESIDUAL
from moesurgery.families.config_keys import Settings, section
from moesurgery.families.family import LAYERS_KEYS, PREDICTION_KEYS
from moesurgery.families.quantised import quantisation_config

# One entry per layer.
LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list", "no_rope_layers", "moe_layer_freq"),
    *("layer_rope_theta", "sliding_window_list", "swiglu_limits", "num_experts", "moe_topk", "num_shared_expert"),
    *("moe_intermediate_size", "intermediate_size", "num_key_value_heads", "num_attention_heads"),
    "hybrid_override_pattern",  # a string with a letter per layer
)
# Numbers of layers; `moe_layers_enum` as text, "3,4,5".
NUMBERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "dense_layers", "moe_layers_enum"),
    "cross_attention_layers",
)
# The first so many layers, or the first that is not; the last that is.
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
LAST = ("moe_layer_end_index",)
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
ATTENTION_KEYS = frozenset(
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
_LISTED = re.compile(r"\b(?:layers|blocks|block|h)\.\d+\b")
# Lists that may be as long as the model is deep, by chance.
NOT_BY_LAYER = frozenset(
    ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "layer_tie_map", "layer_tie_exclude")
)
# Behaviour that depends on the number of a layer, in code or by reaching into other layers.
BY_NUMBER = {
    "num_kv_shared_layers": "the last layers use the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by the number of the layer",
}


def layer_settings(settings: Settings, layer: int) -> dict[str, Any]:
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
        for key in LAST:
            if type(part.get(key)) is int and part[key] >= 0:
                found.setdefault(key, layer <= part[key])
        if part.get("use_sliding_window") is True and type(part.get("max_window_layers")) is int:
            found.setdefault("max_window_layers", layer >= part["max_window_layers"])
        for key in PERIODS:
            period = part.get(key)
            if type(period) is int and period > 1:
                shift = part.get(OFFSETS[key], 0) if key in OFFSETS else -1
                found.setdefault(key, (layer - shift) % period == 0)
    return {key: value for key, value in found.items() if OVERRULED.get(key) not in found}


class LayerOrigin(NamedTuple):
    """Where a layer of a stack comes from: the settings of a model, and the layer's number in it."""

    settings: Settings
    layer: int


def refuse_tables(anatomy: Anatomy, origins: Sequence[LayerOrigin]) -> None:
    """Refuse a new order of layers where tensors outside the layers belong to a layer each, by their number.

    Inkling 2 keeps the queries of its residual blocks so (`attn_res.attn_queries.0` is that of the second layer). They
    would stay where they are, and loaders make up those that then lack.
    """
    if [origin.layer for origin in origins] == list(range(anatomy.settings.layers or 0)):
        return
    for name, part in anatomy.component.items():
        if part == RESIDUAL and name not in anatomy.layer and any(word.isdigit() for word in name.split(".")):
            raise RefusedError(
                f"{name} belongs to one layer by its number, and stands outside the layers: it cannot follow them",
                "the layers of this model keep their number and order",
            )


def restacked_config(settings: Settings, origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """Return the config of a model whose layers come from the layers `origins`, of this model or of others like it.

    Raises RefusedError for what the config cannot say of the new order.
    """
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    moved = any(origin.layer != new for new, origin in enumerate(origins))
    whole = not moved and len(origins) == settings.layers
    if whole and all(origin.settings.config == settings.config for origin in origins):
        return config
    by_code = ALTERNATING.intersection(str(part.get("model_type")) for part in settings.sections())
    if moved and by_code and ATTENTION_KEYS.isdisjoint(layer_settings(settings, 0)):
        raise RefusedError(
            f"config.json does not say what attention each layer has; the code of {min(by_code)} then goes by number",
            "add layer_types to config.json",
        )
    if moved and (listed := _LISTED.search(str(quantisation_config(settings.config)))):
        raise RefusedError(
            f"quantization_config names {listed[0]}: it cannot follow a new order of layers",
            "dequantise first with `moesurgery convert --dequantize`",
        )
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if not isinstance(part, MutableMapping) or not any(part.get(key) is not None for key in LAYERS_KEYS):
            continue
        for key, reason in BY_NUMBER.items():
            if part.get(key) and not whole:
                raise RefusedError(f"config.json: {key}: {reason}", "the order of its layers cannot change")
        theirs = [section(origin.settings.config, path) or {} for origin in origins]
        for key, value in part.items():
            layers = [(their.get(key), origin) for their, origin in zip(theirs, origins, strict=True)]
            part[key] = _moved(key, value, layers, settings.layers)
        for key in LAYERS_KEYS:
            if part.get(key) is not None:
                part[key] = len(origins)
    after = replace(settings, config=config)
    for new, origin in enumerate(origins):
        before, now = layer_settings(origin.settings, origin.layer), layer_settings(after, new)
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                raise RefusedError(
                    f"config.json: {key} is {settings.first((key,))!r}, and cannot say of layer {new} what it says of"
                    f" layer {origin.layer}, which takes that place",
                    "choose an order in which layers of a kind stand where such layers stood",
                )
    return config


def _moved(key: str, value: Any, layers: Sequence[tuple[Any, LayerOrigin]], depth: int | None) -> Any:
    """Return what one entry of the config becomes; `layers` has that entry of each layer's own model."""
    if key in NUMBERS and _numbers(value) is not None:
        moved = [new for new, (theirs, origin) in enumerate(layers) if origin.layer in (_numbers(theirs) or ())]
        return ",".join(map(str, moved)) if isinstance(value, str) else moved
    if key in FIRST and type(value) is int:
        # Of the layers that were among the first, those that still are; `restacked_config` checks the others.
        after = (new for new, (theirs, origin) in enumerate(layers) if type(theirs) is int and origin.layer >= theirs)
        return next(after, len(layers))
    if key in LAST and type(value) is int and value >= 0:
        before = [new for new, (theirs, origin) in enumerate(layers) if type(theirs) is int and origin.layer <= theirs]
        return max(before, default=0)
    if not isinstance(value, (list, str)) or len(value) != depth or key in NOT_BY_LAYER:
        return value
    if key in LISTS:
        entries = [_of_layer(key, theirs, origin) for theirs, origin in layers]
        return "".join(entries) if isinstance(value, str) else entries
    stays = len(layers) == depth and all(theirs == value for theirs, _ in layers)
    stays = stays and all(origin.layer == new for new, (_, origin) in enumerate(layers))
    if isinstance(value, list) and (depth or 0) > 1 and not stays:
        raise RefusedError(
            f"config.json: {key} has as many entries as there are layers, and it is not known whether they are theirs",
            "if they are, add the key to moesurgery/families/layer_config.py",
        )
    return value


def _of_layer(key: str, values: Any, origin: LayerOrigin) -> Any:
    if not isinstance(values, (list, str)) or len(values) <= origin.layer:
        raise RefusedError(
            f"config.json has {key}, an entry for each layer, and that of another model in the stack has none for its"
            f" layer {origin.layer}",
            "write the list into that config.json",
        )
    return copy.deepcopy(values[origin.layer])


def without_prediction(settings: Settings) -> dict[str, Any]:
    """Return the config of a model without its layers for multi-token prediction."""
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if isinstance(part, MutableMapping):
            part.update({key: 0 for key in PREDICTION_KEYS if part.get(key)})
    return config


def _numbers(value: Any) -> set[int] | None:
    """Return a list of layer numbers, also written as text, as a set; None where it is none."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return {int(part) for part in parts} if parts and all(part.isdigit() for part in parts) else None
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return set(value)
    return None
