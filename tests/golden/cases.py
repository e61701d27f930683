"""The recipes that are compared with mergekit. `A`, `B`, `C` are models, `O` is their base.

With `dtype: bfloat16` mergekit rounds differences, products and sums to bf16 on the way. Here it computes in float32
and rounds once, as moesurgery always does; ROUNDED is what the other way gives.
"""

from __future__ import annotations


def _models(names: str, **parameters: object) -> str:
    """Return a `models:` list; a parameter that is a tuple has an entry for each model."""
    lines = ["models:"]
    for i, name in enumerate(names):
        own = ", ".join(f"{k}: {v[i] if isinstance(v, tuple) else v}" for k, v in parameters.items())
        lines += [f"  - model: {name}", *([f"    parameters: {{{own}}}"] if own else [])]
    return "\n".join(lines) + "\n"


def _method(name: str, base: str | None = None, **parameters: object) -> str:
    text = f"merge_method: {name}\n" + (f"base_model: {base}\n" if base else "")
    own = ", ".join(f"{k}: {v}" for k, v in parameters.items())
    return text + (f"parameters: {{{own}}}\n" if own else "") + "dtype: float32\nout_dtype: bfloat16\n"


# A gradient by filter, as in mergekit's own slerp example and hundreds of cards.
GRADIENT = """\
slices:
  - sources:
      - {model: A, layer_range: [0, 2]}
      - {model: B, layer_range: [0, 2]}
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
out_dtype: bfloat16
"""
FRANKEN = """\
slices:
  - sources: [{model: A, layer_range: [0, 2]}]
  - sources: [{model: B, layer_range: [1, 2]}]
  - sources:
      - model: A
        layer_range: [0, 2]
        parameters:
          scale:
            - {filter: o_proj, value: 0.5}
            - {filter: down_proj, value: 0.25}
            - value: 1.0
merge_method: passthrough
dtype: float32
out_dtype: bfloat16
"""
STACKED_TIES = """\
slices:
  - sources:
      - {model: A, layer_range: [0, 1], parameters: {weight: 0.7}}
      - {model: O, layer_range: [0, 1]}
    parameters: {density: 0.4}
  - sources:
      - {model: B, layer_range: [0, 2], parameters: {weight: [0.2, 0.6]}}
      - {model: O, layer_range: [0, 2]}
merge_method: ties
base_model: O
parameters: {density: [0.3, 0.9]}
dtype: float32
out_dtype: bfloat16
"""

EXACT: dict[str, str] = {
    "passthrough": _models("A", scale="[{filter: down_proj, value: 0.8164965809277261}, {value: 1.0}]")
    + _method("passthrough"),
    "linear": _models("AB", weight=(0.3, 0.7)) + _method("linear"),
    "linear-sum": _models("ABC", weight=(0.5, 0.4, -0.3)) + _method("linear", normalize="false"),
    "linear-gradient": _models("AB", weight=("[0.0, 1.0]", 0.5)) + _method("linear"),
    "slerp": _models("AB") + _method("slerp", "A", t=0.3),
    "slerp-reversed": _models("AB") + _method("slerp", "B", t=0.3),
    "slerp-gradient": GRADIENT,
    "nuslerp": _models("AB", weight=(0.3, 0.6)) + _method("nuslerp"),
    "nuslerp-base": _models("AB", weight=(0.3, 0.6)) + _method("nuslerp", "O"),
    "nuslerp-rows": _models("AB", weight=(0.3, 0.6))
    + _method("nuslerp", nuslerp_flatten="false", nuslerp_row_wise="true"),
    "nuslerp-columns": _models("AB", weight=(0.3, 0.6))
    + _method("nuslerp", "O", nuslerp_flatten="false", nuslerp_row_wise="false"),
    "multislerp": _models("ABC", weight=(0.3, 0.6, 0.2)) + _method("multislerp"),
    "multislerp-base": _models("AB", weight=(0.3, 0.6)) + _method("multislerp", "O", normalize_weights="false"),
    "karcher": _models("ABC") + _method("karcher"),
    "task_arithmetic": _models("AB", weight=(0.3, 0.6)) + _method("task_arithmetic", "O", **{"lambda": 0.9}),
    "task_arithmetic-normalize": _models("AB", weight=(0.3, 0.6)) + _method("task_arithmetic", "O", normalize="true"),
    "ties": _models("AB", weight=(0.3, 0.6), density=(0.5, 0.2)) + _method("ties", "O"),
    "ties-three": _models("ABC", weight=(0.3, 0.6, 0.4), density=("[1, 0.4]", 0.5, 0.3))
    + _method("ties", "O", normalize="false", int8_mask="true", **{"lambda": 1.2}),
    "ties-slices": STACKED_TIES,
    "dare_linear-all": _models("AB", weight=(0.3, 0.6)) + _method("dare_linear", "O"),
    "dare_ties-all": _models("AB", weight=(0.3, 0.6), density=1.0) + _method("dare_ties", "O"),
    "breadcrumbs": _models("AB", weight=(0.3, 0.6), density=0.6, gamma=0.1) + _method("breadcrumbs", "O"),
    "breadcrumbs_ties": _models("AB", weight=(0.3, 0.6), density=0.5, gamma=0.05) + _method("breadcrumbs_ties", "O"),
    "della-all": _models("AB", weight=(0.3, 0.6), density=1.0) + _method("della", "O"),
    "della_linear-all": _models("AB", weight=(0.3, 0.6), density=1.0) + _method("della_linear", "O"),
    "sce": _models("ABC") + _method("sce", "O", select_topk=0.4),
    "sce-all": _models("AB") + _method("sce", "O"),
    "model_stock": _models("ABC") + _method("model_stock", "O"),
    "model_stock-rows": _models("AB") + _method("model_stock", "O", filter_wise="true"),
    "nearswap": _models("B") + _method("nearswap", "A", t=0.1),
    "arcee_fusion": _models("B") + _method("arcee_fusion", "A"),
    "ram": _models("AB") + _method("ram", "O", epsilon=0.05),
    "ramplus_tl": _models("AB") + _method("ramplus_tl", "O", epsilon=0.05, r=0.3, alpha=0.4),
    "frankenmerge": FRANKEN,
}
# With every step rounded to bf16.
ROUNDED = {name: EXACT[name].replace("dtype: float32\nout_dtype", "dtype") for name in ("task_arithmetic", "ties")}
# Masks are drawn at random: compared by distribution.
RANDOM: dict[str, str] = {
    "dare_linear": _models("A", weight=1.0, density=0.4) + _method("dare_linear", "O"),
    "dare_ties": _models("A", weight=1.0, density=0.4) + _method("dare_ties", "O"),
    "della": _models("A", weight=1.0, density=0.5, epsilon=0.3) + _method("della", "O"),
    "della_linear": _models("A", weight=1.0, density=0.5, epsilon=0.3) + _method("della_linear", "O"),
}
MODELS = {"O": 0, "A": 1, "B": 2, "C": 3}
