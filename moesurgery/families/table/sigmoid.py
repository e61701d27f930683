"""Families of other makers with sigmoid routers and a selection bias, each with names of its own."""

from __future__ import annotations

from moesurgery.families.family import (
    ExpertAxisTensor,
    Family,
    InputNorm,
    RouterRule,
    correction,
    fused_layout,
    per_expert_layout,
    router_tensor,
    stacked,
)
from moesurgery.families.table.common import (
    DEEPSEEK_LAYERS,
    GATE,
    GATE_AND_BIAS,
    SHARED_EXPERTS,
    W123,
    norm_topk,
    sigmoid,
)

SIGMOID: tuple[Family, ...] = (
    Family(
        "exaone_moe",
        ("exaone_moe",),
        layouts=(
            per_expert_layout(),
            fused_layout(moved=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),)),
        ),
        along=(*GATE, *correction("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias")),
        shared=SHARED_EXPERTS,
        routing=sigmoid(2.5),
        sparse=("mlp_layer_types", "first_k_dense_replace"),
    ),
    Family(
        "bailing_hybrid",
        ("bailing_hybrid",),
        layouts=(
            per_expert_layout(),
            fused_layout(moved=(("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),)),
        ),
        along=(*GATE, *correction("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias")),
        shared=SHARED_EXPERTS,
        routing=sigmoid(2.5),
        sparse=("mlp_layer_types", "first_k_dense_replace"),
        note="Ling-3",
    ),
    Family(
        "sarvam_moe",
        ("sarvam_moe",),
        layouts=(
            per_expert_layout(),
            fused_layout(moved=(("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),)),
        ),
        along=(*GATE, *correction("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias")),
        shared=SHARED_EXPERTS,
        routing=sigmoid(2.5),
        sparse=DEEPSEEK_LAYERS,
        note="transformers runs it as GLM-4-MoE, with other names of the attention",
    ),
    Family(
        "kimi_linear",
        ("kimi_linear",),
        layouts=(
            per_expert_layout("block_sparse_moe.experts.#", **W123),
            fused_layout(moved=(("block_sparse_moe.", "mlp."),)),
        ),
        along=(
            *router_tensor("block_sparse_moe.gate", "mlp.gate"),
            *correction("block_sparse_moe.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        ),
        shared=("block_sparse_moe.shared_experts", "mlp.shared_experts"),
        routing=sigmoid(2.446),
        top_k_key="num_experts_per_token",
        sparse=("mlp_layer_types", "first_k_dense_replace"),
    ),
    Family(
        "hy_v3",
        ("hy_v3",),
        layouts=(
            per_expert_layout(),
            fused_layout(
                moved=(
                    ("mlp.expert_bias", "mlp.e_score_correction_bias"),
                    ("mlp.router.gate.", "mlp.gate."),
                    ("mlp.shared_mlp.", "mlp.shared_experts."),
                )
            ),
        ),
        along=(
            *router_tensor("mlp.router.gate", "mlp.gate"),
            *correction("mlp.expert_bias", "mlp.e_score_correction_bias"),
        ),
        shared=("mlp.shared_mlp", "mlp.shared_experts"),
        routing=RouterRule(score="sigmoid", routed_scale_key="router_scaling_factor", routed_scale_default=2.826),
        sparse=("mlp_layer_types",),
    ),
    Family(
        "hy_v4",
        ("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
        refuses={"slim-experts": "transformers builds some of its FFNs from another number than the edited one"},
        layouts=(fused_layout(),),
        along=GATE_AND_BIAS,
        shared=SHARED_EXPERTS,
        routing=sigmoid(2.827),
        experts_key="n_routed_experts",
        sparse=("mlp_layer_types",),
    ),
    Family(
        "lfm2_moe",
        ("lfm2_moe",),
        layouts=(per_expert_layout("feed_forward.experts.#", **W123), fused_layout("feed_forward.experts")),
        along=(*router_tensor("feed_forward.gate"), *correction("feed_forward.expert_bias")),
        routing=sigmoid(1.0, groups=False),
        norm=InputNorm("ffn_norm.weight"),
        sparse=("num_dense_layers",),
    ),
    Family(
        "afmoe",
        ("afmoe",),
        layouts=(per_expert_layout(), fused_layout()),
        along=(*router_tensor("mlp.router.gate"), *correction("mlp.expert_bias", parameter=True)),
        shared=SHARED_EXPERTS,
        routing=RouterRule(score="sigmoid", routed_scale_key="route_scale", routed_scale_default=1.0, after="joint"),
        norm=InputNorm("pre_mlp_layernorm.weight"),
        sparse=("num_dense_layers",),
    ),
    Family(
        "beam",
        ("beam",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE_AND_BIAS,
        routing=RouterRule(score="sigmoid", renormalised=norm_topk(True), groups="top2", after="routed"),
        norm=InputNorm("pre_feedforward_layernorm.weight"),
        sparse=("mlp_layer_types",),
    ),
    Family(
        "nemotron_h",
        ("nemotron_h", "nemo_speechlm"),
        shared_width="moe_shared_expert_intermediate_size",
        layouts=(
            per_expert_layout("mixer.experts.#", gate=None),
            stacked(None, "mixer.experts.up_proj", "mixer.experts.down_proj"),
            stacked(None, "mixer.experts.gate_and_up_projs", "mixer.experts.down_projs", order="io"),
        ),
        along=(*router_tensor("mixer.gate"), *correction("mixer.gate.e_score_correction_bias")),
        shared=("mixer.shared_experts", "mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
        routing=sigmoid(1.0),
        experts_key="n_routed_experts",
        norm=InputNorm("norm.weight"),
        sparse=("layers_block_type", "hybrid_override_pattern"),
        note="experts have no gate, and may work in a latent space that all share",
    ),
    Family(
        "step3p5",
        ("step3p7", "step3p5"),
        shared_width="share_expert_dim",
        layouts=(
            stacked("moe.gate_proj", "moe.up_proj", "moe.down_proj"),
            fused_layout(
                moved=(
                    ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
                    ("moe.gate.", "mlp.gate."),
                    ("share_expert.", "mlp.shared_experts."),
                )
            ),
        ),
        along=(
            *router_tensor("moe.gate", "mlp.gate"),
            *correction("moe.router_bias", "mlp.gate.e_score_correction_bias"),
        ),
        shared=("share_expert", "mlp.shared_experts"),
        routing=RouterRule(
            score="sigmoid",
            renormalised=norm_topk(True),
            routed_scale_key="moe_router_scaling_factor",
            routed_scale_default=1.0,
        ),
        top_k_key="moe_top_k",
        experts_key="moe_num_experts",
        norm=InputNorm(kind="rms1"),
        sparse=("mlp_layer_types", "moe_layers_enum"),
    ),
    Family(
        "muse_spark",
        ("muse_spark", "muse_spark_text"),
        shared_width=None,
        layouts=(fused_layout(),),
        along=GATE_AND_BIAS,
        shared=("mlp.pre_expert_proj", "mlp.post_expert_proj"),
        routing=RouterRule(score="sigmoid", after="routed"),
        experts_key="num_local_experts",
        norm=InputNorm("pre_feedforward_layernorm.weight"),
        sparse=("mlp_layer_types",),
        note="every expert's output is normalised, and the sum again",
    ),
    Family(
        "inkling",
        ("inkling_mm_model", "inkling_text"),
        layouts=(
            fused_layout(gate_up="w13_weight", down="w2_weight", interleaved=True),
            fused_layout(
                moved=(("mlp.gate.bias", "mlp.gate.e_score_correction_bias"),),
            ),
        ),
        along=(
            ExpertAxisTensor("mlp.gate.weight", "router", extra=True),
            *correction("mlp.gate.bias", "mlp.gate.e_score_correction_bias"),
        ),
        shared=("mlp.shared_experts",),
        router_parts=("mlp.gate.global_scale",),
        routing=RouterRule(
            score="other",
            special="shared and chosen experts share one softmax, so another top-k changes the shared weights too",
        ),
        experts_key="n_routed_experts",
        norm=InputNorm("mlp_norm.weight", others=("post_attention_layernorm.weight",)),
        sparse=("mlp_layer_types", "dense_mlp_idx"),
        note="the last rows of the router are the shared experts; route_scale scales those too",
    ),
    Family(
        "inkling2",
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
        layouts=(
            fused_layout(gate_up="w13_weight", down="w2_weight", interleaved=True),
            fused_layout(moved=(("mlp.gate.bias", "mlp.gate.e_score_correction_bias"),)),
        ),
        along=(
            *router_tensor("mlp.gate", bias=False),
            *correction("mlp.gate.bias", "mlp.gate.e_score_correction_bias"),
        ),
        routing=RouterRule(score="sigmoid", routed_scale_key="route_scale", routed_scale_default=8.0),
        experts_key="n_routed_experts",
        norm=InputNorm("mlp_norm.weight", others=("post_attention_layernorm.weight",)),
        refuses={"tie-blocks": "its attention residuals go by blocks of layers, and the first layer has no query"},
    ),
)
