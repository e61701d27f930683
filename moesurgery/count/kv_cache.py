"""What each attention layer keeps in the KV cache, and what it computes per position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moesurgery.checkpoint.gguf_files import MODEL_TYPE
from moesurgery.count.gguf_kv_cache import gguf_kv_layers
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, HasShape

KV_BYTES_PER_VALUE = 2


def kv_bytes(layers: Sequence[tuple[int, int, int | None]], context: int) -> int:
    """Return the bytes of cache that one sequence of `context` tokens takes, of what `kv_layers` returns."""
    return sum(width * KV_BYTES_PER_VALUE * min(context, window or context) for width, _, window in layers)


def kv_layers(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> list[tuple[int, int, int | None]] | None:
    """Return, per attention layer, (cached values per token, heads * (d_qk + d_v), window or None).

    Widths come from the key and value projections that are stored; None where they cannot be told.
    """
    if anatomy.model_type.startswith(MODEL_TYPE):
        return gguf_kv_layers(anatomy, tensors)
    first = anatomy.settings.first

    def size(*keys: str) -> int | None:
        value = first(keys)
        return value if type(value) is int and value > 0 else None

    heads = size("num_attention_heads", "n_heads", "n_head")
    stated = first(("head_dim", "attention_head_dim"))
    head_dim = stated if stated is not None else (anatomy.settings.hidden or 0) // (heads or 1)
    if heads is None or type(head_dim) is not int:
        return None
    latent, rope = size("kv_lora_rank"), size("qk_rope_head_dim")
    types, window = first(("layer_types",)), first(("sliding_window",))
    if first(("use_sliding_window",)) is False or not isinstance(window, int):
        window = None
    keys: dict[int, int] = {}
    values: dict[int, int] = {}
    latents: set[int] = set()
    fused: set[int] = set()
    for name in tensors:
        layer, component = anatomy.layer.get(name), anatomy.component[name]
        if layer is None or component != parts.ATTENTION or not name.endswith(".weight"):
            continue
        module = name.split(".")[-2]
        if module in ("k_proj", "wk"):
            keys[layer] = tensors[name].shape[0]
        elif module in ("v_proj", "wv"):
            values[layer] = tensors[name].shape[0]
        elif module in ("kv_a_proj_with_mqa", "kv_a_proj"):
            latents.add(layer)
        elif module in ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "kv_proj"):
            fused.add(layer)
    kv_heads = size("num_key_value_heads", "n_kv_heads", "kv_n_heads") or heads
    layers = []
    known = keys.keys() | latents | fused
    # Every position has keys and values of its own, whatever block it runs.
    positions = anatomy.settings.tie_map or range(max(known, default=-1) + 1)
    for position, layer in enumerate(positions):
        if layer not in known:
            continue
        sliding = isinstance(types, list) and position < len(types) and types[position] == "sliding_attention"
        limit = window if sliding or (window and not isinstance(types, list)) else None
        if layer in latents and latent and rope:
            d_qk, d_v = (size("qk_nope_head_dim") or 0) + rope, size("v_head_dim") or 0
            layers.append((latent + rope, heads * (d_qk + d_v), limit))
        elif layer in keys:
            layers.append((keys[layer] + values.get(layer, keys[layer]), heads * 2 * head_dim, limit))
        else:
            layers.append((2 * kv_heads * head_dim, heads * 2 * head_dim, limit))
    return layers or None
