"""Mixtral and the families built like it: softmax routers, experts as wide as a dense FFN."""

from __future__ import annotations

from moesurgery.families.family import (
    ExpertSet,
    Family,
    Flag,
    InputNorm,
    Layout,
    Projection,
    RouterRule,
    correction,
    fused_layout,
    per_expert_layout,
    router_tensor,
    stacked,
)
from moesurgery.families.table.common import GATE, SELECTION_BIAS, W123, norm_topk

MIXTRAL_LAYOUTS = (
    per_expert_layout("block_sparse_moe.experts.#", **W123),
    fused_layout(moved=(("block_sparse_moe.", "mlp."),)),
)
MIXTRAL_ROUTER = router_tensor("block_sparse_moe.gate", "mlp.gate")

MIXTRAL: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("mixtral",),
        width_keys=("intermediate_size",),
        layouts=MIXTRAL_LAYOUTS,
        along=MIXTRAL_ROUTER,
        experts_key="num_local_experts",
    ),
    Family(
        "minimax",
        ("minimax", "minimax_text_01", "MiniMaxText01"),
        width_keys=("intermediate_size",),
        shared_width="shared_intermediate_size",
        layouts=MIXTRAL_LAYOUTS,
        along=MIXTRAL_ROUTER,
        shared=("shared_mlp", "coefficient"),
        experts_key="num_local_experts",
        buffers=("slope_rate", "diagonal_decay", "key_decay", "query_decay"),
        note="mlp_beta_factor is no place for a factor: the residual is the normed input",
    ),
    Family(
        "minimax_m2",
        ("minimax_m2",),
        width_keys=("intermediate_size",),
        layouts=MIXTRAL_LAYOUTS,
        along=(
            *MIXTRAL_ROUTER,
            *correction("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        ),
        routing=RouterRule(score="sigmoid"),
        experts_key="num_local_experts",
    ),
    Family(
        "minimax_m3_vl",
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        width_keys=("intermediate_size",),
        shared_width="shared_intermediate_size",
        dense_width="dense_intermediate_size",
        layouts=(
            per_expert_layout("block_sparse_moe.experts.#", **W123),
            fused_layout(
                moved=(
                    ("block_sparse_moe.e_score_correction_bias", SELECTION_BIAS),
                    ("block_sparse_moe.", "mlp."),
                )
            ),
        ),
        along=(
            *MIXTRAL_ROUTER,
            *correction("block_sparse_moe.e_score_correction_bias", SELECTION_BIAS),
        ),
        routing=RouterRule(score="sigmoid", routed_scale_key="routed_scaling_factor", routed_scale_default=2.0),
        shared=("block_sparse_moe.shared_experts", "mlp.shared_experts"),
        experts_key="num_local_experts",
        norm=InputNorm(kind="rms1"),
        sparse=("mlp_layer_types", "moe_layer_freq"),
    ),
    Family(
        "phimoe",
        ("phimoe",),
        width_keys=("intermediate_size",),
        layouts=(
            per_expert_layout("block_sparse_moe.experts.#", **W123),
            fused_layout(moved=(("block_sparse_moe.gate.", "mlp.router."), ("block_sparse_moe.", "mlp."))),
        ),
        along=router_tensor("block_sparse_moe.gate", "mlp.gate", "mlp.router"),
        routing=RouterRule(score="other", fixed_top_k=2, special="sparsemixer routing: two masked softmaxes"),
        experts_key="num_local_experts",
        norm=InputNorm(kind="layer"),
    ),
    Family(
        "olmoe",
        ("olmoe",),
        width_keys=("intermediate_size",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(False)),
    ),
    Family(
        "flex_olmo",
        ("flex_olmo",),
        width_keys=("intermediate_size",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(False), after="routed"),
    ),
    Family(
        "jamba",
        ("jamba",),
        width_keys=("intermediate_size",),
        layouts=(per_expert_layout("feed_forward.experts.#"), fused_layout("feed_forward.experts")),
        along=router_tensor("feed_forward.router"),
        routing=RouterRule(renormalised=False),
        norm=InputNorm("pre_ff_layernorm.weight"),
        sparse=("expert_layer_period",),
    ),
    Family(
        "granitemoe",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        width_keys=("intermediate_size",),
        shared_width="shared_intermediate_size",
        layouts=(
            fused_layout("block_sparse_moe", gate_up="input_linear", down="output_linear"),
            fused_layout(
                "block_sparse_moe.experts", moved=(("block_sparse_moe.router.layer.", "block_sparse_moe.router."),)
            ),
        ),
        along=router_tensor("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        shared=("shared_mlp",),
        routing=RouterRule(score="top-softmax"),
        experts_key="num_local_experts",
        note="residual_multiplier is no place for a factor: it scales the attention too",
    ),
    Family(
        "granitemoe_swa",
        ("granitemoe_swa",),
        width_keys=("intermediate_size",),
        shared_width="shared_intermediate_size",
        layouts=(fused_layout("block_sparse_moe.experts"),),
        along=router_tensor("block_sparse_moe.router"),
        shared=("shared_mlp",),
        routing=RouterRule(score="top-softmax"),
        experts_key="num_local_experts",
    ),
    Family(
        "jetmoe",
        ("jetmoe",),
        width_keys=("intermediate_size",),
        layouts=(fused_layout("mlp", gate_up="input_linear", down="output_linear"),),
        along=router_tensor("mlp.router.layer"),
        sets=(
            ExpertSet(
                "self_attention",
                (stacked(None, "self_attention.experts.input_linear", "self_attention.experts.output_linear"),),
                router_tensor("self_attention.experts.router.layer"),
                norm=InputNorm("input_layernorm.weight"),
                text=True,
            ),
        ),
        routing=RouterRule(score="top-softmax"),
        experts_key="num_local_experts",
        times_top_k={"num_attention_heads": "num_key_value_heads"},
        refuses={
            "drop-experts": "attention and FFN have experts of their own and one config number for both",
            "merge-experts": "attention and FFN have experts of their own and one config number for both",
            "to-dense": "its attention is a mixture of experts too",
        },
        note="two mixtures per layer: the attention heads are experts too, and one top-k drives both",
    ),
    Family(
        "dbrx",
        ("dbrx",),
        width_keys=("ffn_hidden_size",),
        layouts=(
            Layout(
                "fused",
                (
                    Projection("ffn.experts.mlp.w1", "gate", rows=True),
                    Projection("ffn.experts.mlp.v1", "up", rows=True),
                    Projection("ffn.experts.mlp.w2", "down", "io", rows=True),
                ),
            ),
        ),
        along=router_tensor("ffn.router.layer"),
        routing=RouterRule(renormalised=Flag(("moe_normalize_expert_weights",), 1.0, null_means_off=True)),
        nested=(("ffn_config",), ()),
        layers="blocks",
        top_k_key="moe_top_k",
        experts_key="moe_num_experts",
        norm=InputNorm("norm_attn_norm.norm_2.weight", "layer"),
        note="weights are divided by their L_p norm, p = moe_normalize_expert_weights (null: raw)",
    ),
    Family(
        "arctic",
        ("arctic",),
        width_keys=("intermediate_size",),
        shared_width=None,
        layouts=(per_expert_layout("block_sparse_moe.experts.#", **W123),),
        along=router_tensor("block_sparse_moe.gate"),
        shared=("residual_mlp", "residual_layernorm"),
        experts_key="num_local_experts",
        sparse=("moe_layer_frequency",),
        note="remote code; a dense residual MLP runs beside the experts",
    ),
    Family(
        "grok1",
        ("grok-1", "grok1"),
        width_keys=("intermediate_size",),
        layouts=(per_expert_layout("moe_block.experts.#", gate="linear", up="linear_v", down="linear_1"),),
        along=router_tensor("moe_block.gate"),
        routing=RouterRule(renormalised=False, after="routed"),
        norm=InputNorm("pre_moe_norm.scale"),
        note="remote code of the torch ports of the JAX release",
    ),
)
