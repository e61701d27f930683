"""The tensors of one upcycled layer, from dense FFNs and a design.

Copies and contiguous slices of gate and up are byte ranges of the source; a factor goes on down-projections alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesurgery.decoders.architecture import Moe, SharedExpertNames
from moesurgery.expr.elementwise import cast, scale
from moesurgery.expr.nodes import Expr, Slice, concat, stack
from moesurgery.expr.random import random_key
from moesurgery.expr.tensors import Full, concat_last, slice_last, transpose
from moesurgery.families.family import Layout
from moesurgery.surgery.upcycle.changed_neurons import NeuronSlice, NeuronSliceLast, Noisy, Redrawn, partition
from moesurgery.surgery.upcycle.dense_model import FfnTensors
from moesurgery.surgery.upcycle.design import Design


@dataclass(frozen=True)
class Ingredient:
    """A dense FFN as one group of experts uses it. `noise` is absolute, or in standard deviations (`relative`)."""

    ffn: FfnTensors
    scale: float = 1.0
    noise: float = 0.0
    relative: bool = False


@dataclass(frozen=True)
class Changes:
    """What is random about the experts. `seed` is the recipe's."""

    seed: int
    split_key: str  # names the split: equal for all tensors of a layer
    reinit: float = 0.0


def routed_tensors(
    prefix: str, groups: Sequence[Ingredient], design: Design, layout: Layout, changes: Changes
) -> dict[str, Expr]:
    """Return the expert tensors of the layer whose names begin with `prefix`. `groups` repeat in turn."""
    tensors: dict[str, Expr] = {}
    experts = [
        _expert(f"{prefix}experts.{e}", groups[e // design.parts % len(groups)], e % design.parts, design, changes)
        for e in range(design.experts)
    ]
    for part in layout.parts:
        if layout.kind == "per-expert":
            for e, expert in enumerate(experts):
                tensors[f"{prefix}{part.path.replace('#', str(e))}.weight"] = expert[part.role]
            continue
        suffix = "" if "experts" in part.path else ".weight"
        if part.role == "down":
            matrices = [expert["down"] for expert in experts]
            matrices = [transpose(m) for m in matrices] if part.order == "io" else matrices
        elif part.order == "io":
            matrices = [concat_last([transpose(x["gate"]), transpose(x["up"])]) for x in experts]
        else:
            matrices = [concat([x["gate"], x["up"]]) for x in experts]
        tensors[f"{prefix}{part.path}{suffix}"] = stack(matrices)
    return tensors


def _expert(name: str, source: Ingredient, part: int, design: Design, changes: Changes) -> dict[str, Expr]:
    """Return gate and up [I/parts, H] and down [H, I/parts] of one expert."""
    ffn = source.ffn
    size = ffn.width // design.parts
    by_role: dict[str, Expr]
    if design.split:
        parts = partition(ffn.gate, design.split, design.parts, random_key(changes.seed, changes.split_key))
        by_role = {
            "gate": NeuronSlice(ffn.gate, parts, design.parts, part),
            "up": NeuronSlice(ffn.up, parts, design.parts, part),
            "down": NeuronSliceLast(ffn.down, parts, design.parts, part),
        }
    else:
        by_role = {
            "gate": _slice(ffn.gate, part * size, size),
            "up": _slice(ffn.up, part * size, size),
            "down": slice_last(ffn.down, part * size, (part + 1) * size),
        }
    count = round(changes.reinit * size)
    for role, expr in by_role.items():
        if count:
            choice = random_key(changes.seed, f"{name}/neurons")
            drawn = random_key(changes.seed, f"{name}.{role}/drawn")
            expr = Redrawn(expr, 1 if role == "down" else 0, count, choice, drawn)
        if source.noise:
            expr = Noisy(expr, source.noise, source.relative, random_key(changes.seed, f"{name}.{role}/noise"))
        if role == "down":
            expr = scaled(expr, source.scale * design.routed_factor)
        by_role[role] = expr
    return by_role


def _slice(expr: Expr, start: int, count: int) -> Expr:
    return expr if count == expr.shape[0] else Slice(expr, start, start + count)


def scaled(expr: Expr, factor: float) -> Expr:
    """Return `expr * factor`; plain zeros for 0."""
    return Full(0.0, expr.dtype, expr.shape) if factor == 0 else scale(expr, factor)


def shared_width(design: Design, moe: Moe, width: int) -> int:
    """Return how wide the shared expert is: a whole FFN if it carries some of it, an expert otherwise, 0 for none."""
    if moe.shared is None or (not design.share and moe.shared.optional):
        return 0
    return width if design.share else width // design.parts


def shared_settings(design: Design, moe: Moe, width: int) -> dict[str, int | str]:
    """Return the config keys of the shared expert."""
    shared = moe.shared
    if shared is None:
        return {}
    size = shared_width(design, moe, width)
    settings: dict[str, int | str] = dict(shared.settings) if size else {}
    if shared.width:
        settings[shared.width] = size
    if shared.count:
        settings[shared.count] = size // (width // design.parts)
    return settings


# Weights of a gate that is 1/2 for every token: so small that its sigmoid is 1/2 to the last bit of float32, and no
# zeros, since llama.cpp computes silu(x) / x. The smallest of float16 is near enough.
EVEN_GATE = {"F32": 2.0**-60, "BF16": 2.0**-60, "F16": 2.0**-24, "F64": 2.0**-60}


def shared_tensors(prefix: str, source: Ingredient, design: Design, moe: Moe, seed: int) -> dict[str, Expr]:
    """Return the shared expert's tensors: its share of the FFN, or one without effect where a type must have one."""
    shared = moe.shared
    size = shared_width(design, moe, source.ffn.width)
    if shared is None or not size:
        return {}
    ffn = source.ffn
    parts = {
        "gate": _slice(ffn.gate, 0, size),
        "up": _slice(ffn.up, 0, size),
        "down": slice_last(ffn.down, 0, size),
    }
    if source.noise:
        for role, expr in parts.items():
            parts[role] = Noisy(expr, source.noise, source.relative, random_key(seed, f"{prefix}shared.{role}/noise"))
    parts["down"] = scaled(parts["down"], source.scale * design.share / shared.factor)
    tensors = _shared_names(prefix, shared, parts)
    if shared.gate:
        tensors[f"{prefix}{shared.gate}.weight"] = Full(EVEN_GATE[ffn.gate.dtype], ffn.gate.dtype, (1, ffn.hidden))
    return tensors


def _shared_names(prefix: str, shared: SharedExpertNames, parts: Mapping[str, Expr]) -> dict[str, Expr]:
    module = prefix + shared.module
    if shared.fused:
        return {
            f"{module}.input_linear.weight": concat([parts["gate"], parts["up"]]),
            f"{module}.output_linear.weight": parts["down"],
        }
    return {f"{module}.{role}_proj.weight": parts[role] for role in ("gate", "up", "down")}


def as_type(tensors: Mapping[str, Expr], dtype: str) -> dict[str, Expr]:
    """Return all tensors in one dtype."""
    return {name: cast(expr, dtype) for name, expr in tensors.items()}
