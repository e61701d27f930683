"""What two models of one architecture may disagree on without any tensor showing it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import TOKENIZER
from moesurgery.checkpoint.strict_json import parse_json
from moesurgery.families.config_keys import LAYERS_KEYS

# Keys that say nothing of how tensors are used, or that are settled elsewhere.
_IDLE = frozenset(
    (
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "auto_map"),
        *("quantization_config", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
        *(
            "router_aux_loss_coef",
            "router_jitter_noise",
            "output_router_logits",
            "initializer_range",
            "unsloth_version",
        ),
        *("pretraining_tp", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "router_dropout"),
        *("max_position_embeddings", "_attn_implementation_autoset", "aux_loss_alpha", "seq_aux", "return_dict"),
    )
)
_WITH_VOCABULARY = (TOKENIZER, "tokenizer.model", "vocab.json")


def config_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, stacked: bool) -> str:
    """Say in which keys two configs differ that decide how tensors are used; empty where in none.

    `stacked`: numbers of layers, and lists by layer, are settled by the recipe's slices.
    """
    differences = []
    for key, a, b in _differences(ours, theirs, ""):
        last = key.rsplit(".", 1)[-1]
        by_layer = last in LAYERS_KEYS or isinstance(a, list) or isinstance(b, list)
        if last not in _IDLE and not (stacked and by_layer):
            differences.append(f"{key} {_short(a)} and {_short(b)}")
    return ", ".join(differences)


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, our value, their value); null counts as absent."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        if ours != theirs:
            yield path, ours, theirs
        return
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) != isinstance(b, Mapping) and (a is None or b is None):
            yield (f"{path}.{key}" if path else key), a, b
        else:
            yield from _differences(a, b, f"{path}.{key}" if path else key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def tokenizers_differ(ours: Checkpoint, theirs: Checkpoint) -> bool | None:
    """Whether two models map text to other numbers; None where they have no form of a tokenizer in common."""
    for file in _WITH_VOCABULARY:
        if file in ours.file_sizes and file in theirs.file_sizes:
            a, b = (c.source.read(file, 0, c.file_sizes[file]) for c in (ours, theirs))
            return a != b and (file != TOKENIZER or _vocabulary(a) != _vocabulary(b))
    return None


def _vocabulary(data: bytes) -> Any:
    """Return what of a tokenizer.json decides which text gets which number."""
    try:
        value = parse_json(data, config=True)
        return {key: value.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    except (ValueError, AttributeError):
        return data
