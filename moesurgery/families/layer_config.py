"""What config.json says of single layers, and how it follows when blocks are repeated, left out or moved.

config.json speaks of layers in lists with an entry for each, in lists of layer numbers, in objects keyed by layer, as
the first so many, and by period; `layer_keys` has the keys. `layer_settings` reads all of them for one layer;
`restacked_config` writes them for a new order and then checks with `layer_settings` that every layer is what it was.
What cannot be said in the new order is refused by key, and so is a key that is not known and may be one of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moesurgery.errors import RefusedError
from moesurgery.families.config_keys import LAYERS_KEYS, PREDICTION_KEYS, Settings, section, with_value
from moesurgery.families.layer_keys import (
    ALTERNATING,
    APART,
    ATTENTION_KEYS,
    BY_DEPTH,
    BY_NUMBER,
    BY_NUMBER_IN_CODE,
    CYCLES,
    DEPTH_LISTS,
    FIRST,
    KEYED,
    LAST,
    LISTS,
    NAMES_LAYERS,
    NOT_BY_LAYER,
    NUMBERS,
    NUMBERS_FROM_ONE,
    OFFSETS,
    OVERRULED,
    PERIODS,
)
from moesurgery.families.quantisation_settings import names_layers
from moesurgery.families.quantised import quantisation_config

_SOURCES, _SHARERS = "kv_source_layers", "indexer_types"  # of which one layer speaks of another
_SHARED = ("shared", "S")
_MODULES, _USED = "num_mtp_modules", "use_mtp"  # MiniMax-M2's, whose published copies hold no such layers
_NUMBER = re.compile("[0-9]{1,9}")


def layer_settings(settings: Settings, layer: int) -> dict[str, Any]:
    """Return what the config says of one layer, by key; keys of nested objects with a dot."""
    by_key: dict[str, Any] = {}
    depth = settings.layers or 0
    for part in settings.sections():
        for inside, place in _places(part):
            for key, value in _entries_of_layer(place, layer, depth):
                by_key.setdefault(inside + key, value)
    return {key: value for key, value in by_key.items() if OVERRULED.get(key) not in by_key}


def _entries_of_layer(place: Mapping[str, Any], layer: int, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what one object of the config says of one layer."""
    for key, value in place.items():
        if key in LISTS and isinstance(value, (list, str)) and len(value) >= depth > layer:
            yield key, value[layer]
        elif (numbers := _numbers(key, value)) is not None:
            yield key, layer in numbers
        elif key in KEYED and (keyed := _keyed(value)) is not None:
            yield key, keyed.get(layer, {})
        elif key in FIRST and type(value) is int:
            yield key, layer < value
        elif key in LAST and type(value) is int and value >= 0:
            yield key, layer <= value
        elif key in PERIODS and type(value) is int and value > 1:
            shift = place.get(OFFSETS[key], 0) if key in OFFSETS else -1
            shift = shift if type(shift) is int else 0
            yield key, (layer - shift) % value == 0
        elif key in CYCLES and isinstance(value, list) and value:
            yield key, value[layer % len(value)]
    if place.get("use_sliding_window") is True and type(place.get("max_window_layers")) is int:
        yield "max_window_layers", layer >= place["max_window_layers"]


class LayerOrigin(NamedTuple):
    """Where a layer of a stack comes from: the settings of a model, and the layer's number in it."""

    settings: Settings
    layer: int


