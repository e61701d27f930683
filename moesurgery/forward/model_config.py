"""The config object of transformers for a checkpoint's config.json, made without anything that runs foreign code.

Some keys of a config make loaders fetch code from the Hub or import what lies beside the weights (CVE-2026-4372 and
its relatives). They choose how a model is run and never what it computes, so they are left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.strict_json import compact_json
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


def harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that choose code, at any depth of objects."""
    return {
        key: harmless(value) if isinstance(value, Mapping) else copy.deepcopy(value)
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
