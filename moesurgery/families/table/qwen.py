"""The Qwen families and those that transformers derives from them."""

from __future__ import annotations

from moesurgery.families.family import Family, InputNorm, RouterRule, correction, fused_layout, per_expert_layout
from moesurgery.families.table.common import GATE, QWEN_LAYERS, SELECTION_BIAS, SHARED_EXPERT, layouts_moving, norm_topk

OMNI_STACKS = "thinker and talker are two stacks of layers with configs of their own"

QWEN: tuple[Family, ...] = (
    Family(
        "qwen2_moe",
        ("qwen2_moe",),
        shared_width="shared_expert_intermediate_size",
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(False)),
        shared=SHARED_EXPERT,
        sparse=QWEN_LAYERS,
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(False)),
        sparse=QWEN_LAYERS,
    ),
    Family(
        "qwen3_next",
        ("qwen3_next",),
        shared_width="shared_expert_intermediate_size",
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(True)),
        shared=SHARED_EXPERT,
        norm=InputNorm(kind="rms1"),
        sparse=QWEN_LAYERS,
    ),
    Family(
        "qwen3_5_moe",
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        shared_width="shared_expert_intermediate_size",
        layouts=(fused_layout(), per_expert_layout()),
        along=GATE,
        shared=SHARED_EXPERT,
        norm=InputNorm(kind="rms1"),
    ),
    Family(
        "qwen3_vl_moe",
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        layouts=(fused_layout(order="io"), fused_layout()),
        along=GATE,
        sparse=QWEN_LAYERS,
        note="one name, two orientations: [E, in, out] as published, [E, out, in] as transformers 5 saves it",
    ),
    Family(
        "qwen3_omni_moe",
        ("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(True)),
        nested=(("thinker_config", "text_config"), ("text_config",), ()),
        sparse=QWEN_LAYERS,
        refuses={"tie-blocks": OMNI_STACKS},
        note="the thinker is the language model; the talker, a second mixture, stays as it is",
    ),
    Family(
        "qwen4_exp",
        ("qwen4_exp", "qwen4_exp_text"),
        shared_width="shared_expert_intermediate_size",
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(
            renormalised=norm_topk(True),
            no_estimate="the router reads a learned mix of residual streams, not a norm of the hidden state",
        ),
        shared=SHARED_EXPERT,
    ),
    Family(
        "lara_mini",
        ("lara_mini",),
        refuses={"slim-experts": "the width of its shared expert does not follow from the one number that is edited"},
        layouts=(fused_layout(),),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(True)),
        shared=SHARED_EXPERT,
    ),
    Family(
        "flint",
        ("flint",),
        shared_width="shared_expert_intermediate_size",
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(score="sigmoid", renormalised=norm_topk(True)),
        shared=SHARED_EXPERT,
        sparse=QWEN_LAYERS,
    ),
    Family(
        "mellum",
        ("mellum",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        routing=RouterRule(renormalised=norm_topk(True)),
        sparse=("mlp_layer_types",),
    ),
    Family(
        "kolibri1",
        ("kolibri1",),
        shared_width="shared_expert_intermediate_size",
        layouts=layouts_moving("moe.router.expert_bias"),
        along=(*GATE, *correction("moe.router.expert_bias", SELECTION_BIAS)),
        routing=RouterRule(score="sigmoid", renormalised=norm_topk(False), bias_on="logit", after="joint"),
        shared=("mlp.shared_experts",),
    ),
    Family(
        "laguna",
        ("laguna",),
        shared_width="shared_expert_intermediate_size",
        layouts=(
            per_expert_layout(),
            fused_layout(
                moved=(
                    ("mlp.experts.e_score_correction_bias", SELECTION_BIAS),
                    ("mlp.shared_expert.", "mlp.shared_experts."),
                )
            ),
        ),
        along=(
            *GATE,
            *correction("mlp.experts.e_score_correction_bias", SELECTION_BIAS, parameter=True),
        ),
        routing=RouterRule(
            score="sigmoid",
            softcap="moe_router_logit_softcapping",
            routed_scale_key="moe_routed_scaling_factor",
            routed_scale_default=1.0,
        ),
        shared=("mlp.shared_expert", "mlp.shared_experts"),
        sparse=("mlp_layer_types",),
    ),
)
