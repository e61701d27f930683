"""Families whose code lives beside their weights, not in transformers: entries from published names and code."""

from __future__ import annotations

from moesurgery.families.family import (
    ExpertAxisTensor,
    Family,
    Flag,
    Layout,
    Projection,
    RouterRule,
    correction,
    per_expert_layout,
    router_tensor,
    stacked,
)
from moesurgery.families.table.common import DEEPSEEK_LAYERS, GATE, SHARED_EXPERTS, norm_topk

TWO_LAYER_GATE = "its router is a network of two layers, whose last one mixes the experts' scores"

REMOTE: tuple[Family, ...] = (
    Family(
        "bailing_moe",
        ("bailing_moe",),
        layouts=(per_expert_layout(),),
        along=GATE,
        shared=SHARED_EXPERTS,
        routing=RouterRule(renormalised=norm_topk(True)),
        architectures=("BailingMoeForCausalLM",),
        sparse=DEEPSEEK_LAYERS,
        note="Ling and Ring of the first generation",
    ),
    Family(
        "bailing_moe_v2",
        ("bailing_moe", "bailing_moe_v2"),
        layouts=(per_expert_layout(),),
        along=(*GATE, *correction("mlp.gate.expert_bias")),
        shared=SHARED_EXPERTS,
        routing=RouterRule(
            score="sigmoid",
            renormalised=norm_topk(True),
            groups="top2",
            score_flag=Flag(("score_function",), "sigmoid"),
            routed_scale_key="routed_scaling_factor",
            routed_scale_default=1.0,
        ),
        architectures=("BailingMoeV2ForCausalLM",),
        sparse=DEEPSEEK_LAYERS,
        note="Ling and Ring 2; the published model_type is that of the first generation",
    ),
    Family(
        "llama_moe",
        ("llama_moe",),
        width_keys=("intermediate_size",),
        layouts=(
            Layout(
                "per-expert",
                (
                    Projection("mlp.calculator.experts.weight_gate.#", "gate"),
                    Projection("mlp.calculator.experts.weight_up.#", "up"),
                    Projection("mlp.calculator.experts.weight_down.#", "down"),
                ),
            ),
        ),
        along=(),
        router_parts=("mlp.gate",),
        routing=RouterRule(
            score="other",
            special="a noisy two-layer gate, balanced by thresholds",
            routed_scale_key="score_scale_factor",
            routed_scale_default=1.0,
        ),
        top_k_key="num_selects",
        refuses={"drop-experts": TWO_LAYER_GATE, "merge-experts": TWO_LAYER_GATE, "to-dense": TWO_LAYER_GATE},
        note="LLaMA-MoE v1: every expert is a slice of a dense FFN",
    ),
    Family(
        "openmoe",
        (),
        width_keys=("intermediate_size",),
        layouts=(stacked("mlp.experts.wi_gate", "mlp.experts.wi_up", "mlp.experts.wo", order="io"),),
        along=(ExpertAxisTensor("mlp.gate_weight", "router"),),
        shared=("extra_mlp",),
        routing=RouterRule(renormalised=False, special="an expert takes no more tokens than its capacity"),
        top_k_key="router_topk",
        architectures=("OpenMoeForCausalLM",),
        sparse=("moe_layer_interval",),
        note="OpenMoE gives the model_type llama; names and axes from ColossalAI's conversion and model code",
    ),
    Family(
        "skywork_moe",
        ("skywork_moe",),
        width_keys=("intermediate_size",),
        layouts=(per_expert_layout(),),
        along=router_tensor("mlp.gate.wg"),
        router_parts=("mlp.gate",),
        routing=RouterRule(score="other", fixed_top_k=2, special="logits are normalised before the softmax"),
        note="the published names are not confirmed",
    ),
)