def restacked_config(settings: Settings, origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """Return the config of a model whose layers come from the layers `origins`, of this model or of others like it.

    Entries of prediction (MTP) layers stay behind those of the stack. Raises RefusedError for what the config cannot
    say of the new order.
    """
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    moved = any(origin.layer != new for new, origin in enumerate(origins))
    whole = not moved and len(origins) == settings.layers
    if whole and all(origin.settings.config == settings.config for origin in origins):
        return config
    if not whole:
        _refuse_fixed_order(settings, len(origins), moved)
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if not isinstance(part, MutableMapping) or not _describes_layers(part):
            continue
        theirs = [section(origin.settings.config, path) or {} for origin in origins]
        for inside, place in _places(part):
            for key, reason in BY_NUMBER.items():
                if place.get(key) and not whole:
                    raise RefusedError(f"config.json: {key}: {reason}", "the order of its layers cannot change")
            others = [dict(_places(their)).get(inside, {}) for their in theirs]
            for key, value in place.items():
                layers = [(other.get(key), origin) for other, origin in zip(others, origins, strict=True)]
                place[key] = _moved(key, value, layers, settings)
            for key in LAYERS_KEYS:
                if not inside and place.get(key) is not None:
                    place[key] = len(origins)
    after = replace(settings, config=config)
    _check_followed(settings, after, origins)
    return config


def _refuse_fixed_order(settings: Settings, depth: int, moved: bool) -> None:
    """Raise RefusedError where layers cannot be moved, or left out, whatever they are."""
    types = {str(part.get("model_type")) for part in settings.sections()}
    hint = "the order of its layers cannot change"
    if reason := settings.family.refuses.get("tie-blocks"):
        raise RefusedError(f"{settings.family.name}: {reason}", hint)
    for name in types & BY_NUMBER_IN_CODE.keys():
        raise RefusedError(f"{name}: {BY_NUMBER_IN_CODE[name]}", hint)
    for key, reason in BY_DEPTH.items():
        if settings.first((key,)) is not None and depth != settings.layers:
            raise RefusedError(f"config.json: {key}: {reason}", "the number of its layers cannot change")
    if not moved:
        return
    if (by_code := ALTERNATING & types) and ATTENTION_KEYS.isdisjoint(layer_settings(settings, 0)):
        raise RefusedError(
            f"config.json does not say what attention each layer has; the code of {min(by_code)} then goes by number",
            "add layer_types to config.json",
        )
    period = settings.first(("index_topk_freq",))
    if type(period) is int and period > 1 and not {_SHARERS, "index_topk_pattern"} & layer_settings(settings, 0).keys():
        raise RefusedError(
            f"config.json: index_topk_freq is {period}: which layers have an indexer of their own goes by number",
            "add indexer_types to config.json",
        )
    if (listed := names_layers(quantisation_config(settings.config))) is not None:
        raise RefusedError(
            f"quantization_config names {listed}: it cannot follow a new order of layers",
            "dequantise first with `moesurgery convert --dequantize`",
        )


def _check_followed(before: Settings, after: Settings, origins: Sequence[LayerOrigin]) -> None:
    """Raise RefusedError where the new config says something else of a layer than that of its origin."""
    for new, origin in enumerate(origins):
        was, now = layer_settings(origin.settings, origin.layer), layer_settings(after, new)
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                raise RefusedError(
                    f"config.json: {key} is {_value(before, key)!r}, and cannot say of layer {new} what it says of"
                    f" layer {origin.layer}, which takes that place",
                    "choose an order in which layers of a kind stand where such layers stood",
                )
    for new, origin in enumerate(origins):
        for key in (_SHARERS, "index_topk_pattern"):
            used, old = _indexer_layer(after, key, new), _indexer_layer(origin.settings, key, origin.layer)
            same = used is not None and old is not None and origins[used] == LayerOrigin(origin.settings, old)
            if not same:
                raise RefusedError(
                    f"config.json: {key}: layer {origin.layer} shares the indexer of layer {old}, which would not be"
                    f" the last with one before it as layer {new}",
                    "keep such layers behind the layer whose indexer they share",
                )


def _value(settings: Settings, key: str) -> Any:
    """Return what the config has under a key of `layer_settings`."""
    *path, last = key.split(".")
    places = (section(part, tuple(path)) or {} for part in settings.sections())
    return next((place[last] for place in places if place.get(last) is not None), None)


def _indexer_layer(settings: Settings, key: str, layer: int) -> int | None:
    """Return the layer whose indexer a layer uses, itself where it has one or none is shared; None where none is."""
    depth = settings.layers or 0
    kinds = settings.first((key,))
    if not isinstance(kinds, (list, str)) or len(kinds) < depth or layer >= depth:
        return layer
    return next((i for i in range(layer, -1, -1) if kinds[i] not in _SHARED), None)


def _moved(key: str, value: Any, layers: Sequence[tuple[Any, LayerOrigin]], settings: Settings) -> Any:
    """Return what one entry of the config becomes; `layers` has that entry of each layer's own model."""
    depth, behind = settings.layers or 0, prediction_layers(settings)
    if key in KEYED and _keyed(value) is not None:
        entries = {str(new): (_keyed(theirs) or {}).get(origin.layer) for new, (theirs, origin) in enumerate(layers)}
        return {new: copy.deepcopy(entry) for new, entry in entries.items() if entry is not None}
    if (numbers := _numbers(key, value)) is not None:
        first = 1 if key in NUMBERS_FROM_ONE else 0
        moved = [new for new, (theirs, at) in enumerate(layers) if at.layer in (_numbers(key, theirs) or ())]
        moved += [number - depth + len(layers) for number in sorted(numbers) if number >= depth]
        return ",".join(map(str, moved)) if isinstance(value, str) else [number + first for number in moved]
    if key in FIRST and type(value) is int:
        # Of the layers that were among the first, those that still are; `restacked_config` checks the others.
        after = (new for new, (theirs, origin) in enumerate(layers) if type(theirs) is int and origin.layer >= theirs)
        return next(after, len(layers))
    if key in LAST and type(value) is int and value >= 0:
        before = [new for new, (theirs, origin) in enumerate(layers) if type(theirs) is int and origin.layer <= theirs]
        return max(before, default=0)
    if key in NOT_BY_LAYER or key in NUMBERS | KEYED | NUMBERS_FROM_ONE or (depth < 2 and key not in LISTS):
        return value
    stays = len(layers) == depth and all(theirs == value for theirs, _ in layers)
    stays = stays and all(origin.layer == new for new, (_, origin) in enumerate(layers))
    if key == _SOURCES and isinstance(value, list):
        if not stays and value[:depth] != list(range(depth)):
            raise RefusedError(
                f"config.json: {key}: {BY_NUMBER['num_kv_shared_layers']}", "the order of its layers cannot change"
            )
        return value if stays else list(range(len(layers)))
    if key in LISTS and isinstance(value, (list, str)) and len(value) >= depth and not stays:
        return _list(key, value, layers, depth, behind)
    if not stays and (what := _may_be_layers(key, value, depth, behind)) is not None:
        raise RefusedError(
            f"config.json: {key} {what}, and it is not known whether they are theirs",
            "add the key to moesurgery/families/layer_keys.py: to LISTS, NUMBERS or KEYED if they are, else to"
            " NOT_BY_LAYER",
        )
    return value


def _list(key: str, value: list[Any] | str, layers: Sequence[tuple[Any, LayerOrigin]], depth: int, behind: int) -> Any:
    """Return a list with an entry for each layer of the new stack, and those of prediction layers behind them."""
    if len(value) not in (depth, depth + behind):
        raise RefusedError(
            f"config.json: {key} has {len(value)} entries for {depth} layers and {behind} for multi-token prediction:"
            " it is not known which are whose",
            "correct config.json: one entry for each layer",
        )
    entries = [_of_layer(key, theirs, origin) for theirs, origin in layers]
    if isinstance(value, str):
        return "".join(entries) + value[depth:]
    return [*entries, *copy.deepcopy(value[depth:])]


def _may_be_layers(key: str, value: Any, depth: int, behind: int) -> str | None:
    """Say why an entry under an unknown key may be about layers; None where nothing speaks for it."""
    if key.startswith("mtp_"):
        return None  # of prediction layers, which have a numbering of their own there
    if isinstance(value, Mapping) and (keyed := _keyed(value)):
        return "is keyed by numbers" if max(keyed) < depth + behind else None
    if isinstance(value, list) and len(value) in {depth, depth + behind}:
        return "has as many entries as there are layers"
    if isinstance(value, str) and "pattern" in key and len(value) in {depth, depth + behind}:
        return "has as many letters as there are layers"
    if isinstance(value, (list, str)) and value and NAMES_LAYERS.search(key):
        numbers = _parsed(value)
        if numbers and len(set(numbers)) == len(numbers) and min(numbers) >= 0 and max(numbers) <= depth + behind:
            return "names numbers that may be those of layers"
    return None


def _of_layer(key: str, values: Any, origin: LayerOrigin) -> Any:
    if not isinstance(values, (list, str)) or len(values) <= origin.layer:
        raise RefusedError(
            f"config.json has {key}, an entry for each layer, and that of another model in the stack has none for its"
            f" layer {origin.layer}",
            "write the list into that config.json",
        )
    return copy.deepcopy(values[origin.layer])


def prediction_layers(settings: Settings) -> int:
    """Return how many layers for multi-token prediction the config names."""
    count = settings.first(PREDICTION_KEYS, 0)
    return count if type(count) is int and count > 0 else 0


def without_prediction(settings: Settings) -> dict[str, Any]:
    """Return the config of a model without its layers for multi-token prediction, and without entries for them."""
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    depth, behind = settings.layers or 0, prediction_layers(settings)
    for path in dict.fromkeys((*settings.family.nested, ())):
        part = section(config, path)
        if not isinstance(part, MutableMapping):
            continue
        for _, place in _places(part) if depth else ():
            for key, value in place.items():
                if key in LISTS and isinstance(value, (list, str)) and behind and len(value) == depth + behind:
                    place[key] = value[:depth]
                elif (numbers := _numbers(key, value)) is not None and any(number >= depth for number in numbers):
                    first = 1 if key in NUMBERS_FROM_ONE else 0
                    kept = [number + first for number in sorted(numbers) if number < depth]
                    place[key] = ",".join(map(str, kept)) if isinstance(value, str) else kept
        part.update({key: 0 for key in (*PREDICTION_KEYS, _MODULES) if part.get(key)})
        if part.get(_USED):
            part[_USED] = False
    return config


def with_prediction(settings: Settings, theirs: Settings) -> dict[str, Any]:
    """Return the config with the layers for multi-token prediction that another model's names, and entries for them.

    The inverse of `without_prediction`: what `theirs` says of layers behind its stack is said behind this one.
    """
    config: dict[str, Any] = copy.deepcopy(dict(settings.config))
    depth, other, behind = settings.layers or 0, theirs.layers or 0, prediction_layers(theirs)
    for path in dict.fromkeys((*settings.family.nested, ())):
        part, source = section(config, path), section(theirs.config, path)
        if not isinstance(part, MutableMapping) or source is None:
            continue
        places = dict(_places(source))
        for inside, place in _places(part) if depth else ():
            for key, value in place.items():
                more = places.get(inside, {}).get(key)
                listed = key in LISTS and isinstance(more, (list, str)) and type(value) is type(more)
                if listed and behind and len(more) == other + behind and len(value) == depth:
                    place[key] = value + copy.deepcopy(more[other:])
                elif (numbers := _numbers(key, value)) is not None:
                    first = 1 if key in NUMBERS_FROM_ONE else 0
                    added = sorted(n - other + depth for n in _numbers(key, more) or () if n >= other)
                    held = [number + first for number in [*sorted(numbers), *added]]
                    if added:
                        place[key] = ",".join(map(str, held)) if isinstance(value, str) else held
        part.update({key: source[key] for key in (_MODULES, _USED) if source.get(key)})
    if not behind:
        return config
    name = next(key for part in theirs.sections() for key in PREDICTION_KEYS if part.get(key))
    return with_value(replace(settings, config=config), PREDICTION_KEYS, behind, name)


def _describes_layers(part: Mapping[str, Any]) -> bool:
    """Whether an object of the config is that of a stack of layers."""
    return any(part.get(key) is not None for key in (*LAYERS_KEYS, *DEPTH_LISTS))


def _places(part: Any, inside: str = "") -> Iterator[tuple[str, Any]]:
    """Yield an object of the config and those in it that describe no other model, with the path to each."""
    yield inside, part
    for key, value in part.items():
        if (
            isinstance(value, Mapping)
            and isinstance(key, str)
            and not (key in KEYED or key in NOT_BY_LAYER or APART.search(key) or "model_type" in value)
            and not _describes_layers(value)
        ):
            yield from _places(value, f"{inside}{key}.")


def _keyed(value: Any) -> dict[int, Any] | None:
    """Return an object whose keys are numbers by those; None for any other."""
    if isinstance(value, Mapping) and all(isinstance(key, str) and re.fullmatch(r"\d{1,6}", key) for key in value):
        return {int(key): entry for key, entry in value.items()}
    return None


def _numbers(key: str, value: Any) -> set[int] | None:
    """Return the layers that an entry names, counted from 0; None where it is no such entry."""
    if key not in NUMBERS and key not in NUMBERS_FROM_ONE:
        return None
    numbers = _parsed(value)
    return None if numbers is None else {number - (key in NUMBERS_FROM_ONE) for number in numbers}


def _parsed(value: Any) -> list[int] | None:
    """Return a list of whole numbers, also written as text; None where it is none."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return [int(part) for part in parts] if parts and all(map(_NUMBER.fullmatch, parts)) else None
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return list(value)
    return None
