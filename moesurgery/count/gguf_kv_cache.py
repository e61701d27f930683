"""What each attention layer of a GGUF keeps in llama.cpp's KV cache, from metadata and headers.

Facts of llama.cpp's `src/llama-kv-cache*.cpp` and `src/models/` (September 2026). Windows are counted as they are said,
without the batch that llama.cpp adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgery.checkpoint.gguf_files import METADATA, MODEL_TYPE
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, HasShape

# Every so many layers one sees all positions: the last of them, or the first. Where metadata have no pattern.
_FULL_EVERY = {
    **dict.fromkeys(("exaone-moe", "llama4", "afmoe", "mellum", "olmo2", "exaone4", "cohere2"), (4, False)),
    **dict.fromkeys(("cohere2moe", "laguna", "smallthinker"), (4, True)),
    **dict.fromkeys(("gpt-oss", "gemma2"), (2, False)),
    "gemma3": (6, False),
    "plamo3": (8, False),
}
_BY_LIST = ("mimo2", "gemma4", "step35", "dots3note", "maple")  # which have a pattern
_CHUNK = 8192  # of Llama 4, whatever its metadata say but for 0
# Every so many layers, the last of them, is attention; the others are linear and keep a state.
_ATTENTION_EVERY = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
_OTHER_CACHES = ("attention.compress_ratios", "num_loops")  # DeepSeek-V4's, and of layers that run more than once


def gguf_kv_layers(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> list[tuple[int, int, int | None]] | None:
    """Return, per attention layer, (cached values per token, heads * (d_qk + d_v), window or None).

    None where the cache is of another kind, or metadata do not say how large it is. Of latent attention the cache holds
    one row of `attn_kv_a_mqa`, of an indexer one key.
    """
    config, architecture = anatomy.settings.config, anatomy.model_type.removeprefix(MODEL_TYPE)
    entries = {key.removeprefix(f"{architecture}."): value for key, value in config[METADATA].items()}
    hidden, depth = anatomy.settings.hidden, anatomy.settings.layers
    heads = config.get("num_attention_heads")
    if not hidden or not depth or not heads or any(entries.get(key) not in (None, 1) for key in _OTHER_CACHES):
        return None
    kv_heads = config.get("num_key_value_heads", heads)
    rows: dict[int, dict[str, int]] = {}
    for name, info in tensors.items():
        layer = anatomy.layer.get(name)
        if layer is not None and anatomy.component[name] == parts.ATTENTION and name.endswith(".weight"):
            rows.setdefault(layer, {})[name.partition(f".{layer}.")[2].removesuffix(".weight")] = info.shape[0]
    layers = []
    for layer in range(depth - (_number(entries.get("attention.shared_kv_layers")) or 0)):
        stored, of_keys, of_queries = rows.get(layer, {}), _of(kv_heads, layer), _of(heads, layer)
        if of_keys == 0 or _keeps_a_state(architecture, entries, layer):
            continue
        if not of_queries or not of_keys:
            return None
        window = _window(architecture, entries, layer)
        local = "_swa" if window is not None else ""
        key = _number(entries.get(f"attention.key_length{local}")) or config.get("head_dim") or hidden // of_queries
        value = _number(entries.get(f"attention.value_length{local}", entries.get("attention.value_length")))
        value = value or hidden // of_queries
        if "attn_kv_a_mqa" in stored and "attn_k_b" in stored:
            width = stored["attn_kv_a_mqa"]
        elif "attn_k" in stored:
            width = stored["attn_k"] + stored.get("attn_v", stored["attn_k"])
        elif "attn_qkv" in stored or "attn_kv_b" in stored:
            width = of_keys * (key + value)
        else:
            continue
        if any(part.startswith("indexer.") for part in stored):
            width += _number(entries.get("attention.indexer.key_length")) or 0
        layers.append((width, of_queries * (key + value), window))
    return layers or None


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _of(value: Any, layer: int) -> int | None:
    """Return what a number, or a list with an entry for each layer, says of one."""
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return value if type(value) is int and value >= 0 else None


def _keeps_a_state(architecture: str, entries: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer is recurrent, and so keeps nothing per position."""
    stated = entries.get("attention.recurrent_layers")
    if isinstance(stated, list):
        return layer < len(stated) and bool(stated[layer])
    if architecture not in _ATTENTION_EVERY:
        return False
    return (layer + 1) % (_number(entries.get("full_attention_interval")) or _ATTENTION_EVERY[architecture]) != 0


def _window(architecture: str, entries: Mapping[str, Any], layer: int) -> int | None:
    """Return the positions that a layer sees; None where it sees all, as in architectures that read no window."""
    window = _number(entries.get("attention.sliding_window"))
    pattern = entries.get("attention.sliding_window_pattern")
    if architecture not in _FULL_EVERY and architecture not in _BY_LIST:
        return None
    if architecture == "llama4" and entries.get("attention.sliding_window") != 0:
        window = _CHUNK
    if isinstance(pattern, list):
        return window if layer < len(pattern) and pattern[layer] else None
    if architecture not in _FULL_EVERY:
        return None
    every, first = _FULL_EVERY[architecture]
    every = _number(pattern) or every
    return window if layer % every != (0 if first else every - 1) else None
