"""Families whose code lives beside their weights, not in transformers: entries from published names and code."""

from __future__ import annotations

from dataclasses import replace

from moesurgery.families.family import (
    ExpertAxisTensor,
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
from moesurgery.families.table.common import (
    DEEPSEEK_LAYERS,
    GATE,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    W123,
    norm_topk,
    sigmoid,
)

TWO_LAYER_GATE = "its router is a network of two layers, whose last one mixes the experts' scores"
_EDITS = ("rescale", "drop-experts", "merge-experts", "slim-experts", "to-dense", "refit", "convert", "tie-blocks")
_DRAFTS = "its draft layers have experts of a number and top-k of their own (dspark_…), which edits do not follow yet"
_BLOCKS = (
    "its config says of each layer how many experts it has, or of which width (block_configs): edits do not follow"
)

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
    Family(
        "deepseek_v41",
        ("deepseek_v41", "deepseek_v41_text"),
        layouts=(per_expert_layout("ffn.experts.#", **W123), fused_layout()),
        along=(
            *router_tensor("ffn.gate", "mlp.gate", bias=False),
            *correction("ffn.gate.bias", SELECTION_BIAS),
            *correction("ffn.gate.bias_vl", "mlp.gate.e_score_correction_bias_vl"),
        ),
        shared=("ffn.shared_experts", "mlp.shared_experts"),
        routing=RouterRule(
            score="sqrt-softplus",
            renormalised=norm_topk(True),
            routed_scale_key="routed_scaling_factor",
            routed_scale_default=1.5,
            no_estimate="its logits are divided by gate_temp",
        ),
        experts_key="n_routed_experts",
        also_layers=("mtp",),
        norm=InputNorm("ffn_norm.weight", others=("post_attention_layernorm.weight",)),
        refuses=dict.fromkeys(_EDITS, _DRAFTS),
        note="names of the published files; tokens of images have a selection bias of their own",
    ),
    Family(
        "kimi_k3",
        ("kimi_k3",),
        layouts=(per_expert_layout("block_sparse_moe.experts.#", **W123),),
        along=(*router_tensor("block_sparse_moe.gate"), *correction("block_sparse_moe.gate.e_score_correction_bias")),
        shared=(
            "block_sparse_moe.shared_experts",
            "block_sparse_moe.routed_expert_down_proj",
            "block_sparse_moe.routed_expert_norm",
            "block_sparse_moe.routed_expert_up_proj",
        ),
        routing=replace(sigmoid(1.0), after="routed"),
        top_k_key="num_experts_per_token",
        shared_width=None,
        sparse=("first_k_dense_replace",),
        note="experts work in a space of their own, and a norm follows their sum: names from llama.cpp's converter",
    ),
    Family(
        "nemotron_h_puzzle",
        ("nemotron_h_puzzle",),
        shared_width="moe_shared_expert_intermediate_size",
        layouts=(per_expert_layout("mixer.experts.#", gate=None),),
        along=(*router_tensor("mixer.gate"), *correction("mixer.gate.e_score_correction_bias")),
        shared=("mixer.shared_experts", "mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
        routing=sigmoid(1.0),
        experts_key="n_routed_experts",
        norm=InputNorm("norm.weight"),
        sparse=("block_configs",),
        refuses=dict.fromkeys(_EDITS, _BLOCKS),
        note="Nemotron-H whose layers have experts of different widths and top-k",
    ),
    Family(
        "gpt_oss_puzzle",
        ("gpt_oss_puzzle",),
        width_keys=("intermediate_size",),
        layouts=(fused_layout(order="io", interleaved=True),),
        along=router_tensor("mlp.router"),
        routing=RouterRule(score="top-softmax"),
        experts_key="num_local_experts",
        sparse=("block_configs",),
        refuses=dict.fromkeys(_EDITS, _BLOCKS),
        note="gpt-oss whose layers have different numbers of experts",
    ),
)
