"""Rotary position embedding and what depends on its rules, in the forms that configs keep them in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moesurgery.decoders.traits import ConflictError, Traits
from moesurgery.errors import CheckpointError
from moesurgery.families.rope_keys import Config, spelled_both_ways, stated_rules


class Rotary(NamedTuple):
    """Rotary position embedding: base, share of each head that is rotated, everything else as the config has it."""

    theta: float
    fraction: float
    rules: Mapping[str, Any]


# The rule that multiplies queries beyond the original context; it has a trait of its own.
QUERY_SCALING = "llama_4_scaling_beta"


@dataclass(frozen=True)
class Rope:
    """`rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5), whichever the config has.

    `fraction` is the default of `partial_rotary_factor`; None where the code always rotates whole heads. `rules` are
    the parameters of a config that has none. `by_layer_type`: `rope_parameters` is keyed by layer type, and the full
    layers' entry counts.
    """

    theta: float = 10000.0
    fraction: float | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)
    by_layer_type: bool = False

    keys = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")

    def read(self, config: Config) -> Rotary:
        given = stated_rules(config)
        chosen_rules = given or self.rules
        if self.by_layer_type and isinstance(chosen_rules.get("full_attention"), Mapping):
            chosen_rules = chosen_rules["full_attention"]
        rules = copy.deepcopy(dict(chosen_rules))
        # A type's own rules come with its own base.
        theta = rules.pop("rope_theta", config.get("rope_theta") if given or not self.rules else None)
        fraction = rules.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        rules.pop(QUERY_SCALING, None)
        if self.fraction is None and fraction not in (None, 1):
            raise CheckpointError(
                f"config.json: partial_rotary_factor is {fraction!r}, but code of this type rotates whole heads",
                "remove the key if the model was trained so; some engines read it, transformers does not",
            )
        default = 1.0 if self.fraction is None else self.fraction
        return Rotary(
            float(self.theta if theta is None else theta), float(default if fraction is None else fraction), rules
        )

    def write(self, value: Rotary, traits: Traits, config: Config) -> dict[str, Any]:
        if self.fraction is None and value.fraction != 1.0:
            raise ConflictError(f"{value.fraction:g} of each head here, always whole heads there")
        partial = {} if self.fraction is None else {"partial_rotary_factor": value.fraction}
        if self.by_layer_type and "rope_parameters" in config:
            rules = {**value.rules, "rope_theta": value.theta, **partial}
            return {"rope_parameters": {"full_attention": rules, "sliding_attention": dict(rules)}}
        flat = {"rope_theta": value.theta, "rope_scaling": dict(value.rules) or None, **partial}
        return {**flat, **spelled_both_ways(flat)}


@dataclass(frozen=True)
class QueryScaling:
    """Queries are multiplied by 1 + beta log(1 + floor(position / original context)): 0 where that has no effect."""

    original: int  # the default original context
    context: int  # the default context

    keys = ()

    def read(self, config: Config) -> float:
        rules = stated_rules(config)
        beta = 0.1 if rules is None else rules.get(QUERY_SCALING) or 0.0
        start = (rules or {}).get("original_max_position_embeddings") or self.original
        longest = config.get("max_position_embeddings") or self.context
        return 0.0 if longest <= start else float(beta)

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        raise NotImplementedError("no type to be written has it")
