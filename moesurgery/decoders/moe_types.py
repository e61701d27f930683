"""The mixtures of experts that a dense type becomes: one entry per `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesurgery.decoders.architecture import Architecture, Moe, SharedExpertNames
from moesurgery.decoders.layer_types import LayerTypes, MixedLayers, OneWindow, RopeFlags
from moesurgery.decoders.rope import Rope
from moesurgery.decoders.shared_traits import (
    COHERE2,
    COHERE_MODULES,
    CONVOLUTION_MODULES,
    DELTA_MODULES,
    GATED_DELTA,
    GRANITE,
    HEAD_DIM_128,
    HUNYUAN_MODULES,
    LATENT,
    LATENT_MODULES,
    LATENT_QUERIES,
    LLAMA_MODULES,
    NORMS,
    OLMO_MODULES,
    PER_HEAD,
    QK_NORMS,
    QKV_BIAS,
    QKVO,
    QKVO_BIAS,
    SHORT_CONVOLUTION,
    SINKS,
    WHOLE_NORMS,
    biases,
    context,
    kv_heads,
    mixture,
    qwen_windows,
    rounded_eps,
    tie,
    tokens,
    wide,
)
from moesurgery.decoders.traits import Always, TraitChoice, TraitKey

_SHARED_EXPERTS = SharedExpertNames("mlp.shared_experts", count="n_shared_experts")
GATED_EXPERT = SharedExpertNames(
    "mlp.shared_expert", gate="mlp.shared_expert_gate", width="shared_expert_intermediate_size"
)
_GRANITE_SHARED = SharedExpertNames("shared_mlp", width="shared_intermediate_size", optional=True, fused=True)
SPARSE = {"mlp_layer_types": "sparse"}


def deepseek(per_layer: Mapping[str, Any] | None = None, **settings: Any) -> Moe:
    """Return the MoE block of DeepSeek's names, with the config settings that a mixture made here gets."""
    shared = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, **settings}
    return Moe("moe_intermediate_size", _SHARED_EXPERTS, shared, per_layer or {})


QWEN_MOE = Moe("moe_intermediate_size", settings={"decoder_sparse_step": 1, "mlp_only_layers": []})

