"""Which dense type becomes which mixture exactly: every pair that was measured, and what makes it exact.

A pair is a config rewrite and weight rewrites. The config rewrite follows from the two entries of `architectures`:
every trait of the source is written as the target keeps it. What the target cannot hold must be carried by one of
the pair's `rewrites`; otherwise this very model would lose something, and the pair is refused for it. The way back has
a table of its own (`dense`), since a mixture's config need not come from a dense one's.

`tests/unit/surgery/test_upcycle_pairs.py` runs every pair: written, loaded by transformers, logits equal beyond
windows and original contexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moesurgery.decoders.architecture import SIZES, TRAITS, Architecture
from moesurgery.decoders.layer_types import Layers
from moesurgery.decoders.lookup import require_architecture
from moesurgery.decoders.rewrites import (
    FOLD_EMBEDDING,
    INTERLEAVE,
    NORM_PLUS_ONE,
    SEPARATE,
    SPLIT_QKV,
    UNTIE,
    ZERO_BIAS,
    Rewrite,
)
from moesurgery.families.clients import CLIENTS

# Types of which some client does not make the head of the embedding.
UNTIED = frozenset().union(*(client.heads for client in CLIENTS.values()))


@dataclass(frozen=True)
class Conversion:
    """What a pair does to one model: the config, and the weight rewrites with the traits they read."""

    config: dict[str, Any]
    rewrites: tuple[Rewrite, ...]
    traits: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One dense type and one mixture into which it goes.

    `windows` is False where the target's config could hold windows but engines other than transformers ignore them.
    """

    source_type: str
    target_type: str
    rewrites: tuple[Rewrite, ...] = ()
    windows: bool = True

    @cached_property
    def source(self) -> Architecture:
        return require_architecture(self.source_type)

    @cached_property
    def target(self) -> Architecture:
        return require_architecture(self.target_type)

    def conversion(self, config: Mapping[str, Any]) -> tuple[Conversion, list[str]]:
        """Return what becomes of a config of the source type, and the reasons (none, if exact) to refuse it."""
        before = self.source.read(config)
        after = dict(before)
        used = []
        for rewrite in self.rewrites:
            if rewrite.before is None or after[rewrite.trait] == rewrite.before:
                after.update({rewrite.trait: rewrite.after, **rewrite.then})
                used.append(rewrite)
        if after["tied"] is True and self.target_type in UNTIED:
            after["tied"] = False
            used.append(UNTIE)
        written, conflicts = self.target.write(after, config)
        layers: Layers = after["layers"]
        if not self.windows and any(layer.window is not None for layer in layers):
            conflicts["layers"] = f"a sliding window here, which engines for {self.target_type} ignore"
        # A key that only the new type reads has meant nothing so far; loaders read `layer_types` for every type.
        dropped = self.source.keys | self.target.keys | {"layer_types"}
        kept = {k: v for k, v in config.items() if k not in dropped or k in SIZES}
        reasons = [f"{TRAITS.get(trait, trait)}: {reason}" for trait, reason in conflicts.items()]
        return Conversion({**kept, **written}, tuple(used), before), reasons


def _to(source: str, *targets: str | Pair, rewrites: tuple[Rewrite, ...] = ()) -> tuple[Pair, ...]:
    return tuple(t if isinstance(t, Pair) else Pair(source, t, rewrites) for t in targets)


# In order of preference: without `--to`, the first that is exact for the model is taken.
PAIRS: tuple[Pair, ...] = (
    *_to("llama", "mixtral", Pair("llama", "qwen2_moe", (ZERO_BIAS,)), "solar_open", "glm4_moe", "granitemoe"),
    *_to("llama", "granitemoeshared"),
    *_to("llama", "ernie4_5_moe", "llama4_text", rewrites=(INTERLEAVE,)),
    *_to("mistral", "mixtral", Pair("mistral", "qwen2_moe", (ZERO_BIAS,), windows=False)),
    *_to("mistral", "solar_open", "glm4_moe", "granitemoe"),
    *_to("ministral", "mixtral"),
    *_to("ministral3", "mixtral", Pair("ministral3", "qwen2_moe", (ZERO_BIAS,), windows=False), "solar_open"),
    *_to("qwen2", "qwen2_moe", "glm4_moe"),
    *_to("qwen3", "qwen3_moe", "dots1", "glm4_moe"),
    *_to("qwen3_5_text", "qwen3_5_moe_text"),
    *_to("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"),
    *_to("granite_swa", "granitemoe_swa"),
    *_to("olmo2", "flex_olmo"),
    *_to("olmo3", "flex_olmo"),
    *_to("phi3", "mixtral", "solar_open", "glm4_moe", rewrites=(SPLIT_QKV,)),
    *_to("gemma", "mixtral", rewrites=(NORM_PLUS_ONE, FOLD_EMBEDDING)),
    *_to("gemma", "granitemoe", rewrites=(NORM_PLUS_ONE,)),
    *_to("glm", "glm4_moe", rewrites=(SEPARATE,)),
    *_to("ernie4_5", "ernie4_5_moe", Pair("ernie4_5", "mixtral", (SEPARATE,))),
    *_to("helium", "ernie4_5_moe"),
    *_to("hunyuan_v1_dense", "hunyuan_v1_moe"),
    *_to("cohere", "cohere2_moe"),
    *_to("cohere2", "cohere2_moe"),
    *_to("seed_oss", "qwen2_moe", "solar_open", "glm4_moe"),
    *_to("internlm3", "mixtral", Pair("internlm3", "qwen2_moe", (ZERO_BIAS,)), "solar_open"),
    *_to("iquestcoder", "mixtral", Pair("iquestcoder", "qwen2_moe", (ZERO_BIAS,)), "solar_open"),
    *_to("smollm3", "llama4_text", rewrites=(INTERLEAVE,)),
    *_to("lfm2", "lfm2_moe"),
    *_to("youtu", "deepseek_v3", "glm4_moe_lite"),
)

# Dense types for which no exact pair was found, and why.
NO_PAIR: dict[str, str] = {
    "apertus": "its FFN has no gate, and its activation is its own",
    "arcee": "its FFN has no gate",
    "cwm": "some of its layers have a window and some have not, and no mixture with its attention keeps that apart",
    "exaone4": "its norms stand after attention and FFN, with norms on q and k",
    "gemma2": "it has norms before and after attention and FFN, and caps logits",
    "gemma3_text": "it has norms before and after attention and FFN",
    "glm4": "it has norms before and after attention and FFN; GLM-4-MoE has only those before",
    "jais2": "its FFN has no gate, and its norms are LayerNorms",
    "minicpm3": "no mixture has its attention's shapes",
    "nanochat": "its norms have no weights",
    "nemotron": "its FFN has no gate, and its norms are LayerNorms with 1 + weight",
    "olmo": "its LayerNorms have no weights",
    "stablelm": "its norms are LayerNorms with biases",
    "starcoder2": "its FFN has no gate, and its norms are LayerNorms with biases",
}


def pairs_from(model_type: str) -> tuple[Pair, ...]:
    """Return the pairs of a dense type, the preferred one first."""
    return tuple(pair for pair in PAIRS if pair.source_type == model_type)


def target_types() -> tuple[str, ...]:
    """Return all mixtures that some dense type becomes."""
    return tuple(dict.fromkeys(pair.target_type for pair in PAIRS))


def source_types() -> tuple[str, ...]:
    """Return all dense types that become some mixture."""
    return tuple(dict.fromkeys(pair.source_type for pair in PAIRS))
