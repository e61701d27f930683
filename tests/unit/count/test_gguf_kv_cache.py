"""The KV cache of GGUF files: against what llama.cpp says that it allocates, and published sizes worked out by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from moesurgery.count.kv_cache import kv_bytes, kv_layers
from moesurgery.families.recognition import recognise


class Shaped(NamedTuple):
    shape: tuple[int, ...]
    dtype: str = "F32"
    nbytes: int = 0


def cache(architecture: str, layers: int, hidden: int, keys: dict[str, Any], rows: Any) -> Any:
    """Return `kv_layers` of a GGUF with `keys` and, in layer i, attention tensors with `rows(i)` of rows."""
    names = {"num_attention_heads", "num_key_value_heads", "head_dim", "num_nextn_predict_layers"}
    said = {f"{architecture}.{key}": value for key, value in keys.items() if key not in names}
    config = {"model_type": f"gguf-{architecture}", "num_hidden_layers": layers, "hidden_size": hidden, "gguf": said}
    config |= {key: value for key, value in keys.items() if key in names}
    blocks = layers + keys.get("num_nextn_predict_layers", 0)
    tensors = {f"blk.{i}.{n}.weight": Shaped((r, hidden)) for i in range(blocks) for n, r in rows(i).items()}
    return kv_layers(recognise(config, tensors), tensors)


def test_grouped_queries() -> None:
    """Qwen3-30B-A3B: 48 layers of 4 key-value heads of 128, 96 KiB per token."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "attention.value_length": 128}
    layers = cache("qwen3moe", 48, 2048, heads, lambda _: {"attn_q": 4096, "attn_k": 512, "attn_v": 512})
    assert kv_bytes(layers, 1) == 96 * 1024
    assert layers[0] == (1024, 32 * 256, None)
    fused = cache("qwen3moe", 48, 2048, heads, lambda _: {"attn_qkv": 5120})
    assert fused == layers


@pytest.mark.parametrize("predicting", [0, 1])
def test_latent_attention_keeps_one_row(predicting: int) -> None:
    """DeepSeek-V3.2: 61 layers of 576 values, and an indexer's key of 128; before llama.cpp's MLA all heads' keys."""
    heads = {"num_attention_heads": 128, "num_key_value_heads": 1, "head_dim": 576, "attention.value_length": 512}
    heads |= {"num_nextn_predict_layers": predicting} if predicting else {}
    rows = {"attn_q_b": 24576, "attn_kv_a_mqa": 576, "attn_k_b": 512, "attn_v_b": 128}
    assert kv_bytes(cache("deepseek2", 61, 7168, heads, lambda _: rows), 1) == 61 * 576 * 2
    heads["attention.indexer.key_length"] = 128
    indexed = cache("deepseek32", 61, 7168, heads, lambda _: {**rows, "indexer.attn_k": 128})
    assert kv_bytes(indexed, 1) == 61 * (576 + 128) * 2
    old = {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 192, "attention.value_length": 128}
    before = cache("deepseek2", 61, 7168, old, lambda _: {"attn_kv_a_mqa": 576, "attn_kv_b": 32768})
    assert kv_bytes(before, 1) == 61 * 128 * (192 + 128) * 2


def test_windows() -> None:
    """gpt-oss-20b: every other of 24 layers sees 128 positions, the first one among them."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "attention.value_length": 64}
    rows = {"attn_q": 4096, "attn_k": 512, "attn_v": 512}
    windowed = cache("gpt-oss", 24, 2880, {**heads, "attention.sliding_window": 128}, lambda _: rows)
    assert [window for *_, window in windowed[:3]] == [128, None, 128]
    assert kv_bytes(windowed, 4096) == 12 * 2048 * (4096 + 128)
    listed = {**heads, "attention.sliding_window": 128, "attention.sliding_window_pattern": [True, True, False]}
    assert [w for *_, w in cache("step35", 3, 2880, listed, lambda _: rows)] == [128, 128, None]
    assert [w for *_, w in cache("qwen3moe", 3, 2880, listed, lambda _: rows)] == [None] * 3  # it reads no window
    first = {**heads, "attention.sliding_window": 128}
    assert [w for *_, w in cache("cohere2moe", 5, 2880, first, lambda _: rows)] == [None, 128, 128, 128, None]
    chunked = cache("llama4", 4, 2880, heads, lambda _: rows)
    assert [w for *_, w in chunked] == [8192, 8192, 8192, None]


def test_layers_that_keep_a_state_keep_nothing_per_token() -> None:
    """Qwen3-Next-80B: 12 of 48 layers are attention, of 2 key-value heads of 256; hybrids say so with 0 heads."""

    def rows(layer: int) -> dict[str, int]:
        return {"attn_k": 512, "attn_v": 512} if layer % 4 == 3 else {"attn_qkv": 8192, "attn_gate": 4096}

    heads = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "attention.value_length": 256}
    assert kv_bytes(cache("qwen3next", 48, 2048, heads, rows), 1) == 12 * 1024 * 2
    listed = {**heads, "attention.recurrent_layers": [True, False], "full_attention_interval": 1}
    assert len(cache("qwen3next", 2, 2048, listed, lambda _: {"attn_k": 512, "attn_v": 512})) == 1
    hybrid = {**heads, "num_key_value_heads": [0, 2, 0, 4]}
    widths = cache("jamba", 4, 2048, hybrid, lambda i: {"attn_k": 256 * i, "attn_v": 256 * i})
    assert [width for width, *_ in widths] == [512, 1536]


def test_what_is_not_known_is_not_guessed() -> None:
    rows = {"attn_k": 512, "attn_v": 512}
    heads = {"num_attention_heads": 64, "head_dim": 64}
    assert cache("deepseek4", 2, 64, {**heads, "attention.compress_ratios": [4, 4]}, lambda _: rows) is None
    assert cache("qwen3moe", 2, 64, {}, lambda _: rows) is None
    shared = {**heads, "attention.shared_kv_layers": 3, "attention.sliding_window_pattern": [True] * 8}
    assert len(cache("gemma4", 8, 64, {**shared, "attention.sliding_window": 512}, lambda _: rows)) == 5
