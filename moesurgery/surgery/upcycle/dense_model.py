"""A dense model taken apart: the FFN of every layer, and proof that nothing else is in the checkpoint.

What the source type has no place for (a bias that its config denies, a second head, quantised weights) would be lost
or misread in the mixture, so it is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.decoders.architecture import Architecture
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Expr, Slice
from moesurgery.families.tensor_names import find_layer
from moesurgery.plan.plan import Plan

_CONTAINERS = ("layers",)  # as all dense types call the list of their layers
_OUTSIDE = re.compile(r"(.*\.)?(embed_tokens|norm|embedding_norm|lm_head)\.weight")
_BUFFERS = ("rotary_emb.inv_freq", "inv_freq")

# Which trait allows a bias on which module.
_BIAS_TRAITS = {
    "qkv_bias": ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "o_bias": ("o_proj",),
    "conv_bias": ("conv", "in_proj", "out_proj"),
    "head_bias": ("lm_head",),
}


@dataclass(frozen=True)
class FfnTensors:
    """One FFN: gate and up [I, H], down [H, I]."""

    gate: Expr
    up: Expr
    down: Expr

    @property
    def width(self) -> int:
        return self.gate.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate.shape[1]


@dataclass(frozen=True)
class DenseModel:
    """A dense plan by parts. `prefix` is the name before a layer's number.

    `others` are all tensors but the FFNs', `layer_of` the layer of each FFN tensor, `dropped` what no type reads.
    """

    plan: Plan
    architecture: Architecture
    traits: Mapping[str, Any]
    prefix: str
    layers: tuple[FfnTensors, ...]
    others: Mapping[str, Expr]
    layer_of: Mapping[str, int]
    dropped: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.plan.checkpoint.source.identity


def dense_model_of(plan: Plan, architecture: Architecture) -> DenseModel:
    """Find the FFNs of a dense model and account for every other tensor.

    Raises CheckpointError where a tensor is missing, RefusedError where one has no place.
    """
    traits = architecture.read(plan.config)
    assert architecture.ffn is not None
    count = plan.config["num_hidden_layers"]
    ffn_names: list[dict[str, str]] = [{} for _ in range(count)]
    others: dict[str, Expr] = {}
    prefixes: set[str] = set()
    dropped, foreign = [], []
    for name, expr in plan.tensors.items():
        in_layer = find_layer(name, _CONTAINERS)
        if name.endswith(_BUFFERS):
            dropped.append(name)
        elif in_layer is None:
            if _OUTSIDE.fullmatch(name) or (name.endswith("lm_head.bias") and traits["head_bias"]):
                others[name] = expr
            else:
                foreign.append(name)
        elif in_layer[1] >= count:
            foreign.append(name)
        else:
            prefix, layer, rest = in_layer
            prefixes.add(prefix)
            module = rest.removesuffix(".weight")
            if module in architecture.ffn.modules and rest.endswith(".weight"):
                ffn_names[layer][module] = name
            elif _has_place(rest, architecture, traits):
                others[name] = expr
            else:
                foreign.append(name)
    if foreign:
        raise RefusedError(
            f"upcycle: {len(foreign)} tensors have no place in a {architecture.model_type} as its config describes it:"
            f" {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}",
            "a mixture would lose them; correct config.json, or remove them if nothing needs them",
        )
    if len(prefixes) != 1:
        raise CheckpointError(f"upcycle: layers stand under {', '.join(sorted(prefixes)) or 'no name'}")
    layers = []
    for i, names in enumerate(ffn_names):
        missing = [m for m in architecture.ffn.modules if m not in names]
        if missing:
            raise CheckpointError(f"upcycle: layer {i}: {missing[0]}.weight is missing")
        layers.append(_ffn(plan, architecture, names))
    _check_complete(others, architecture, traits, count)
    layer_of = {name: i for i, names in enumerate(ffn_names) for name in names.values()}
    return DenseModel(plan, architecture, traits, prefixes.pop(), tuple(layers), others, layer_of, tuple(dropped))


def _has_place(rest: str, architecture: Architecture, traits: Mapping[str, Any]) -> bool:
    """Whether a layer of the type, with these traits, has the tensor `rest`."""
    modules = (*architecture.modules, *architecture.some)
    if rest in modules or (rest.endswith(".weight") and rest.removesuffix(".weight") in modules):
        return True
    return rest.endswith(".bias") and rest.removesuffix(".bias") in modules and _may_have_bias(rest, traits)


def _may_have_bias(rest: str, traits: Mapping[str, Any]) -> bool:
    module = rest.removesuffix(".bias").rpartition(".")[2]
    return any(traits.get(trait) and module in modules for trait, modules in _BIAS_TRAITS.items())


def _check_complete(
    others: Mapping[str, Expr], architecture: Architecture, traits: Mapping[str, Any], count: int
) -> None:
    """Every layer must have its weights, and the biases that the config promises: loaders would make them up."""
    present = Counter(in_layer[2] for name in others if (in_layer := find_layer(name, _CONTAINERS)))
    for module in architecture.modules:
        if present[module] + present[f"{module}.weight"] != count:
            raise CheckpointError(f"upcycle: {count} layers, but {present[f'{module}.weight']} have {module}.weight")
        leaf = module.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") and "q_lora_rank" not in traits:
            promised = any(traits[trait] and leaf in _BIAS_TRAITS[trait] for trait in ("qkv_bias", "o_bias"))
            if present[f"{module}.bias"] != count * promised:
                raise CheckpointError(
                    f"upcycle: config.json promises {module}.bias in {count} layers,"
                    f" {present[f'{module}.bias']} have it"
                )


def _ffn(plan: Plan, architecture: Architecture, names: Mapping[str, str]) -> FfnTensors:
    assert architecture.ffn is not None
    parts = {module: plan.tensors[name] for module, name in names.items()}
    for module, name in names.items():
        if parts[module].dtype not in PLAIN_FLOATS:
            raise RefusedError(
                f"upcycle: {name} is {parts[module].dtype}: a quantised FFN cannot be taken apart",
                "start from the model in its original precision",
            )
    down = parts[architecture.ffn.down]
    if architecture.ffn.gate_up:
        both = parts[architecture.ffn.gate_up]
        half = both.shape[0] // 2
        ffn = FfnTensors(Slice(both, 0, half), Slice(both, half, 2 * half), down)
    else:
        ffn = FfnTensors(parts[architecture.ffn.gate], parts[architecture.ffn.up], down)
    hidden = plan.config["hidden_size"]
    if ffn.gate.shape != ffn.up.shape or ffn.gate.shape[1:] != (hidden,) or ffn.down.shape != (hidden, ffn.width):
        raise CheckpointError(
            f"upcycle: {names[architecture.ffn.down]} has shape {list(ffn.down.shape)}, its gate"
            f" {list(ffn.gate.shape)}, and the hidden size is {hidden}"
        )
    return ffn
