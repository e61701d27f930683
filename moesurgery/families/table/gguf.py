"""The families of GGUF files: one layout for all, and how llama.cpp routes each architecture.

llama.cpp stores the experts of a layer in one tensor with the expert as its outermost axis, under the same names in
every architecture; what differs is in the code: how scores become weights, and which architectures read the factor on
the routed sum. Facts of llama.cpp's `src/models/` (September 2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from moesurgery.checkpoint.gguf_files import MODEL_TYPE
from moesurgery.families.family import (
    ExpertAxisTensor,
    Family,
    Flag,
    InputNorm,
    Layout,
    Projection,
    RouterRule,
    correction,
    router_tensor,
    stacked,
)

_Score = Literal["softmax", "top-softmax", "sigmoid"]
_NAMES = {"1": "softmax", "2": "sigmoid", "3": "top-softmax", "4": "sqrt-softplus"}  # of expert_gating_func


@dataclass(frozen=True)
class _Routing:
    """How llama.cpp routes an architecture: None where the file's metadata say it.

    `scaled`: whether the architecture reads expert_weights_scale.
    """

    score: _Score | None
    renormalised: bool | None
    scaled: bool = False
    norm: Literal["rms", "layer"] = "rms"


_RENORMALISED = _Routing("softmax", True)
_RAW = _Routing("softmax", False)
_STATED = _Routing(None, None, scaled=True)
_ROUTING: dict[str, _Routing] = {
    **dict.fromkeys(
        (
            *("llama", "grok", "qwen3moe", "qwen3vlmoe", "qwen3next", "qwen35moe", "qwen4exp", "arctic", "minimax-01"),
            *("ernie4_5-moe", "hunyuan-moe", "rnd1", "granitemoe", "granitehybrid", "mellum", "maple", "mistral3"),
            "gemma4",
        ),
        _RENORMALISED,
    ),
    **dict.fromkeys(("qwen2moe", "olmoe", "llada-moe", "jamba"), _RAW),
    **dict.fromkeys(("dbrx", "phimoe"), _Routing("softmax", True, norm="layer")),
    "nomic-bert-moe": _Routing("softmax", False, norm="layer"),
    "gpt-oss": _Routing("top-softmax", True),
    "deepseek": _Routing("softmax", False, scaled=True),
    "bailingmoe": _Routing("softmax", None, scaled=True),
    **dict.fromkeys(
        (
            *("deepseek2", "deepseek2-ocr", "deepseek32", "deepseek4", "glm4moe", "glm-dsa", "bailingmoe2"),
            *("bailingmoe3", "dots1", "dots3note", "afmoe", "laguna", "exaone-moe", "hy_v3", "hy_v4", "kimi-k3"),
            *("step35", "minimax-m3", "cohere2moe", "dflash"),
        ),
        _STATED,
    ),
    "kimi-linear": _Routing(None, True, scaled=True),
    **dict.fromkeys(("minimax-m2", "lfm2moe", "smallthinker"), _Routing(None, True)),
    "mimo2": _Routing("sigmoid", True),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), _Routing("sigmoid", None, scaled=True)),
}
_CHUNKED = "each of its experts has a part of its weights in common with others, in tensors of their own"
_LAYOUTS = (
    stacked("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    Layout("fused", (Projection("ffn_gate_up_exps", "gate_up"), Projection("ffn_down_exps", "down"))),
    stacked(None, "ffn_up_exps", "ffn_down_exps"),
    # As llama.cpp wrote Mixtral before April 2024.
    Layout(
        "per-expert",
        (Projection("ffn_gate.#", "gate"), Projection("ffn_up.#", "up"), Projection("ffn_down.#", "down")),
    ),
)


@cache
def gguf_family(model_type: str) -> Family:
    """Return the family of a GGUF file; of an architecture that is not in the table one without a rule for factors."""
    architecture = model_type.removeprefix(MODEL_TYPE)
    known = _ROUTING.get(architecture)
    routing = RouterRule(score="other", no_estimate=f"it is not known how llama.cpp routes {architecture}")
    if known is not None:
        norm = known.renormalised
        routing = RouterRule(
            score=known.score or "softmax",
            renormalised=Flag(("norm_topk_prob",), False) if norm is None else norm,
            groups="top2",
            score_flag=Flag(("scoring_func",), None) if known.score is None else None,
            score_names=_NAMES,
            routed_scale_key="routed_scaling_factor" if known.scaled else None,
            routed_scale_default=1.0,
        )
    elif architecture == "llama4":
        routing = RouterRule(score="sigmoid", renormalised=False, on_input=True, special="weights multiply the inputs")
    return Family(
        model_type,
        (model_type,),
        layouts=_LAYOUTS,
        along=(
            *router_tensor("ffn_gate_inp"),
            *correction("exp_probs_b.bias", "exp_probs_b", "exp_probs_b_vl.bias"),
            ExpertAxisTensor("ffn_gate_tid2eid.weight", "expert_table", parameter=False),
        ),
        routing=routing,
        shared=("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp"),
        sparse=("first_k_dense_replace",),
        nested=(),
        layers="blk",
        norm=InputNorm(
            "ffn_norm.weight", known.norm if known else "rms", ("post_attention_norm.weight", "attn_post_norm.weight")
        ),
        refuses={"drop-experts": _CHUNKED, "merge-experts": _CHUNKED} if architecture == "grovemoe" else {},
    )
