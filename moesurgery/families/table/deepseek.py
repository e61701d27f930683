"""DeepSeek, and the families that follow its names: Kimi, GLM, dots, MiMo, Mistral 4 and others."""

from __future__ import annotations

from dataclasses import replace

from moesurgery.families.family import (
    ExpertAxisTensor,
    Family,
    InputNorm,
    RouterRule,
    correction,
    fused_layout,
    per_expert_layout,
    router_tensor,
)
from moesurgery.families.table.common import (
    DEEPSEEK_LAYERS,
    GATE,
    GATE_AND_BIAS,
    OTHER_NAMES,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    W123,
    norm_topk,
    sigmoid,
)


def _like_v3(
    name: str,
    *more: str,
    routed_scale: float,
    sparse: tuple[str, ...] = DEEPSEEK_LAYERS,
    buffers: tuple[str, ...] = (),
    note: str = "",
) -> Family:
    """Return the entry of a family whose experts and router are DeepSeek-V3's."""
    return Family(
        name,
        (name, *more),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE_AND_BIAS,
        shared=SHARED_EXPERTS,
        routing=sigmoid(routed_scale),
        experts_key="n_routed_experts",
        sparse=sparse,
        buffers=buffers,
        note=note,
    )


_V2_ROUTING = RouterRule(
    renormalised=False,
    groups="max",
    groups_if=("topk_method", "group_limited_greedy"),
    routed_scale_key="routed_scaling_factor",
    routed_scale_default=1.0,
)

DEEPSEEK: tuple[Family, ...] = (
    Family(
        "deepseek",
        ("deepseek",),
        layouts=(per_expert_layout(),),
        along=GATE,
        shared=SHARED_EXPERTS,
        routing=RouterRule(renormalised=norm_topk(False)),
        experts_key="n_routed_experts",
        sparse=DEEPSEEK_LAYERS,
        note="DeepSeekMoE 16B, remote code",
    ),
    Family(
        "deepseek_v2",
        ("deepseek_v2",),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE_AND_BIAS,
        shared=SHARED_EXPERTS,
        routing=_V2_ROUTING,
        experts_key="n_routed_experts",
        sparse=DEEPSEEK_LAYERS,
        note="transformers ignores norm_topk_prob here; the original code drops routed_scaling_factor when it is true",
    ),
    Family(
        "deepseek_ocr2",
        ("deepseek_ocr2", "deepseek_ocr2_text", "unlimited_ocr", "unlimited_ocr_text"),
        layouts=(per_expert_layout(), fused_layout()),
        along=GATE,
        shared=SHARED_EXPERTS,
        routing=_V2_ROUTING,
        experts_key="n_routed_experts",
        sparse=DEEPSEEK_LAYERS,
        refuses={"convert": OTHER_NAMES},
    ),
    _like_v3("deepseek_v3", "kimi_k2", "sarvam_mla", routed_scale=2.5),
    replace(
        _like_v3("kimi_k25", routed_scale=2.5, note="transformers 5 writes the text layers as `blocks`"),
        also_layers=("blocks",),
    ),
    _like_v3("deepseek_v32", routed_scale=2.5),
    Family(
        "deepseek_v4",
        ("deepseek_v4",),
        layouts=(
            per_expert_layout("ffn.experts.#", **W123),
            fused_layout(
                moved=(
                    ("ffn.gate.bias", SELECTION_BIAS),
                    ("ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."),
                    ("ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."),
                    ("ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."),
                    ("ffn.", "mlp."),
                )
            ),
        ),
        along=(
            *router_tensor("ffn.gate", "mlp.gate", bias=False),
            *correction("ffn.gate.bias", SELECTION_BIAS),
            ExpertAxisTensor("ffn.gate.tid2eid", "expert_table", parameter=False),
            ExpertAxisTensor("mlp.gate.tid2eid", "expert_table", parameter=False),
        ),
        shared=("ffn.shared_experts", "mlp.shared_experts"),
        routing=RouterRule(score="sqrt-softplus", routed_scale_key="routed_scaling_factor", routed_scale_default=1.5),
        experts_key="n_routed_experts",
        also_layers=("mtp",),
        norm=InputNorm("ffn_norm.weight", others=("post_attention_layernorm.weight",)),
        note="its first layers choose experts by a table (tid2eid) of numbers per token, which follows every edit",
    ),
    _like_v3("glm4_moe", "glm4_moe_text", routed_scale=1.0),
    _like_v3("glm4_moe_lite", routed_scale=1.8),
    _like_v3("glm_moe_dsa", routed_scale=2.5),
    _like_v3("glm4v_moe", "glm4v_moe_text", routed_scale=1.0),
    _like_v3("glm5_next", "glm5_next_text", routed_scale=2.5),
    _like_v3("dots1", routed_scale=1.0),
    replace(
        _like_v3(
            "dots3_note",
            "dots3_note_text",
            routed_scale=1.0,
            buffers=("mlp.router_bias", "mlp.e_score_correction_bias"),
            note="the vision tower is a mixture too: it is counted apart and stays as it is",
        ),
        shared_width="shared_experts_intermediate_size",
    ),
    _like_v3("solar_open", routed_scale=1.0, sparse=()),
    replace(
        _like_v3("mimo_v2_flash", routed_scale=1.0, note="routed_scaling_factor may be null, which is 1"), shared=()
    ),
    replace(
        _like_v3("axk1", "AXK1", routed_scale=2.5),
        layouts=(per_expert_layout(), fused_layout(moved=(("post_mlp_layernorm.", "mlp.post_mlp_layernorm."),))),
        routing=replace(sigmoid(2.5), after="joint"),
    ),
    replace(
        _like_v3("axk2", routed_scale=2.5),
        routing=replace(sigmoid(2.5), no_estimate="the norm before the router is gated by a small network"),
    ),
    Family(
        "mistral4",
        ("mistral4",),
        layouts=(fused_layout(),),
        along=GATE,
        shared=SHARED_EXPERTS,
        routing=RouterRule(
            renormalised=norm_topk(True),
            groups="top2",
            routed_scale_key="routed_scaling_factor",
            routed_scale_default=1.0,
        ),
        experts_key="n_routed_experts",
        sparse=DEEPSEEK_LAYERS,
    ),
    Family(
        "mistral_large4",
        ("mistral_large4", "mistral_large4_text"),
        layouts=(
            per_expert_layout("experts.#", **W123),
            fused_layout(
                moved=(
                    ("shared_experts.w1.", "mlp.shared_experts.gate_proj."),
                    ("shared_experts.w2.", "mlp.shared_experts.down_proj."),
                    ("shared_experts.w3.", "mlp.shared_experts.up_proj."),
                    ("gate.", "mlp.gate."),
                )
            ),
        ),
        along=router_tensor("gate", "mlp.gate"),
        shared=("shared_experts", "mlp.shared_experts"),
        routing=RouterRule(groups="top2", routed_scale_key="routed_scaling_factor", routed_scale_default=1.0),
        experts_key="n_routed_experts",
        norm=InputNorm("ffn_norm.weight", others=("post_attention_layernorm.weight",)),
        sparse=DEEPSEEK_LAYERS,
        refuses={"convert": OTHER_NAMES},
    ),
)
