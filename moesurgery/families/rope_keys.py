"""The keys of config.json that hold RoPE, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

# A config.json, or the part of one that has the language model's keys.
Config = Mapping[str, Any]


def stated_rules(config: Config) -> Mapping[str, Any] | None:
    """Return the rules that a config gives, if any: of both keys `rope_scaling` counts, as transformers 5.23 has it."""
    return config.get("rope_scaling") or config.get("rope_parameters")


def spelled_both_ways(config: Config) -> dict[str, Any]:
    """Return the keys by which readers of either spelling find the RoPE that `config` gives; empty for none.

    Readers of transformers 4's spelling (`rope_theta`, `rope_scaling`) do not look into transformers 5's
    (`rope_parameters`), nor the other way round: they take their type's default, and say nothing. Rules that differ
    by layer type have no flat spelling and stay as they are.
    """
    stated = stated_rules(config)
    if any(isinstance(value, Mapping) for value in (stated or {}).values()):
        return {}
    rules = copy.deepcopy(dict(stated or {}))
    if "rope_theta" not in rules and config.get("rope_theta") is None and not rules:
        return {}
    kind = rules.pop("rope_type", None) or rules.pop("type", None) or "default"
    rules.pop("type", None)
    theta = rules.pop("rope_theta", config.get("rope_theta"))
    fraction = rules.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    outside = {"rope_theta": theta, "partial_rotary_factor": fraction}
    outside = {key: value for key, value in outside.items() if value is not None}
    scaling = {"rope_type": kind, **rules}
    return {
        **outside,
        "rope_scaling": None if kind == "default" and not rules else scaling,
        "rope_parameters": {**scaling, **outside},
    }