MOE_TYPES: tuple[Architecture, ...] = (
    mixture(
        "mixtral",
        "MixtralForCausalLM",
        {
            "layers": OneWindow(None),
            "rope": Rope(1e6),
            "num_key_value_heads": kv_heads(8),
        },
        rounded_eps(1e-5),
        context(131072),
        moe=Moe("intermediate_size"),
    ),
    mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        qwen_windows(
            lambda c, i: (i + 1) % 2 != 0 and i < c.get("max_window_layers", 28),
        ),
        biases(TraitKey("qkv_bias", True)),
        {"num_key_value_heads": kv_heads(16)},
        context(32768),
        tokens(bos=None, eos=None),
        moe=replace(QWEN_MOE, shared=GATED_EXPERT),
    ),
    mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        QKVO_BIAS,
        PER_HEAD,
        {
            "layers": OneWindow(4096, "use_sliding_window"),
            "num_key_value_heads": kv_heads(4),
        },
        context(32768),
        tokens(bos=None, eos=None),
        modules=(*LLAMA_MODULES, *QK_NORMS),
        moe=QWEN_MOE,
    ),
    mixture(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        GATED_DELTA,
        {"num_key_value_heads": kv_heads(2)},
        modules=NORMS,
        some=(*DELTA_MODULES, *QKVO, *QK_NORMS),
        moe=Moe("moe_intermediate_size", GATED_EXPERT),
    ),
    mixture(
        "solar_open",
        "SolarOpenForCausalLM",
        QKV_BIAS,
        wide(HEAD_DIM_128),
        {"rope": Rope(1e6), "num_key_value_heads": kv_heads(8)},
        rounded_eps(1e-5),
        tokens(bos=None, eos=None),
        context(131072),
        moe=deepseek(),
    ),
    mixture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        QKV_BIAS,
        {
            "rope": Rope(fraction=0.5),
            "qk_norm": TraitChoice("use_qk_norm", {True: "per head", False: None}, False),
            "num_key_value_heads": kv_heads(8),
        },
        rounded_eps(1e-5),
        tokens(bos=None, eos=None),
        context(131072),
        some=QK_NORMS,
        moe=deepseek(first_k_dense_replace=0, num_nextn_predict_layers=0),
    ),
    mixture(
        "dots1",
        "Dots1ForCausalLM",
        QKVO_BIAS,
        PER_HEAD,
        {"num_key_value_heads": kv_heads(32)},
        {"layers": LayerTypes(4096, lambda c, i: i >= c.get("max_window_layers", 62), extra=("max_window_layers",))},
        tokens(bos=None, eos=None),
        modules=(*LLAMA_MODULES, *QK_NORMS),
        moe=deepseek(first_k_dense_replace=0),
    ),
    mixture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        GRANITE,
        QKVO_BIAS,
        moe=Moe("intermediate_size"),
    ),
    mixture(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        GRANITE,
        QKVO_BIAS,
        moe=Moe("intermediate_size", _GRANITE_SHARED),
    ),
    mixture(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        GRANITE,
        QKVO_BIAS,
        {
            "layers": MixedLayers(
                lambda c, i: "mamba", attention="attention", rope_if=("position_embedding_type", "rope")
            )
        },
        moe=Moe(
            "intermediate_size",
            replace(_GRANITE_SHARED, optional=False),
            settings={"mamba_n_heads": 1, "mamba_d_head": "auto"},  # no layer has them, but they must fit the width
        ),
    ),
    mixture(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        GRANITE,
        QKVO_BIAS,
        SINKS,
        modules=(*LLAMA_MODULES, "self_attn.sinks"),
        moe=Moe("intermediate_size", _GRANITE_SHARED),
    ),
    mixture(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        WHOLE_NORMS,
        {"rope": Rope(500000.0)},
        context(4096),
        tokens(pad=100277, bos=None, eos=100257),
        modules=OLMO_MODULES,
        moe=Moe("intermediate_size"),
    ),
    mixture(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        biases(TraitKey("use_bias", False), TraitKey("use_bias", False)),
        {
            "rope": Rope(500000.0),
            "rope_pairs": Always("neighbours"),
            "head_bias": TraitKey("use_bias", False),
            "dropout": Always(0.0),
            "num_key_value_heads": kv_heads(4),
        },
        rounded_eps(1e-5),
        tokens(pad=0),
        context(131072),
        tie(True),
        moe=Moe(
            "moe_intermediate_size",
            SharedExpertNames("mlp.shared_experts", count="moe_num_shared_experts", optional=True),
            settings={
                "moe_layer_start_index": 0,
                "moe_layer_end_index": -1,
                "moe_layer_interval": 1,
                "moe_norm_min": 1e-12,
            },
        ),
    ),
    mixture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        QKVO_BIAS,
        {"qk_norm": Always("per head, after RoPE")},
        rounded_eps(1e-5),
        tokens(pad=0),
        modules=HUNYUAN_MODULES,
        moe=Moe("intermediate_size", SharedExpertNames("mlp.shared_mlp")),
    ),
    mixture(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        COHERE2,
        wide(HEAD_DIM_128),
        modules=COHERE_MODULES,
        moe=Moe(
            "intermediate_size",
            SharedExpertNames(
                "mlp.shared_experts",
                count="num_shared_experts",
                optional=True,
                settings={"shared_expert_combination_strategy": "sum"},
            ),
            settings={"expert_selection_fn": "softmax", "rms_norm_eps": None},
            per_layer=SPARSE,
        ),
    ),
    mixture(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        SHORT_CONVOLUTION,
        {"layers": MixedLayers(lambda c, i: "full_attention")},
        modules=("operator_norm", "ffn_norm"),
        some=CONVOLUTION_MODULES,
        moe=Moe(
            "moe_intermediate_size",
            settings={"num_dense_layers": 0, "routed_scaling_factor": 1.0, "use_expert_bias": True},
        ),
    ),
    mixture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LATENT,
        {"num_key_value_heads": kv_heads(128)},
        context(4096),
        tokens(bos=0, eos=1),
        modules=LATENT_MODULES,
        some=LATENT_QUERIES,
        own=("head_dim", "qk_head_dim"),
        moe=deepseek(first_k_dense_replace=0, num_nextn_predict_layers=0),
    ),
    mixture(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        LATENT,
        {
            "num_key_value_heads": kv_heads(20),
            "qk_nope_head_dim": TraitKey("qk_nope_head_dim", 192),
            "v_head_dim": TraitKey("v_head_dim", 256),
            "q_lora_rank": TraitKey("q_lora_rank", 768, null=True),
        },
        rounded_eps(1e-5),
        context(202752),
        tokens(bos=0, eos=1),
        modules=LATENT_MODULES,
        some=LATENT_QUERIES,
        own=("head_dim", "qk_head_dim"),
        moe=deepseek(SPARSE),
    ),
    mixture(
        "llama4_text",
        "Llama4ForCausalLM",
        QKVO_BIAS,
        wide(HEAD_DIM_128),
        {
            "layers": RopeFlags(chunked=True),
            "rope": Rope(500000.0),
            "rope_pairs": Always("neighbours"),
            "qk_norm": TraitChoice("use_qk_norm", {True: "L2", False: None}, True),
            "query_scaling": TraitChoice("attn_temperature_tuning", {True: "by position", False: 0.0}, True),
            "num_key_value_heads": kv_heads(8),
        },
        rounded_eps(1e-5),
        context(131072),
        moe=Moe(
            "intermediate_size",
            SharedExpertNames("feed_forward.shared_expert"),
            settings={"interleave_moe_layer_step": 1, "moe_layers": None},
            input_gates=True,
        ),
    ),
)
