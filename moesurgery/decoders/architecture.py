"""The words in which the table of architectures is written: FFN, shared expert, mixture, and a type as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesurgery.decoders.traits import Codec, ConflictError, Traits, whole_number
from moesurgery.families.family import ExpertAxisTensor, Family
from moesurgery.families.rope_keys import Config
from moesurgery.families.table import by_model_type

# What each trait is, as the beginning of a sentence.
TRAITS: dict[str, str] = {
    "attention": "the kind of attention",
    "mixers": "what mixes positions besides attention",
    "num_key_value_heads": "key and value heads",
    "head_dim": "the width of a head",
    "max_position_embeddings": "the longest context",
    "hidden_act": "the activation",
    "norm_eps": "the epsilon of norms",
    "tied": "tied embeddings",
    "initializer_range": "the standard deviation of initial weights",
    "pad": "the padding token",
    "bos": "the first token",
    "eos": "the last token",
    "dropout": "dropout in attention",
    "qkv_bias": "biases on q, k and v",
    "o_bias": "a bias on attention's output projection",
    "mlp_bias": "biases in the FFN",
    "head_bias": "a bias on the output head",
    "qk_norm": "norms on q and k",
    "qkv": "the projections q, k and v",
    "sinks": "attention sinks",
    "output_gate": "a gate on attention's output",
    "rope_pairs": "which entries of a head RoPE pairs",
    "rope": "rotary position embedding",
    "query_scaling": "scaling of queries beyond the original context",
    "layers": "attention by layer",
    "attention_multiplier": "the factor on attention scores",
    "embedding_multiplier": "the factor on embeddings",
    "residual_multiplier": "the factor on residual branches",
    "logit_divisor": "the divisor of logits",
    "logit_multiplier": "the factor on logits",
    "norm": "the kind of norm",
    "block": "where the norms stand",
    "causal": "causal attention",
}

# Sizes that mean the same everywhere, under the same key.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Ffn:
    """The modules of a dense FFN: down(act(gate x) * up x). `gate_up` holds gate's rows, then up's."""

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(m for m in (self.gate_up, self.gate, self.up, self.down) if m)

    @property
    def root(self) -> str:
        """The module that holds them all: what it reads is what a router in its place would read."""
        return self.down.rpartition(".")[0]


MLP = Ffn("mlp.down_proj", gate="mlp.gate_proj", up="mlp.up_proj")


@dataclass(frozen=True)
class SharedExpertNames:
    """A shared expert of a mixture, added to the routed sum.

    `half`: it is multiplied by the sigmoid of a gate, 1/2 where the gate is zero. `width` is the config key of its
    width; `count`, instead, the key of a multiple of the experts' width; neither: it is as wide as an expert.
    `optional`: 0 there means that there is none; otherwise it must exist, with a zero down-projection if need be.
    """

    module: str
    gate: str | None = None
    width: str | None = None
    count: str | None = None
    optional: bool = False
    fused: bool = False  # `input_linear` holds gate's rows, then up's (Granite)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factor(self) -> float:
        """What the shared expert's output is multiplied by, with its gate at zero."""
        return 0.5 if self.gate else 1.0


@dataclass(frozen=True)
class Moe:
    """What a mixture's config needs besides the counts; names and routing stand in the family table.

    `width` is the key of an expert's width. `per_layer` are lists with one value per layer. `input_gates`: gates
    multiply the experts' input, not their output, so the routed part is not linear in them.
    """

    width: str
    shared: SharedExpertNames | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[str, Any] = field(default_factory=dict)
    input_gates: bool = False


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: how its config keeps the traits, and how its layers are stored.

    `modules` are what every layer has besides its FFN, relative to the layer; `some` what only some layers have.
    `own` are further config keys that mean nothing in another type.
    """

    model_type: str
    causal_lm: str
    traits: Mapping[str, Codec]
    modules: tuple[str, ...]
    ffn: Ffn | None = None
    moe: Moe | None = None
    some: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """All config keys that belong to the type."""
        return frozenset(self.own).union(*(codec.keys for codec in self.traits.values()))

    @property
    def family(self) -> Family:
        """The entry of the family table that says how a mixture routes and what its tensors are called."""
        return by_model_type(self.model_type)[0]

    @property
    def router(self) -> ExpertAxisTensor:
        """A mixture's router as it is published."""
        return next(along for along in self.family.along if along.role == "router")

    @property
    def correction(self) -> ExpertAxisTensor | None:
        """A mixture's selection bias, which loaders make up where it is missing."""
        return next((along for along in self.family.along if along.role == "correction_bias"), None)

    def read(self, config: Config) -> dict[str, Any]:
        """Return all traits of a config of this type. Raises CheckpointError where it makes no sense."""
        for size in SIZES:
            whole_number(config, size)
        return {name: codec.read(config) for name, codec in self.traits.items()}

    def write(self, traits: Traits, config: Config) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the config keys that give the traits, and what cannot be given: trait -> reason.

        `config` is the one from which the traits were read; how it writes RoPE is kept.
        """
        written: dict[str, Any] = {}
        conflicts: dict[str, str] = {}
        for name, value in traits.items():
            codec = self.traits.get(name)
            if codec is None:
                conflicts[name] = f"{value} here, unknown there"
                continue
            try:
                new_keys = codec.write(value, traits, config)
            except ConflictError as conflict:
                conflicts[name] = str(conflict)
                continue
            for key, new in new_keys.items():
                if key in written and written[key] != new:
                    conflicts[name] = f"{key} is one switch for several things there, and they differ here"
                written[key] = new
        return written, conflicts
