"""The numbers of config.json that matter to surgery, read and edited as raw JSON.

config.json is never passed through `AutoConfig`, which renames keys and drops others. Where several
aliases of one key are present, all of them are read as one and edited together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.family import Family, Flag
from moesurgery.families.layer_keys import DEPTH_LISTS, KEYED
from moesurgery.families.quantised import QUANTISATION_KEYS

# The names under which config.json files give the same number. All that are present are read and edited.
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "num_selects",
    "router_topk",
)
LAYERS_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "encoder_layers")
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
DECODER_LAYERS_KEYS = ("num_decoder_layers", "decoder_layers")
HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "dim")
GROUPS_KEYS = ("n_group", "num_expert_group", "n_groups")
TOP_GROUPS_KEYS = ("topk_group", "topk_groups")
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Settings:
    """A view of `config` through the entry of `family`."""

    family: Family
    config: Mapping[str, Any]

    def sections(self) -> list[Mapping[str, Any]]:
        """Return the objects in which the language model's keys may stand, most specific first."""
        return [s for path in (*self.family.nested, ()) if (s := section(self.config, path)) is not None]

    def first(self, keys: tuple[str, ...], default: Any = None) -> Any:
        """Return the first value present under one of `keys`; null counts as absent."""
        for part in self.sections():
            for key in keys:
                if part.get(key) is not None:
                    return part[key]
        return default

    def flag(self, flag: Flag | bool) -> Any:
        """Return what the config says of `flag`, or its default."""
        if not isinstance(flag, Flag):
            return flag
        if flag.null_means_off and any(
            key in part and part[key] is None for part in self.sections() for key in flag.keys
        ):
            return False
        return self.first(flag.keys, flag.default)

    def integer(self, keys: tuple[str, ...]) -> int | None:
        """Return a count: an integer, or the one value of a per-layer list. None where absent.

        Raises CheckpointError where it is anything else.
        """
        value = self.first(keys)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None or (type(value) is int and value >= 0):
            return value
        raise CheckpointError(f"config.json: {keys_present(self, keys)} is {value!r}, expected a whole number")

    @property
    def experts(self) -> int | None:
        return self.integer(EXPERTS_KEYS)

    @property
    def top_k(self) -> int | None:
        if self.family.routing.fixed_top_k is not None:
            return self.family.routing.fixed_top_k
        return self.integer(TOP_K_KEYS)

    @property
    def tie_map(self) -> list[int] | None:
        """For each layer of a model with tied blocks the one whose weights it uses; None for other models.

        Raises CheckpointError where it is no such list.
        """
        tied = self.first(("layer_tie_map",))
        if tied is None:
            return None
        whole = isinstance(tied, list) and tied and all(type(s) is int and 0 <= s <= i for i, s in enumerate(tied))
        if not whole or any(tied[s] != s for s in tied):
            raise CheckpointError(
                f"config.json: layer_tie_map is {tied!r}; an entry names its own position or an earlier one that does"
            )
        return list(tied)

    @property
    def layers(self) -> int | None:
        """The number of layers of the language model; of its deeper stack where it has two.

        Where no key counts them, the list that says what each of them is does.
        """
        if (tie_map := self.tie_map) is not None:
            return len(tie_map)
        counts = (self.integer(keys) for keys in (LAYERS_KEYS, DECODER_LAYERS_KEYS))
        stated = max((count for count in counts if count is not None), default=None)
        listed = self.first(DEPTH_LISTS) if stated is None else None
        return len(listed) if isinstance(listed, (list, str)) and listed else stated

    @property
    def hidden(self) -> int | None:
        return self.integer(HIDDEN_KEYS)

    @property
    def renormalised(self) -> Any:
        """Whether the chosen weights are divided by their sum (for DBRX: the order of the norm)."""
        norm = self.score == "top-softmax" or self.flag(self.family.routing.renormalised)
        if norm is None or type(norm) is bool or (type(norm) in (int, float) and 1 <= norm < 1000):
            return norm
        raise CheckpointError(f"config.json: the router's norm is {norm!r}, expected true, false or a number")

    @property
    def score(self) -> str:
        """The scoring function, from the config where the family lets it choose."""
        routing = self.family.routing
        named = self.flag(routing.score_flag) if routing.score_flag else None
        named = routing.score_names.get(str(named), named)
        return str(named) if named in ("softmax", "sigmoid", "top-softmax", "sqrt-softplus") else routing.score

    @property
    def softcap(self) -> float:
        """The bound c of router logits c * tanh(logits / c); 0 for none."""
        key = self.family.routing.softcap
        return float(self.first((key,), 0.0)) if key else 0.0

    @property
    def groups(self) -> tuple[int, int] | None:
        """Return (number of groups, groups kept) where routing is limited to groups."""
        routing = self.family.routing
        if routing.groups is None:
            return None
        if routing.groups_if and self.first((routing.groups_if[0],)) != routing.groups_if[1]:
            return None
        count, kept = self.integer(GROUPS_KEYS), self.integer(TOP_GROUPS_KEYS)
        return (count, kept) if count and kept and count > 1 else None

    @property
    def routed_scale_key(self) -> float | None:
        """The value of the config number that multiplies the routed sum; None where there is none."""
        routing = self.family.routing
        if routing.routed_scale_key is None:
            return None
        value = self.first((routing.routed_scale_key,), routing.routed_scale_default)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"config.json: {routing.routed_scale_key} is {value!r}, expected a number")
        return float(value)


