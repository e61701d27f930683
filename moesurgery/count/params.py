"""Exact parameter counts from headers alone: totals, what is active per token, where it sits.

A parameter is what transformers counts as one: tied matrices once, whether stored once or twice; quantised
weights by their logical number; no buffers, no quantisation scales. Prediction (MTP) layers, router selection
biases and integer tables are listed apart and are not in the total.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesurgery.checkpoint.dtypes import INTEGERS, element_count
from moesurgery.errors import RefusedError
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, HasShape, check_stated_top_k
from moesurgery.families.layer_stack import runs_of
from moesurgery.families.quantised import method

_SCHEMA_VERSION = 1


@dataclass
class Counts:
    """What a model holds. `active` is None where the experts of an unknown family cannot be told apart.

    `active` has one entry per convention in use: `all` (Mixtral, Qwen1.5, OLMoE), `without_input_embedding`
    (gpt-oss: an untied input embedding is a table look-up) and `without_embeddings` (MiniMax, GLM-4.5:
    neither embedding nor head). `executed` counts a block once for every position that runs it: more than `all` where
    blocks are tied (`num_blocks` of them are stored), the same elsewhere.
    """

    family: str | None
    model_type: str
    total: int
    active: dict[str, int] | None
    executed: int | None
    num_layers: int | None
    num_blocks: int | None
    num_moe_layers: int
    num_experts: int | None
    total_experts: int | None
    top_k: int | None
    components: dict[str, int]
    not_counted: dict[str, int]
    stored_bytes: int
    bytes_by_dtype: dict[str, int]
    memory_bytes: int
    tied_embeddings: bool
    quantisation: str | None
    by_layer: list[dict[str, Any]] = field(default_factory=list)
    unrecognised: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the documented JSON form; `total_params`, `active_params` and the rest of the schema."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "family": self.family,
            "model_type": self.model_type,
            "total_params": self.total,
            "active_params": self.active,
            "executed_params": self.executed,
            "num_layers": self.num_layers,
            "num_blocks": self.num_blocks,
            "num_moe_layers": self.num_moe_layers,
            "num_experts": self.num_experts,
            "total_experts": self.total_experts,
            "top_k": self.top_k,
            "components": self.components,
            "not_counted": self.not_counted,
            "stored_bytes": self.stored_bytes,
            "bytes_by_dtype": self.bytes_by_dtype,
            "memory_bytes": self.memory_bytes,
            "tied_embeddings": self.tied_embeddings,
            "quantisation": self.quantisation,
            "unrecognised": self.unrecognised,
        }


def count_params(anatomy: Anatomy, tensors: Mapping[str, HasShape], top_k: int | None = None) -> Counts:
    """Count a model by its headers, with `top_k` experts active (the config's number by default).

    Raises RefusedError for a top-k below 1 or above the number of experts, CheckpointError where it is the config's.
    """
    settings = anatomy.settings
    components: Counter[str] = Counter()
    not_counted: Counter[str] = Counter()
    by_dtype: Counter[str] = Counter()
    layers: dict[int, Counter[str]] = defaultdict(Counter)
    tied = _tied_head(anatomy, tensors)
    for name, info in tensors.items():
        component, count = anatomy.component[name], anatomy.parameters[name]
        by_dtype[info.dtype] += info.nbytes
        if component == parts.MTP:
            not_counted["mtp"] += count
        elif name in anatomy.buffers:
            kind = "router_bias" if component == parts.ROUTER else "buffers"
            not_counted["integer_tables" if info.dtype in INTEGERS else kind] += anatomy.buffers[name]
        elif name in tied:
            not_counted["tied_copies"] += count
        elif count == 0:
            not_counted["quantisation"] += element_count(info.shape)
        else:
            components[component] += count
            if name in anatomy.layer and component != parts.VISION:
                layers[anatomy.layer[name]][component] += count
    stored = sum(by_dtype.values())
    duplicates = sum(tensors[n].nbytes for n in tied)
    experts, k, active = _active(anatomy, components, top_k, tied_embeddings=parts.HEAD not in components)
    tie_map = settings.tie_map
    moe_blocks = {(b.root, b.layer) for b in anatomy.main_blocks}
    moe_layers = {layer for _, layer in moe_blocks}
    return Counts(
        family=anatomy.family.name if anatomy.family else None,
        model_type=anatomy.model_type,
        total=sum(components.values()),
        active=active,
        executed=None if active is None else active["all"] + _repeated(anatomy, experts, k),
        num_layers=settings.layers,
        num_blocks=settings.layers if tie_map is None else len(set(tie_map)),
        num_moe_layers=len(moe_blocks) if tie_map is None else sum(source in moe_layers for source in tie_map),
        num_experts=experts,
        total_experts=None if experts is None else experts * len(moe_blocks),
        top_k=k,
        components={c: components[c] for c in (*parts.MAIN_COMPONENTS, parts.VISION) if components[c]},
        not_counted={key: value for key, value in sorted(not_counted.items()) if value},
        stored_bytes=stored,
        bytes_by_dtype=dict(sorted(by_dtype.items())),
        memory_bytes=stored - duplicates,
        tied_embeddings=parts.HEAD not in components and parts.EMBEDDING in components,
        quantisation=method(anatomy.config),
        by_layer=[{"layer": i, "params": sum(c.values()), "components": dict(c)} for i, c in sorted(layers.items())],
        unrecognised=anatomy.unrecognised,
    )


def _repeated(anatomy: Anatomy, experts: int | None, top_k: int | None) -> int:
    """Return the active parameters of tied blocks for each time but the first that they are run."""
    routed = {m.name for block in anatomy.main_blocks for m in block.members if m.part}
    total = 0
    for name, runs in runs_of(anatomy).items():
        count = (runs - 1) * anatomy.parameters[name]
        total += count * (top_k or 0) // (experts or 1) if name in routed else count
    return total


def _tied_head(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> set[str]:
    """Return stored output matrices that the config ties to the embedding: they are the same parameters."""
    # A model that wraps a language model says it for both: what its text settings say is a default.
    places = (anatomy.config, *anatomy.settings.sections())
    flags = [part.get("tie_word_embeddings", part.get("tie_embedding")) for part in places]
    if next((f for f in flags if f is not None), False) is not True:
        return set()
    shapes = {tensors[n].shape for n, c in anatomy.component.items() if c == parts.EMBEDDING}
    return {n for n, c in anatomy.component.items() if c == parts.HEAD and tensors[n].shape in shapes}


def _active(
    anatomy: Anatomy, components: Mapping[str, int], top_k: int | None, *, tied_embeddings: bool
) -> tuple[int | None, int | None, dict[str, int] | None]:
    text = sum(count for component, count in components.items() if component != parts.VISION)
    if anatomy.blocks:
        uneven = anatomy.settings.first(("block_configs",)) is not None
        experts, k = None if uneven else anatomy.experts, top_k or anatomy.settings.top_k
        least = min(block.experts for block in anatomy.main_blocks)
        if top_k is not None and not 1 <= top_k <= least:
            raise RefusedError(f"top-k {top_k} is impossible: each layer has {least} experts")
        if k is None:
            return experts, None, None
        if top_k is None and not uneven:
            check_stated_top_k(anatomy)
        for block in anatomy.main_blocks:
            routed = sum(anatomy.parameters[m.name] for m in block.members if m.part)
            chosen = routed * k // block.experts if block.of is None or block.of.text else 0
            text -= routed - chosen
    elif anatomy.is_moe:
        return None, None, None
    elif top_k is not None:
        raise RefusedError("this is a dense model: it has no experts, so no top-k")
    else:
        experts, k = 0, 0
    embedding, head = components.get(parts.EMBEDDING, 0), components.get(parts.HEAD, 0)
    return (
        experts,
        k,
        {
            "all": text,
            "without_input_embedding": text if tied_embeddings else text - embedding,
            "without_embeddings": text - embedding - head,
        },
    )
