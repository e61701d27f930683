"""Weight rewrites that carry a trait from one type to another without changing the function.

Each says which value of which trait it turns into which, and how one tensor changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesurgery.decoders.rope import Rotary
from moesurgery.expr.elementwise import scale
from moesurgery.expr.nodes import Expr, Slice, reshape
from moesurgery.expr.tensors import Full, Linear, concat_last, slice_last

Tensors = list[tuple[str, Expr]]


@dataclass(frozen=True)
class Rewrite:
    """`trait` goes from `before` to `after`. `tensor(name, expr, traits)` gives what stands in the tensor's place.

    `then`: other traits that change with it. `note`: what a person should know. `rounds`: whether values change, which
    16-bit types hold with a rounding.
    """

    trait: str
    before: Any
    after: Any
    tensor: Callable[[str, Expr, Mapping[str, Any]], Tensors]
    then: Mapping[str, Any]
    note: str
    rounds: bool = False


def _queries_and_keys(name: str) -> bool:
    return name.rsplit(".", 2)[-2] in ("q_proj", "k_proj")


def _rotated(expr: Expr, traits: Mapping[str, Any], join: Callable[[Expr, int], Expr]) -> Expr:
    """Apply `join` to the rotated rows of each head of a weight [heads * d, H] or bias [heads * d]."""
    width: int = traits["head_dim"]
    rope: Rotary = traits["rope"]
    rotary = int(width * rope.fraction)
    inner = expr.shape[1] if len(expr.shape) == 2 else 1
    count = expr.shape[0] // width
    rows = reshape(expr, (count, width * inner))
    turned = reshape(join(slice_last(rows, 0, rotary * inner), inner), (count, rotary * inner))
    if rotary < width:
        turned = concat_last([turned, slice_last(rows, rotary * inner, width * inner)])
    return reshape(turned, expr.shape)


def _to_neighbours(rows: Expr, inner: int) -> Expr:
    """Turn entries (i, i + d/2) of each head into (2i, 2i + 1)."""
    half = rows.shape[1] // 2
    halves = (slice_last(rows, 0, half), slice_last(rows, half, 2 * half))
    return concat_last([reshape(part, (part.numel // inner, inner)) for part in halves])


def _to_halves(rows: Expr, inner: int) -> Expr:
    """Turn entries (2i, 2i + 1) of each head into (i, i + d/2)."""
    count, whole = rows.shape
    pairs = reshape(rows, (rows.numel // (2 * inner), 2 * inner))
    parts = (slice_last(pairs, 0, inner), slice_last(pairs, inner, 2 * inner))
    return concat_last([reshape(part, (count, whole // 2)) for part in parts])


def _interleave(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    return [(name, _rotated(expr, traits, _to_neighbours) if _queries_and_keys(name) else expr)]


def _separate(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    return [(name, _rotated(expr, traits, _to_halves) if _queries_and_keys(name) else expr)]


INTERLEAVE = Rewrite(
    "rope_pairs", "halves", "neighbours", _interleave, {}, "rows of q and k permuted: RoPE pairs neighbours there"
)
SEPARATE = Rewrite(
    "rope_pairs", "neighbours", "halves", _separate, {}, "rows of q and k permuted: RoPE pairs halves there"
)


def _split_qkv(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    if ".qkv_proj." not in name:
        return [(name, expr)]
    kv = traits["num_key_value_heads"] * traits["head_dim"]
    edges = (0, expr.shape[0] - 2 * kv, expr.shape[0] - kv, expr.shape[0])
    return [
        (name.replace("qkv_proj", f"{part}_proj"), Slice(expr, edges[i], edges[i + 1])) for i, part in enumerate("qkv")
    ]


SPLIT_QKV = Rewrite("qkv", "one", "apart", _split_qkv, {}, "q, k and v taken apart")


def _add_one(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    if not name.endswith("norm.weight"):
        return [(name, expr)]
    return [(name, Linear(((expr, 1.0), (Full(1.0, expr.dtype, expr.shape), 1.0)), expr.dtype))]


NORM_PLUS_ONE = Rewrite(
    "norm",
    "RMS with 1 + weight",
    "RMS",
    _add_one,
    {},
    "1 added to the weights of norms, with one rounding",
    rounds=True,
)


def _fold_embedding(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    if name == "lm_head.weight" and traits["tied"]:
        return []  # no loader reads it
    if not name.endswith("embed_tokens.weight"):
        return [(name, expr)]
    folded = [(name, scale(expr, traits["embedding_multiplier"]))]
    return [*folded, ("lm_head.weight", expr)] if traits["tied"] else folded


FOLD_EMBEDDING = Rewrite(
    "embedding_multiplier",
    None,
    1.0,
    _fold_embedding,
    {"tied": False},
    "the factor on embeddings folded into them, so that the head is a tensor of its own",
    rounds=True,
)


def _zero_bias(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    if name.rsplit(".", 2)[-2:] not in (["q_proj", "weight"], ["k_proj", "weight"], ["v_proj", "weight"]):
        return [(name, expr)]
    return [(name, expr), (name.removesuffix("weight") + "bias", Full(0.0, expr.dtype, expr.shape[:1]))]


ZERO_BIAS = Rewrite(
    "qkv_bias", False, True, _zero_bias, {}, "zero biases on q, k and v: not every engine lets this type go without"
)


def _untie(name: str, expr: Expr, traits: Mapping[str, Any]) -> Tensors:
    if name == "lm_head.weight":
        return []  # no loader reads it
    return [(name, expr), ("lm_head.weight", expr)] if name.endswith("embed_tokens.weight") else [(name, expr)]


UNTIE = Rewrite(
    "tied",
    True,
    False,
    _untie,
    {},
    "the head is written apart from the embedding: not every program makes it of the embedding in this type",
)
