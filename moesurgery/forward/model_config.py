"""The config object of transformers for a checkpoint's config.json, made without anything that runs foreign code.

Some keys of a config make loaders fetch code from the Hub or import files next to the weights (CVE-2026-4372 and
its relatives). They choose how a model is run and never what it computes, so they are left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import CheckpointError
from moesurgery.tied.registration import register_tied_models

_LEFT_OUT = frozenset(
    (
        "auto_map",
        "quantization_config",  # weights come dequantised, or as shapes
        "compression_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "custom_generate",
        "name_or_path",
        "_name_or_path",
    )
)


# Numbers of things that transformers makes one by one, when it reads a config (labels) or builds a model (layers).
_PARTS = ("layer", "depth", "block", "stage")
_COUNTED = (*_PARTS, "expert", "codebook", "head", "num", "label", "class", "count", "repeat")
_SIZES = ("size", "token", "vocab", "position", "length", "_id")
MOST_PARTS = 1_000
MOST_COUNTED = 20_000
MOST_TOGETHER = 200_000  # experts of all layers
MOST_SIZE = 1 << 31
MOST_VALUES = 200_000  # at any depth


def too_many(config: Mapping[str, Any]) -> str | None:
    """Return which number of a config is a count or size beyond that of any model, which could take days to build."""
    most = {"expert": 1, "layer": 1}
    for seen, (key, number) in enumerate(_values(config)):
        if seen > MOST_VALUES:
            return f"{CONFIG} holds more than {MOST_VALUES:,} values: no model is built of it"
        if type(number) is not int:
            continue
        parts = any(word in key for word in _PARTS) and "size" not in key
        counted = parts or (
            (key.startswith("n_") or any(word in key for word in _COUNTED)) and not any(word in key for word in _SIZES)
        )
        size = any(word in key for word in _SIZES)
        limit = MOST_PARTS if parts else MOST_COUNTED if counted else MOST_SIZE if size else None
        if limit is not None and number > limit:
            return f"{CONFIG}: {key} is {_shown(number)}: no model of that many parts is built (at most {limit:,})"
        for word in most if counted else ():
            most[word] = max(most[word], number) if word in key and "hidden_size" not in key else most[word]
    if most["expert"] * most["layer"] > MOST_TOGETHER:
        return f"{CONFIG}: {most['layer']:,} layers of {most['expert']:,} experts are more than are built"
    return None


def _shown(number: int) -> str:
    return f"{number:,}" if number < 10**18 else "a number of more than 18 digits"


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value at any depth with its key, or that of the list that it is in."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    else:
        yield key, value


def harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that choose code, at any depth of objects.

    Raises CheckpointError for a number of parts that would take too long to build.
    """
    if (reason := too_many(config)) is not None:
        raise CheckpointError(reason, "correct config.json")
    return _without_code(config)


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in _LEFT_OUT
    }


def load_config(config: Mapping[str, Any]) -> Any:
    """Return the config object. Raises whatever transformers does where it refuses the config."""
    import transformers

    register_tied_models()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_text(compact_json(harmless(config)))
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