def section(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return the object at `path`, None where it is absent or no object."""
    place: Any = config
    for key in path:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else None


def keys_present(settings: Settings, keys: tuple[str, ...]) -> str:
    """Name the keys among `keys` that the config holds, for messages."""
    present = [k for k in keys if any(part.get(k) is not None for part in settings.sections())]
    return " and ".join(present) or keys[0]


def with_value(settings: Settings, keys: tuple[str, ...], value: Any, canonical: str) -> dict[str, Any]:
    """Return a copy of the config with `value` under every alias present, or under `canonical` if none is.

    A per-layer list stays a list of the same length; objects keyed by layer get the value where they repeat it. Raises
    RefusedError where one of those gives its layer another value than the others have.
    """
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    edited = False
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        for key in keys:
            if part is not None and part.get(key) is not None:
                old = part[key]
                part[key] = [value] * len(old) if isinstance(old, list) else value  # type: ignore[index]
                edited = True
        for keyed in (part or {}).keys() & KEYED:
            _set_in_layers(keyed, part[keyed], keys, value, settings.first(keys))  # type: ignore[index]
    if not edited:
        places = (section(config, path) for path in settings.family.nested)
        target = next((p for p in places if p is not None), config)
        target[canonical] = value  # type: ignore[index]
    return config


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy of the config with `dtype`, under its name in there (`bfloat16`), wherever it names one.

    Quantisation settings keep theirs, which are the dtypes of codes and scales.
    """
    copied = copy.deepcopy(dict(config))
    sections: list[Any] = [copied]
    while sections:
        part = sections.pop()
        for key, value in part.items():
            if isinstance(value, dict) and key not in QUANTISATION_KEYS:
                sections.append(value)
            elif key in DTYPE_KEYS and value is not None:
                part[key] = dtype
    return copied


def _set_in_layers(name: str, entries: Any, keys: tuple[str, ...], value: Any, general: Any) -> None:
    """Give the entries of an object keyed by layer a new value under those of `keys` that they hold."""
    for layer, entry in entries.items() if isinstance(entries, Mapping) else ():
        for key in keys if isinstance(entry, dict) else ():
            if entry.get(key) is None:
                continue
            if general is not None and entry[key] != general:
                raise RefusedError(
                    f"config.json: {name} gives layer {layer} a {key} of {entry[key]!r}, the others have {general!r}:"
                    " one new value for all would change that",
                    f"take {key} out of {name}, if the tensors of that layer allow it",
                )
            entry[key] = value


def with_top_k(settings: Settings, top_k: int) -> dict[str, Any]:
    """Return a copy of the config with another number of experts per token, and what depends on it."""
    config = with_value(settings, TOP_K_KEYS, top_k, settings.family.top_k_key)
    for key, other in settings.family.times_top_k.items():
        if settings.first((key,)) is not None and (unit := settings.integer((other,))) is not None:
            config = with_value(replace(settings, config=config), (key,), top_k * unit, key)
    return config
