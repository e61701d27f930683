"""Plain weights quantised by rounding to the nearest step, in forms that transformers, vLLM and SGLang read.

Without calibration: `fp8` (E4M3, a scale per output, activations by token at run time), `int4` (groups of 32,
symmetric), `mxfp4` and `nvfp4` (weights alone) as compressed-tensors stores them; `fp8-block` (128 x 128) as
DeepSeek-V3 and Qwen3 are published; `mxfp4` of gpt-oss in its own form. What stays plain is listed by name in
config.json: routers, norms, embeddings, the head, what stands beside the language model, and what a form's groups do
not divide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Constant, Full, transpose
from moesurgery.families import components
from moesurgery.plan.dequantise import StoredForm
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.quantised_tensors import Encoding, OverallScale
from moesurgery.plan.requantise import joined_with, parts_of
from moesurgery.plan.written_forms import LEAST_SIZE, SCALE_BLOCK, WRITTEN_FORMS, WrittenForm

QuantisedAs = Literal["fp8", "fp8-block", "mxfp4", "nvfp4", "int4"]
Linears = Literal["experts", "all"]
_LINEAR_PARTS = (components.ATTENTION, components.SHARED, components.DENSE_FFN, components.ROUTED)


def stays_fused(plan: Plan, form: QuantisedAs) -> bool:
    """Whether a form has a place for stacked experts as this model stores them: MXFP4 of gpt-oss."""
    family = plan.anatomy.family
    return form == "mxfp4" and family is not None and family.name == "gpt_oss"


def quantised_linears(
    plan: Plan, name: QuantisedAs, linears: Linears, operation: str, squares: Mapping[str, Expr] | None = None
) -> tuple[Plan, str]:
    """Return the plan with linear layers quantised, and what was done. Experts are to be stored one by one.

    `squares` [in] (F32) by weight, such as mean squares of its inputs: what squared errors are weighed by. Raises
    RefusedError for weights that are quantised, and for experts that the form's groups do not divide.
    """
    target, anatomy = WRITTEN_FORMS[name], plan.anatomy
    anatomy.require_family(operation)
    held = [n for n, weights in anatomy.parameters.items() if weights and plan.tensors[n].dtype not in PLAIN_FLOATS]
    if held:
        raise RefusedError(
            f"{operation}: {held[0]} is {plan.tensors[held[0]].dtype}: the model is quantised already",
            "give --dequantize, too: it is then read as the numbers that it stands for",
        )
    if stays_fused(plan, name):
        return _gpt_oss(plan, linears, operation, squares or {})
    experts = {m.name for block in anatomy.blocks for m in block.members if m.part and m.stem.main}
    chosen = [n for n in plan.tensors if _is_linear(plan, n) and (linears == "all" or n in experts)]
    odd = [n for n in chosen if plan.tensors[n].shape[1] % target.group]
    if bad := experts.intersection(odd) or experts.difference(chosen):
        some = min(bad)
        raise RefusedError(
            f"{operation}: {some} is {list(plan.tensors[some].shape)}: {name} wants linear layers [out, in] whose"
            f" inputs divide into groups of {target.group}",
            "fp8 and fp8-block have no groups" if target.group > 1 else None,
        )
    quantised = {n for n in chosen if n not in odd}
    squares = squares or {}
    scales: dict[frozenset[str], Expr] = {}
    tensors: dict[str, Expr] = {}
    shard_of: dict[str, str] = {}
    for n, expr in plan.tensors.items():
        made = _stored(plan, n, target, quantised, squares.get(n), scales) if n in quantised else {n: expr}
        for new, part in made.items():
            tensors[new], shard_of[new] = part, plan.shard_of[n]
    config = {**plan.config, "quantization_config": _settings(plan, target, quantised)}
    what = f"{len(quantised)} weights of {len(plan.tensors)} to {name} ({target.form})" + _note(quantised, squares)
    return plan.edited(Step(operation, {}, what), tensors=tensors, shard_of=shard_of, config=config), what


def _is_linear(plan: Plan, name: str) -> bool:
    expr, anatomy = plan.tensors[name], plan.anatomy
    part = anatomy.component[name]
    if part == components.MTP:  # experts of prediction layers are quantised with the others
        part = (
            components.ROUTED
            if any(m.name == name and m.part for b in anatomy.blocks if b.mtp for m in b.members)
            else part
        )
    return (
        part in _LINEAR_PARTS
        and name.endswith(".weight")
        and len(expr.shape) == 2
        and expr.dtype in PLAIN_FLOATS
        and min(expr.shape) >= LEAST_SIZE
    )


def _note(quantised: set[str], squares: Mapping[str, Expr]) -> str:
    count = len(quantised.intersection(squares))
    return f", scales of {count} by the squares of their inputs" if count else ""


def _stored(
    plan: Plan,
    name: str,
    target: WrittenForm,
    quantised: set[str],
    squares: Expr | None,
    scales: dict[frozenset[str], Expr],
) -> dict[str, Expr]:
    """Return what a weight becomes, by name. `scales`: second scales by the weights that share them."""
    expr = cast(plan.tensors[name], "F32")
    out, width = expr.shape
    form = target.form_of(width)
    base = name.removesuffix(".weight")
    overall: Expr | None = None
    if form.overall:
        group = [name, *(other for other in joined_with(name) if other in quantised)]
        shared = OverallScale(name, tuple(cast(plan.tensors[n], "F32") for n in group), form)
        overall = scales.setdefault(frozenset(group), shared)
    encoding = Encoding(name, expr, form, overall=overall, weights=squares)
    like: dict[str, Expr] = {end: Full(0, dtype, shape) for end, (dtype, shape) in target.stored(out, width).items()}
    stored = StoredForm(form, like, target.main, target.scale, overall=".weight_global_scale" if form.overall else "")
    parts = parts_of(encoding, stored, like)
    if form.numbers == "int":
        shape = b"".join(n.to_bytes(8, "little") for n in (out, width))
        parts[".weight_shape"] = Constant(shape, "I64", (2,))
    return {base + suffix: part for suffix, part in parts.items()}


def _settings(plan: Plan, target: WrittenForm, quantised: set[str]) -> dict[str, Any]:
    """Return the quantization_config: what is plain is listed by its own name, as vLLM compares them."""
    plain = [n.removesuffix(".weight") for n in plan.tensors if n.endswith(".weight") and n not in quantised]
    if not target.format:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
            "modules_to_not_convert": _with_head(plain),
        }
    linears = [module for module in plain if len(plan.tensors[f"{module}.weight"].shape) == 2]
    embeddings = {
        n.removesuffix(".weight") for n, part in plan.anatomy.component.items() if part == components.EMBEDDING
    }
    return {
        "quant_method": "compressed-tensors",
        "format": target.format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False, **target.weights},
                "input_activations": None if target.activations is None else dict(target.activations),
                "output_activations": None,
            }
        },
        "ignore": _with_head([module for module in linears if module not in embeddings]),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _with_head(modules: list[str]) -> list[str]:
    """Return the modules with a head that is tied to the embedding, and so not stored, among them."""
    return modules if any(re.search(r"(^|\.)lm_head$", module) for module in modules) else [*modules, "lm_head"]


def _gpt_oss(plan: Plan, linears: Linears, operation: str, squares: Mapping[str, Expr]) -> tuple[Plan, str]:
    """Return the plan with experts [E, in, out] as MXFP4 blocks [E, out, in / 32, 16] and scales [E, out, in / 32]."""
    if linears == "all":
        raise RefusedError(
            f"{operation}: the MXFP4 form of gpt-oss is one of its experts alone", "leave --linears out, or give fp8"
        )
    form = WRITTEN_FORMS["mxfp4"].form
    tensors: dict[str, Expr] = {}
    shard_of: dict[str, str] = {}
    experts = {m.name for block in plan.anatomy.blocks for m in block.members if m.part and m.stem.main}
    for name, expr in plan.tensors.items():
        made = {name: expr}
        if name in experts:
            count, into, out = expr.shape
            if into % form.wide:
                raise RefusedError(f"{operation}: {name} has {into} inputs, no multiple of {form.wide}")
            like: dict[str, Expr] = {
                "_blocks": Full(0, "U8", (count, out, into // 32, 16)),
                "_scales": Full(0, "U8", (count, out, into // 32)),
            }
            encoding = Encoding(name, cast(transpose(expr), "F32"), form, weights=squares.get(name))
            parts = parts_of(encoding, StoredForm(form, like, "_blocks", "_scales"), like)
            made = {name + suffix: part for suffix, part in parts.items()}
        for new, part in made.items():
            tensors[new], shard_of[new] = part, plan.shard_of[name]
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {**plan.config, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": plain}}
    what = f"{len(experts)} weights of {len(plan.tensors)} to mxfp4 ({form})" + _note(experts, squares)
    return plan.edited(Step(operation, {}, what), tensors=tensors, shard_of=shard_of, config=config), what
