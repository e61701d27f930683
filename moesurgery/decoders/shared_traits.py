"""Traits and modules that several architectures share.

Sets of traits are joined in `dense` and `mixture`, later ones over earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moesurgery.decoders.architecture import MLP, Architecture, Ffn, Moe
from moesurgery.decoders.layer_types import AllFull, LayerTypes, MixedLayers
from moesurgery.decoders.rope import Rope
from moesurgery.decoders.traits import Always, Codec, Derived, TraitChoice, TraitKey, even_head_dim, heads
from moesurgery.families.rope_keys import Config

# Traits


def scale_of(head_dim: Codec) -> Derived:
    """Attention scores are divided by the root of the width of a head."""
    return Derived(lambda config: head_dim.read(config) ** -0.5)


def kv_heads(default: int | Callable[[Config], int]) -> TraitKey:
    """As many key and value heads as there are heads, where the config says null."""
    return TraitKey("num_key_value_heads", default, if_null=heads)


HEAD_DIM = TraitKey("head_dim", even_head_dim)
HEAD_DIM_128 = TraitKey("head_dim", 128)


def wide(head_dim: Codec) -> dict[str, Codec]:
    """Return the width of a head, and the scale of attention scores that follows from it."""
    return {"head_dim": head_dim, "attention_multiplier": scale_of(head_dim)}


def rounded_eps(default: float, key: str = "rms_norm_eps") -> dict[str, Codec]:
    """Return the epsilon of norms, with its default and its key."""
    return {"norm_eps": TraitKey(key, default)}


def tokens(pad: int | None = None, bos: int | None = 1, eos: Any = 2) -> dict[str, Codec]:
    """Return the ids of special tokens; None is null."""
    return {
        name: TraitKey(f"{name}_token_id", default, null=True)
        for name, default in (("pad", pad), ("bos", bos), ("eos", eos))
    }


def biases(qkv: Codec, o: Codec | None = None, mlp: Codec | None = None) -> dict[str, Codec]:
    """Return which projections have a bias; none where nothing is said."""
    return {"qkv_bias": qkv, "o_bias": o or Always(False), "mlp_bias": mlp or Always(False)}


ATTENTION_BIAS = TraitKey("attention_bias", False)
MLP_BIAS = TraitKey("mlp_bias", False)
QKV_BIAS = biases(ATTENTION_BIAS)
QKVO_BIAS = biases(ATTENTION_BIAS, ATTENTION_BIAS)
ALL_BIASES = biases(ATTENTION_BIAS, ATTENTION_BIAS, MLP_BIAS)


def context(longest: int) -> dict[str, Codec]:
    """Return the longest context, in tokens."""
    return {"max_position_embeddings": TraitKey("max_position_embeddings", longest)}


def tie(default: bool, *aliases: str) -> dict[str, Codec]:
    """Return whether head and embedding are one, by default and under which other keys."""
    return {"tied": TraitKey("tie_word_embeddings", default, aliases=aliases)}


# What a Llama without options does; every entry says how it differs.
PLAIN: dict[str, Codec] = {
    "attention": Always("grouped heads"),
    "num_key_value_heads": kv_heads(heads),
    "hidden_act": TraitKey("hidden_act", "silu"),
    "initializer_range": TraitKey("initializer_range", 0.02),
    "dropout": TraitKey("attention_dropout", 0.0),
    "head_bias": Always(False),
    "qk_norm": Always(None),
    "qkv": Always("apart"),
    "mixers": Always(None),
    "sinks": Always(False),
    "output_gate": Always(False),
    "rope_pairs": Always("halves"),
    "rope": Rope(),
    "query_scaling": Always(0.0),
    "layers": AllFull(),
    "embedding_multiplier": Always(1.0),
    "residual_multiplier": Always(1.0),
    "logit_divisor": Always(1.0),
    "logit_multiplier": Always(1.0),
    "norm": Always("RMS"),
    "block": Always("before attention and FFN"),
    "causal": Always(True),
    **wide(HEAD_DIM),
    **rounded_eps(1e-6),
    **tokens(),
    **biases(Always(False)),
    **context(2048),
    **tie(False),
}
GRANITE: dict[str, Codec] = {
    "attention_multiplier": TraitKey("attention_multiplier", 1.0),
    "embedding_multiplier": TraitKey("embedding_multiplier", 1.0),
    "residual_multiplier": TraitKey("residual_multiplier", 1.0),
    "logit_divisor": TraitKey("logits_scaling", 1.0),
}
COHERE: dict[str, Codec] = {
    "norm": Always("LayerNorm"),
    "block": Always("one before attention and FFN in parallel"),
    "logit_multiplier": TraitKey("logit_scale", 0.0625),
    "rope_pairs": Always("neighbours"),
    **QKVO_BIAS,
    **rounded_eps(1e-5, "layer_norm_eps"),
    **tokens(pad=0, bos=5, eos=255001),
    **context(8192),
    **tie(True),
}
COHERE2: dict[str, Codec] = {
    **COHERE,
    "layers": LayerTypes(
        4096,
        lambda c, i: (i + 1) % (c.get("sliding_window_pattern") or 4) != 0,
        rope_when_sliding=True,
        extra=("sliding_window_pattern",),
    ),
}
LATENT: dict[str, Codec] = {
    "attention": Always("latent (MLA)"),
    "head_dim": TraitKey("qk_rope_head_dim", 64),
    "attention_multiplier": Always("by the width of latent heads"),
    "qk_nope_head_dim": TraitKey("qk_nope_head_dim", 128),
    "v_head_dim": TraitKey("v_head_dim", 128),
    "kv_lora_rank": TraitKey("kv_lora_rank", 512),
    "q_lora_rank": TraitKey("q_lora_rank", 1536, null=True),
    "rope_pairs": TraitChoice("rope_interleave", {True: "neighbours", False: "halves"}, True),
    "o_bias": ATTENTION_BIAS,
    "qkv_bias": ATTENTION_BIAS,
}
GATED_DELTA: dict[str, Codec] = {
    "mixers": Always("gated delta rule"),
    "output_gate": Always(True),
    "linear_conv_kernel_dim": TraitKey("linear_conv_kernel_dim", 4),
    "linear_key_head_dim": TraitKey("linear_key_head_dim", 128),
    "linear_value_head_dim": TraitKey("linear_value_head_dim", 128),
    "linear_num_key_heads": TraitKey("linear_num_key_heads", 16),
    "linear_num_value_heads": TraitKey("linear_num_value_heads", 32),
    "qk_norm": Always("per head"),
    "norm": Always("RMS with 1 + weight"),
    "rope": Rope(fraction=0.25),
    "layers": MixedLayers(
        lambda c, i: "linear_attention" if (i + 1) % (c.get("full_attention_interval") or 4) else "full_attention",
        extra=("full_attention_interval",),
    ),
    **QKVO_BIAS,
    **wide(TraitKey("head_dim", 256)),
    **context(32768),
    **tokens(bos=None, eos=None),
}
SHORT_CONVOLUTION: dict[str, Codec] = {
    "mixers": Always("short convolution"),
    "conv_bias": TraitKey("conv_bias", False),
    "conv_L_cache": TraitKey("conv_L_cache", 3),
    "hidden_act": Always("silu"),
    "qk_norm": Always("per head"),
    "rope": Rope(1e6),
    "dropout": Always(0.0),
    **rounded_eps(1e-5, "norm_eps"),
    **tie(True, "tie_embedding"),
    **tokens(pad=0),
    **context(128_000),
    "num_key_value_heads": kv_heads(8),
}
SINKS: dict[str, Codec] = {
    "sinks": Always(True),
    "layer_rope_theta": TraitKey("layer_rope_theta", None, null=True),
    "layers": LayerTypes(128, lambda c, i: i % 4 != 0),
}
PER_HEAD: dict[str, Codec] = {"qk_norm": Always("per head")}
WHOLE_NORMS: dict[str, Codec] = {
    "qk_norm": Always("over all heads"),
    "block": Always("after attention and FFN"),
    **QKVO_BIAS,
}


def qwen_windows(slides: Callable[[Config, int], bool]) -> dict[str, Codec]:
    """Return the layers of which those have a window for which `slides(config, layer)` is true."""
    return {"layers": LayerTypes(4096, slides, "use_sliding_window", extra=("max_window_layers",))}


UPPER_LAYERS = qwen_windows(lambda c, i: i >= c.get("max_window_layers", 28))
QWEN_TRAITS: dict[str, Codec] = {
    **UPPER_LAYERS,
    **context(32768),
    **tokens(bos=None, eos=None),
    "num_key_value_heads": kv_heads(32),
}

# Modules

QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA_MODULES = (*QKVO, *NORMS)
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
OLMO_MODULES = (*QKVO, *QK_NORMS, "post_attention_layernorm", "post_feedforward_layernorm")
HUNYUAN_MODULES = (*LLAMA_MODULES, "self_attn.query_layernorm", "self_attn.key_layernorm")
COHERE_MODULES = (*QKVO, "input_layernorm")
FUSED_MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", *NORMS)
LATENT_MODULES = (
    *NORMS,
    *("self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj", "self_attn.o_proj"),
)
LATENT_QUERIES = ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj")
DELTA_MODULES = (
    *("linear_attn.conv1d", "linear_attn.norm", "linear_attn.out_proj", "linear_attn.A_log", "linear_attn.dt_bias"),
    *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b")),
)
CONVOLUTION_MODULES = (
    *("conv.conv", "conv.in_proj", "conv.out_proj"),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj", "q_layernorm", "k_layernorm")),
)


def dense(
    model_type: str,
    causal_lm: str,
    *traits: Mapping[str, Codec],
    modules: tuple[str, ...] = LLAMA_MODULES,
    ffn: Ffn = MLP,
    some: tuple[str, ...] = (),
    own: tuple[str, ...] = (),
) -> Architecture:
    """Return a dense type: a plain Llama but for `traits`."""
    return Architecture(model_type, causal_lm, _joined(traits), modules, ffn=ffn, some=some, own=own)


def mixture(
    model_type: str,
    causal_lm: str,
    *traits: Mapping[str, Codec],
    moe: Moe,
    modules: tuple[str, ...] = LLAMA_MODULES,
    some: tuple[str, ...] = (),
    own: tuple[str, ...] = (),
) -> Architecture:
    """Return a type with a MoE block: a plain Llama but for `traits`."""
    return Architecture(model_type, causal_lm, _joined(traits), modules, moe=moe, some=some, own=own)


def _joined(traits: tuple[Mapping[str, Codec], ...]) -> dict[str, Codec]:
    codecs = dict(PLAIN)
    for part in traits:
        codecs.update(part)
    return codecs
