"""Families whose code lives beside their weights, not in transformers: entries from published names and code."""

from __future__ import annotations

from moesurgery.families.family import (
    Along,
    Family,
    Flag,
    Layout,
    Part,
    Routing,
    correction,
    per_expert,
    routers,
    stacked,
)
from moesurgery.families.table.common import DEEPSEEK_LAYERS, GATE, SHARED_EXPERTS, norm_topk

TWO_LAYER_GATE = "its router is a network of two layers, whose last one mixes the experts' scores"

REMOTE: tuple[Family, ...] = (
    Family(
        "bailing_moe",
        ("bailing_moe",),
        layouts=(per_expert(),),
        along=GATE,
        shared=SHARED_EXPERTS,
        routing=Routing(renormalised=norm_topk(True)),
        architectures=("BailingMoeForCausalLM",),
        sparse=DEEPSEEK_LAYERS,
        note="Ling and Ring of the first generation",
    ),
    Family(
        "bailing_moe_v2",
        ("bailing_moe", "bailing_moe_v2"),
        layouts=(per_expert(),),
        along=(*GATE, *correction("mlp.gate.expert_bias")),
        shared=SHARED_EXPERTS,
        routing=Routing(
            score="sigmoid",
            renormalised=norm_topk(True),
            groups="top2",
            score_flag=Flag(("score_function",), "sigmoid"),
            knob="routed_scaling_factor",
            knob_default=1.0,
        ),
        architectures=("BailingMoeV2ForCausalLM",),
        sparse=DEEPSEEK_LAYERS,
        note="Ling and Ring 2; the published model_type is that of the first generation",
    ),
    Family(
        "llama_moe",
        ("llama_moe",),
        layouts=(
            Layout(
                "per-expert",
                (
                    Part("mlp.calculator.experts.weight_gate.#", "gate"),
                    Part("mlp.calculator.experts.weight_up.#", "up"),
                    Part("mlp.calculator.experts.weight_down.#", "down"),
                ),
            ),
        ),
        along=(),
        router_parts=("mlp.gate",),
        routing=Routing(
            score="other",
            special="a noisy two-layer gate, balanced by thresholds",
            knob="score_scale_factor",
            knob_default=1.0,
        ),
        top_k_key="num_selects",
        refuses={"drop-experts": TWO_LAYER_GATE, "merge-experts": TWO_LAYER_GATE, "to-dense": TWO_LAYER_GATE},
        note="LLaMA-MoE v1: every expert is a slice of a dense FFN",
    ),
    Family(
        "openmoe",
        (),
        layouts=(stacked("mlp.experts.wi_gate", "mlp.experts.wi_up", "mlp.experts.wo", order="io"),),
        along=(Along("mlp.gate_weight", "router"),),
        shared=("extra_mlp",),
        routing=Routing(renormalised=False, special="an expert takes no more tokens than its capacity"),
        top_k_key="router_topk",
        architectures=("OpenMoeForCausalLM",),
        sparse=("moe_layer_interval",),
        note="OpenMoE gives the model_type llama; names and axes from ColossalAI's conversion and model code",
    ),
    Family(
        "skywork_moe",
        ("skywork_moe",),
        layouts=(per_expert(),),
        along=routers("mlp.gate.wg"),
        router_parts=("mlp.gate",),
        routing=Routing(score="other", fixed_top_k=2, special="logits are normalised before the softmax"),
        note="the published names are not confirmed",
    ),
)
