"""The config of a model whose layers were stacked anew: their number, and everything that config.json says by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesurgery.errors import RefusedError
from moesurgery.families.family import LAYERS_KEYS
from moesurgery.families.settings import Settings, section, with_value

# Lists of layer numbers.
_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "no_rope_layer_indices", "moe_layer_indices")
# Rules by layer number, with the values under which they say the same of every layer.
_RULES: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "interleave_moe_layer_step": (1,),
    "expert_layer_period": (1,),
    "attn_layer_period": (1,),
    "sliding_window_pattern": (1,),
    "full_attention_interval": (1,),
    "no_rope_layer_interval": (0, 1),
    "cross_attention_layers": ([],),
    "max_window_layers": (),
}
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


class Origin(NamedTuple):
    """Where a layer of a stack comes from: the settings of a model, and the layer's number in it."""

    settings: Settings
    layer: int


def restacked(settings: Settings, origins: Sequence[Origin], moe: Sequence[bool]) -> dict[str, Any]:
    """Return the config of a model with these settings for a stack of layers.

    `moe` says which of the new layers hold experts. Raises RefusedError where a config.json gives a rule by layer
    number that the new order breaks, or one model has a list by layer and another has none.
    """
    config = with_value(settings, LAYERS_KEYS, len(origins), "num_hidden_layers")
    own = all(origin.settings.config is settings.config for origin in origins)
    if own and [origin.layer for origin in origins] == list(range(settings.layers or 0)):
        return config
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if isinstance(part, dict):
            theirs = [section(origin.settings.config, path) for origin in origins]
            _restack(part, [t if isinstance(t, Mapping) else {} for t in theirs], origins, list(moe), settings.layers)
    return config


def _restack(
    part: dict[str, Any],
    theirs: Sequence[Mapping[str, Any]],
    origins: Sequence[Origin],
    moe: list[bool],
    old: int | None,
) -> None:
    """Change a section of config.json for a stack; `theirs` are the same section of each layer's own model."""
    for key, value in list(part.items()):
        if key in _NUMBERS and isinstance(value, list):
            lists = [their.get(key) or [] for their in theirs]
            part[key] = [i for i, origin in enumerate(origins) if origin.layer in lists[i]]
        elif isinstance(value, list) and len(value) == old and key not in LAYERS_KEYS and "id" not in key.split("_"):
            part[key] = [
                copy.deepcopy(_of_layer(key, their.get(key), origin))
                for their, origin in zip(theirs, origins, strict=True)
            ]
        elif key in _LEADING and isinstance(value, int):
            first = moe.index(True) if True in moe else len(moe)
            if not all(moe[first:]):
                raise RefusedError(
                    f"config.json has {key}, so dense layers must come before all others, but layer"
                    f" {first + moe[first:].index(False)} of the stack is dense",
                    "take dense layers only at the beginning",
                )
            part[key] = first
        elif key in _RULES and value is not None and value not in _RULES[key]:
            if any(their.get(key) != value for their in theirs):
                raise RefusedError(f"config.json has {key}: {value}, and that of another model in the stack has not")
            _check_rule(part, key, value, [origin.layer for origin in origins])


def _of_layer(key: str, values: Any, origin: Origin) -> Any:
    if not isinstance(values, list) or len(values) <= origin.layer:
        raise RefusedError(
            f"config.json has {key}, an entry for each layer, and that of another model in the stack has none for its"
            f" layer {origin.layer}",
            "write the list into that config.json",
        )
    return values[origin.layer]


def _check_rule(part: Mapping[str, Any], key: str, value: Any, origins: list[int]) -> None:
    """Refuse where layers would change their kind under a rule such as `every value-th layer`."""
    if part.get("layer_types") is not None and key in ("sliding_window_pattern", "max_window_layers"):
        return  # the list says what the rule would
    kept = (
        all((i < value) == (origin < value) for i, origin in enumerate(origins))
        if key == "max_window_layers"
        else type(value) is int and all(i % value == origin % value for i, origin in enumerate(origins))
    )
    if not kept and not (key == "max_window_layers" and not part.get("use_sliding_window")):
        raise RefusedError(
            f"config.json has {key}: {value}, so layers differ by number; stacked so, they would change their kind",
            f"stack layers so that each keeps its place modulo {value}" if type(value) is int else None,
        )
