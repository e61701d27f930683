"""The dense family that each MoE family becomes when every block has one FFN: data, and nothing else.

A pair holds what differs: names, the config keys that only the MoE family has, and the defaults of the MoE family's
config that are not those of the dense one (a key that config.json leaves out has to be written then). The pairs
were found exact with transformers 5.23: a MoE of equal experts and its dense model have the same logits
(tests/commands/test_to_dense.py, which also checks the keys and defaults against transformers' config classes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesurgery.families.config_keys import (
    EXPERTS_KEYS,
    GROUPS_KEYS,
    PREDICTION_KEYS,
    TOP_GROUPS_KEYS,
    TOP_K_KEYS,
)

Projections = Mapping[str, str]  # role -> path of a linear, relative to the layer

LINEAR = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}

# Keys of config.json that no dense family has.
MOE_KEYS = frozenset(
    (
        *(*EXPERTS_KEYS, *TOP_K_KEYS, *GROUPS_KEYS, *TOP_GROUPS_KEYS, *PREDICTION_KEYS),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("n_shared_experts", "num_shared_experts", "num_dense_layers", "first_k_dense_replace"),
        *("mlp_only_layers", "decoder_sparse_step", "moe_layer_freq", "mlp_layer_types"),
        *("norm_topk_prob", "routed_scaling_factor", "topk_method", "scoring_func"),
        *("use_expert_bias", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *("aux_loss_alpha", "seq_aux", "ep_size"),
    )
)


@dataclass(frozen=True)
class DensePair:
    """One way from a MoE family to a dense one.

    `ffn` and `shared` are the paths of the dense FFN and of the MoE family's shared expert (a `gate_up` holds gate
    rows, then up rows). `needs`: config values without which the dense family computes something else (an absent
    key counts as None). `writes`: keys that the dense family needs.
    """

    source: str
    target: str
    architecture: str
    ffn: Projections = field(default_factory=lambda: LINEAR)
    shared: Projections = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    writes: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


NO_WINDOW = (None, False, 0)
QWEN2_SHARED = {role: path.replace("mlp.", "mlp.shared_expert.") for role, path in LINEAR.items()}
QWEN2_DEFAULTS = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
_GRANITE_SHARED = {"gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"}

# Where one MoE family has several dense ones, the first that fits is taken.
DENSE_NAMES: tuple[DensePair, ...] = (
    DensePair(
        "mixtral",
        "mistral",
        "MistralForCausalLM",
        defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    DensePair(
        "mixtral",
        "llama",
        "LlamaForCausalLM",
        needs={"sliding_window": NO_WINDOW},
        drops=("sliding_window",),
        defaults={
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    DensePair(
        "qwen2_moe",
        "qwen2",
        "Qwen2ForCausalLM",
        shared=QWEN2_SHARED,
        needs={"qkv_bias": (None, True)},
        drops=("qkv_bias",),
        defaults=QWEN2_DEFAULTS,
    ),
    DensePair(
        "qwen2_moe",
        "llama",
        "LlamaForCausalLM",
        shared=QWEN2_SHARED,
        needs={"qkv_bias": (False,), "use_sliding_window": NO_WINDOW},
        drops=("qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        defaults={
            **QWEN2_DEFAULTS,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    DensePair(
        "qwen3_moe",
        "qwen3",
        "Qwen3ForCausalLM",
        # One window for all layers here, one per layer there.
        needs={"use_sliding_window": NO_WINDOW},
        defaults={"hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4},
    ),
    DensePair("granitemoe", "granite", "GraniteForCausalLM"),
    DensePair("granitemoeshared", "granite", "GraniteForCausalLM", shared=_GRANITE_SHARED),
    DensePair(
        "deepseek_v3",
        "youtu",
        "YoutuForCausalLM",
        shared={role: path.replace("mlp.", "mlp.shared_experts.") for role, path in LINEAR.items()},
        drops=("pretraining_tp",),
        defaults={
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
        },
    ),
    DensePair(
        "lfm2_moe",
        "lfm2",
        "Lfm2ForCausalLM",
        ffn={"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
        drops=("block_ff_dim",),
        writes={"block_auto_adjust_ff_dim": False},
        defaults={"hidden_size": 2048},
    ),
)


def pairs_of(model_type: str) -> tuple[DensePair, ...]:
    """Return the ways from the MoE family of `model_type`, the preferred one first."""
    return tuple(pair for pair in DENSE_NAMES if pair.source == model_type)
