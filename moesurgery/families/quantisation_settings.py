"""What config.json, and files beside it, say of quantised modules by name, and how that follows an edit."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.families.quantised import QUANTISATION_KEYS

# Files in which tools describe how they quantised a model, beside config.json or instead of it: ModelOpt, AutoGPTQ and
# Neural Compressor, AutoAWQ, ExLlamaV3, Quanto, msModelSlim.
QUANTISATION_FILES = (
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"),
    *("quanto_qmap.json", "quant_model_description.json"),
)
# `model.layers.3.mlp`, and the same in a regular expression: `re:.*layers\\.(3|4)\\..*`; not `layers\\.\\d+`.
_LAYER = re.compile(r"\b(?:layers|blocks|block|h)\\*\.(?:\d+|\((?:\d|\?)[^)]*\)|\[(?!0-9\])[^\]]*\])")


# Experts by number in an expression: `re:.*experts\\.(3|4)\\..*`; not `experts\\.\\d+`.
_EXPERT = re.compile(r"\bexperts?\\*\.(?:\d+|\((?:\d|\?)[^)]*\)|\[(?!0-9\])[^\]]*\])")


# Lists of modules that stay as they were: compressed-tensors, ModelOpt, AWQ and FP8, bitsandbytes.
_LEFT_OUT = (
    *("ignore", "ignored_layers", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules"),
    "exclude",
)


def names_layers(settings: Any) -> str | None:
    """Return the first layer that quantisation settings name, in a module's name or an expression for some."""
    return _first_match(_LAYER, settings)


def names_experts(settings: Any) -> str | None:
    """Return the first expert that quantisation settings name by its number."""
    return _first_match(_EXPERT, settings)


def _first_match(pattern: re.Pattern[str], settings: Any) -> str | None:
    if isinstance(settings, Mapping):
        matches = (_first_match(pattern, part) for entry in settings.items() for part in entry)
    elif isinstance(settings, (list, tuple)):
        matches = (_first_match(pattern, part) for part in settings)
    else:
        match = pattern.search(settings) if isinstance(settings, str) else None
        return match[0] if match else None
    return next((name for name in matches if name is not None), None)


def with_renamed_modules(settings: Any, modules: Mapping[str, str | None], file: str) -> Any:
    """Return quantisation settings with modules under their new names; entries about modules that are gone go.

    `modules` maps old names to new ones, None for those that are gone; what is in a module follows it, and so does
    `module*`. Raises RefusedError, which names `file`, where an expression speaks of experts by number.
    """
    return _Renaming(modules, file).of(settings) if modules else copy.deepcopy(settings)


class _Renaming:
    """New names of modules, applied to JSON. Settings and tensors may differ in what stands before `layers`."""

    def __init__(self, modules: Mapping[str, str | None], file: str) -> None:
        self.file = file
        self.modules = {_from_layers(old): None if new is None else _from_layers(new) for old, new in modules.items()}

    def of(self, settings: Any) -> Any:
        if isinstance(settings, Mapping):
            named = {key: self.name(key) for key in settings}
            return {new: self.of(settings[key]) for key, new in named.items() if new is not None}
        if isinstance(settings, list):
            renamed = [self.of(entry) for entry in settings]
            kept = [new for new, old in zip(renamed, settings, strict=True) if new is not None or old is None]
            # Several modules may have become one.
            return list(dict.fromkeys(kept)) if kept != settings and all(isinstance(n, str) for n in kept) else kept
        return self.name(settings) if isinstance(settings, str) else copy.deepcopy(settings)

    def name(self, name: str) -> str | None:
        """Return the new name of a module, or of what is in it; None where it is gone."""
        inside = _from_layers(name)
        head = inside.rstrip("*").rstrip(".")
        while head:
            if head in self.modules:
                new = self.modules[head]
                return None if new is None else name[: len(name) - len(inside)] + new + inside[len(head) :]
            head = head.rpartition(".")[0]
        experts = _EXPERT.search(name)
        if experts is not None and not re.fullmatch(r"[\w.]+", name):
            raise RefusedError(
                f"{self.file} names {name!r}, with {experts[0]} by number: it cannot follow experts that get other"
                " numbers",
                "name the modules one by one there, or dequantise first with `moesurgery convert --dequantize`",
            )
        return name


def _from_layers(name: str) -> str:
    """Return a module's name from its list of layers on."""
    match = re.search(r"(?:^|\.)((?:layers|blocks|block|h)\.\d+(?:\.|$))", name)
    return name[match.start(1) :] if match else name


def without_entries(settings: Any, gone: Callable[[str], bool]) -> Any:
    """Return quantisation settings without the entries about modules that are gone."""
    if isinstance(settings, Mapping):
        return {key: without_entries(of, gone) for key, of in settings.items() if not gone(key)}
    if isinstance(settings, list):
        return [without_entries(of, gone) for of in settings if not (isinstance(of, str) and gone(of))]
    return copy.deepcopy(settings)


def with_left_out(settings: Any, theirs: Any, added: Callable[[str], str | None]) -> Any:
    """Return quantisation settings whose lists of modules left out also have entries of another model's, `theirs`.

    `added` returns what such an entry is called here, None for one about no module that was added.
    """
    changed = copy.deepcopy(settings)
    if not isinstance(changed, dict) or not isinstance(theirs, Mapping):
        return changed
    for key in _LEFT_OUT:
        source, mine = theirs.get(key), changed.get(key) or []
        if isinstance(source, list) and isinstance(mine, list):
            named = [added(entry) for entry in source if isinstance(entry, str)]
            more = [entry for entry in named if entry is not None and entry not in mine]
            changed |= {key: [*mine, *more]} if more else {}
    if "quantization" in changed:
        changed["quantization"] = with_left_out(changed["quantization"], theirs.get("quantization"), added)
    return changed


def with_renamed_settings(config: Mapping[str, Any], modules: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a copy of the config whose quantisation settings have modules under their new names."""
    return with_changed_settings(config, lambda settings, where: with_renamed_modules(settings, modules, where))


def with_changed_settings(config: Mapping[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Return a copy of the config with what `change` makes of its quantisation settings and the name of their place."""
    renamed: dict[str, Any] = copy.deepcopy(dict(config))
    for place in (renamed, renamed.get("text_config"), renamed.get("llm_config")):
        if not isinstance(place, dict):
            continue
        for key in QUANTISATION_KEYS:
            if isinstance(place.get(key), Mapping):
                place[key] = change(place[key], f"config.json: {key}")
    return renamed


def quantisation_method(content: Mapping[str, Any]) -> str | None:
    """Return what a file that describes quantisation calls the method; None where it says none."""
    places = (content.get("quantization"), content)
    objects = [place for place in places if isinstance(place, Mapping)]
    for key in ("quant_algo", "quant_method", "quant_type", "bits", "w_bit"):
        for place in objects:
            if place.get(key):
                return f"{place[key]} bits" if key in ("bits", "w_bit") else str(place[key])
    return None


def bits_named(settings: Mapping[str, Any]) -> int | None:
    """Return the bits per weight that settings of GPTQ or AWQ name for all weights; None where they do not."""
    return next((settings[key] for key in ("bits", "w_bit") if type(settings.get(key)) is int), None)


def excluded_modules(settings: Mapping[str, Any]) -> list[str]:
    """Return the modules that settings, or a file that describes quantisation, leave out by name or expression."""
    excluded: list[str] = []
    for place in (settings, settings.get("quantization")):
        for key in _LEFT_OUT if isinstance(place, Mapping) else ():
            entries = place.get(key)  # type: ignore[union-attr]
            excluded += [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
    return excluded
