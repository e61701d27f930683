"""The family table. A new family is an entry here and a row in tests/families.py: docs/families.md.

Sources: transformers 5.23 modeling files and published checkpoints; `tests/test_families.py` checks every
entry against a model that transformers builds, in every layout.
"""

from __future__ import annotations

from moesurgery.families.family import (
    Along,
    Family,
    Flag,
    InputNorm,
    Layout,
    Part,
    Routing,
    correction,
    fused,
    per_expert,
    routers,
)

W123 = {"gate": "w1", "up": "w3", "down": "w2"}
MODEL_CODE_FIXES_K = "the model code always uses top-{k} and ignores the config key"


def norm_topk(default: bool) -> Flag:
    return Flag(("norm_topk_prob", "moe_renormalize", "route_norm"), default)


DEEPSEEK_SHARED = ("mlp.shared_experts",)
DEEPSEEK_ROUTER = (*routers("mlp.gate"), *correction("mlp.gate.e_score_correction_bias"))
SIGMOID_WITH_KNOB = Routing(
    score="sigmoid", renormalised=norm_topk(True), groups="top2", knob="routed_scaling_factor", knob_default=1.0
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("mixtral",),
        layouts=(per_expert("block_sparse_moe.experts.#", **W123), fused()),
        along=routers("block_sparse_moe.gate", "mlp.gate"),
        experts_key="num_local_experts",
    ),
    Family(
        "phimoe",
        ("phimoe",),
        layouts=(per_expert("block_sparse_moe.experts.#", **W123), fused()),
        along=routers("block_sparse_moe.gate", "mlp.gate", "mlp.router"),
        routing=Routing(score="other", fixed_top_k=2, special="sparsemixer routing: two masked softmaxes"),
        experts_key="num_local_experts",
        norm=InputNorm(kind="layer"),
    ),
    Family(
        "qwen2_moe",
        ("qwen2_moe",),
        layouts=(per_expert(), fused()),
        along=routers("mlp.gate"),
        routing=Routing(renormalised=norm_topk(False)),
        shared=("mlp.shared_expert", "mlp.shared_expert_gate"),
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        layouts=(per_expert(), fused()),
        along=routers("mlp.gate"),
        routing=Routing(renormalised=norm_topk(False)),
    ),
    Family(
        "olmoe",
        ("olmoe",),
        layouts=(per_expert(), fused()),
        along=routers("mlp.gate"),
        routing=Routing(renormalised=norm_topk(False)),
    ),
    Family(
        "deepseek_v2",
        ("deepseek_v2",),
        layouts=(per_expert(), fused()),
        along=DEEPSEEK_ROUTER,
        shared=DEEPSEEK_SHARED,
        routing=Routing(
            renormalised=False,
            groups="max",
            groups_if=("topk_method", "group_limited_greedy"),
            knob="routed_scaling_factor",
            knob_default=1.0,
        ),
        experts_key="n_routed_experts",
        note="transformers ignores norm_topk_prob here; the original code drops routed_scaling_factor when it is true",
    ),
    Family(
        "deepseek_v3",
        ("deepseek_v3", "kimi_k2"),
        layouts=(per_expert(), fused()),
        along=DEEPSEEK_ROUTER,
        shared=DEEPSEEK_SHARED,
        routing=Routing(
            score="sigmoid",
            renormalised=norm_topk(True),
            groups="top2",
            knob="routed_scaling_factor",
            knob_default=2.5,
        ),
        experts_key="n_routed_experts",
    ),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        layouts=(fused(order="io", interleaved=True),),
        along=routers("mlp.router"),
        routing=Routing(score="top-softmax"),
        experts_key="num_local_experts",
    ),
    Family(
        "granitemoe",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        layouts=(
            Layout(
                "fused",
                (
                    Part("block_sparse_moe.input_linear", "gate_up"),
                    Part("block_sparse_moe.output_linear", "down"),
                ),
            ),
            fused("block_sparse_moe.experts"),
        ),
        along=routers("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        shared=("shared_mlp",),
        routing=Routing(score="top-softmax"),
        experts_key="num_local_experts",
    ),
    Family(
        "jamba",
        ("jamba",),
        layouts=(per_expert("feed_forward.experts.#"), fused("feed_forward.experts")),
        along=routers("feed_forward.router"),
        routing=Routing(renormalised=False),
        norm=InputNorm("pre_ff_layernorm.weight"),
    ),
    Family(
        "lfm2_moe",
        ("lfm2_moe",),
        layouts=(per_expert("feed_forward.experts.#", **W123), fused("feed_forward.experts")),
        along=(*routers("feed_forward.gate"), *correction("feed_forward.expert_bias")),
        routing=Routing(score="sigmoid", renormalised=norm_topk(True), knob="routed_scaling_factor", knob_default=1.0),
        norm=InputNorm("ffn_norm.weight"),
    ),
)


def by_model_type(model_type: str) -> tuple[Family, ...]:
    """Return the entries for one `model_type` (two where architectures must decide)."""
    return tuple(family for family in FAMILIES if model_type in family.model_types)


__all__ = ["FAMILIES", "Along", "by_model_type"]
