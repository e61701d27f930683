"""What many entries of the table share."""

from __future__ import annotations

from moesurgery.families.family import (
    ExpertAxisTensor,
    Flag,
    Layout,
    RouterRule,
    correction,
    fused_layout,
    per_expert_layout,
    router_tensor,
)

W123 = {"gate": "w1", "up": "w3", "down": "w2"}


def norm_topk(default: bool) -> Flag:
    """Return the flag that says whether the chosen weights are divided by their sum."""
    return Flag(("norm_topk_prob", "moe_renormalize", "route_norm"), default)


def sigmoid(routed_scale: float, *, groups: bool = True) -> RouterRule:
    """Return DeepSeek-V3's routing: sigmoid scores, a selection bias, groups scored by their best two."""
    return RouterRule(
        score="sigmoid",
        renormalised=norm_topk(True),
        groups="top2" if groups else None,
        routed_scale_key="routed_scaling_factor",
        routed_scale_default=routed_scale,
    )


def layouts_moving(bias: str) -> tuple[Layout, Layout]:
    """Return the layouts of a family whose checkpoints have the selection bias, which transformers moves, as `bias`."""
    return per_expert_layout(), fused_layout(moved=((bias, SELECTION_BIAS),))


GATE = router_tensor("mlp.gate")
SELECTION_BIAS = "mlp.gate.e_score_correction_bias"  # where transformers has it
GATE_AND_BIAS: tuple[ExpertAxisTensor, ...] = (*GATE, *correction(SELECTION_BIAS))
SHARED_EXPERT = ("mlp.shared_expert", "mlp.shared_expert_gate")
SHARED_EXPERTS = ("mlp.shared_experts",)

# Which config keys may say what layers are MoE.
QWEN_LAYERS = ("mlp_layer_types", "mlp_only_layers", "decoder_sparse_step")
DEEPSEEK_LAYERS = ("mlp_layer_types", "moe_layer_freq", "first_k_dense_replace")

PRODUCT_KEYS = "its router scores pairs of keys, so single experts cannot be taken out or put in"
OTHER_NAMES = "beside the fused experts all other tensors have other names too"
TWO_STACKS = "it is an encoder and a decoder, each with layers of its own"
