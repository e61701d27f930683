"""Tiny dense models for upcycling: every type that some mixture matches, with what could get lost switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import build

WINDOW = 8
ORIGINAL = 16  # the context before RoPE scaling
LONG_PROMPT = torch.randint(3, 60, (2, 48), generator=torch.Generator().manual_seed(5))

COMMON = {"intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
NARROW = {"head_dim": 8}
WIDE = {"head_dim": 16}  # 4 heads of 16 in a hidden size of 32


def rope(kind: str, theta: float = 10000.0, **rules: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rules}}


DEFAULT_ROPE = rope("default")
LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, mscale=1.0, mscale_all_dim=1.0)
LONGROPE = {
    **rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.0, 2.0, 3.0, 4.0],
        original_max_position_embeddings=ORIGINAL,
    ),
    "original_max_position_embeddings": ORIGINAL,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
SECOND_SLIDES = {**SLIDING, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
BIAS = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
SINKS = {**MULTIPLIERS, "sliding_window": WINDOW, "layer_types": SECOND_SLIDES["layer_types"]}
DELTA = {
    **NARROW,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.02,
}
CONVOLUTION = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": True,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
}


def save_dense(path: Path, model_type: str, **changes: Any) -> torch.nn.Module:
    """Save a tiny dense model in shards so small that the parts of one FFN stand in different ones; return it."""
    model = build(model_type, **{**COMMON, **changes})
    model.save_pretrained(path, max_shard_size="20KB")
    return model
