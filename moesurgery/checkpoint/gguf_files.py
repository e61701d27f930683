"""A GGUF checkpoint: one file or a set of parts, and its metadata in the words of config.json.

Operations read and edit numbers under the names that config.json has for them; `CONFIG_KEYS` says which GGUF key each
one is, so that what they edit is written back under it. All other metadata stand in the config under "gguf".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.gguf_header import ALIGNMENT, GgufHeader
from moesurgery.checkpoint.source import gguf_parts

ARCHITECTURE = "general.architecture"
MODEL_TYPE = "gguf-"  # before the architecture: the model_type of a GGUF
METADATA = "gguf"  # where in the config the keys stand that it has no name for
PROVENANCE_KEY = "general.moesurgery"  # what was done, in a line
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
_NEXTN = "nextn_predict_layers"
_BLOCKS = "block_count"

# The name in config.json of each number, and its GGUF key below the architecture.
CONFIG_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "scoring_func": "expert_gating_func",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "num_nextn_predict_layers": _NEXTN,
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
_NAMES = {key: name for name, key in CONFIG_KEYS.items()}
_LAYERS = "num_hidden_layers"
# Arrays in which llama.cpp wants an entry for each block, prediction layers included, beside those of CONFIG_KEYS.
_BY_BLOCK = (
    *("attention.sliding_window_pattern", "attention.recurrent_layers", "attention.compress_ratios"),
    *("attention.rope_pattern", "attention.indexer.types", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
    "deepstack_mapping",
)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def gguf_models(files: Mapping[str, int]) -> list[str]:
    """Return the first file of each model among the GGUF files of a folder.

    Vision encoders and imatrices are left out, unless there is nothing else.
    """
    found = [file for file in files if file.lower().endswith(".gguf") and "/" not in file]
    models = [file for file in found if not _NOT_MODELS.search(file)]
    return list(dict.fromkeys(gguf_parts(file)[0] for file in models or found))


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata of a model as a config. Layers for multi-token prediction are counted apart, as there."""
    architecture = str(header.values.get(ARCHITECTURE, ""))
    config: dict[str, Any] = {"model_type": f"{MODEL_TYPE}{architecture}"}
    others: dict[str, Any] = {}
    blocks = header.values.get(f"{architecture}.{_BLOCKS}")
    if type(blocks) is int:
        nextn = header.values.get(f"{architecture}.{_NEXTN}", 0)
        config[_LAYERS] = blocks - nextn if type(nextn) is int and nextn < blocks else blocks
    for key, value in header.values.items():
        name = _NAMES.get(key.removeprefix(f"{architecture}.")) if key.startswith(f"{architecture}.") else None
        if name is not None and not (name == "routed_scaling_factor" and not value):  # 0 is no factor, as none is
            config[name] = value
        elif key not in (ARCHITECTURE, ALIGNMENT, *_SPLIT_KEYS, f"{architecture}.{_BLOCKS}"):
            others[key] = value
    return {**config, METADATA: others}


def part_problems(headers: Sequence[GgufHeader], parts: Sequence[str]) -> Iterator[Finding]:
    """Yield what is wrong with the headers of a model taken together; `parts` are the files that it should have."""
    first = headers[0]
    if (kind := first.values.get("general.type", "model")) != "model":
        yield Finding("G10", f"is no model, but holds {kind!r}", first.file, fatal=True)
    elif not isinstance(first.values.get(ARCHITECTURE), str):
        yield Finding("G10", f"has no {ARCHITECTURE}: it is not said what model it is", first.file, fatal=True)
    names: dict[str, str] = {}
    for number, header in enumerate(headers):
        stated = [header.values.get(key) for key in (SPLIT_NUMBER, SPLIT_COUNT)]
        if stated != [number, len(parts)] and (len(parts) > 1 or stated[1] not in (None, 0, 1)):
            message = f"says that it is part {stated[0]} of {stated[1]}, counted from 0;"
            yield Finding("G11", f"{message} its name says {number} of {len(parts)}", header.file, fatal=True)
        for info in header.tensors:
            if info.name in names:
                yield Finding(
                    "G11", f"stands in both {names[info.name]} and {header.file}", None, info.name, fatal=True
                )
            names[info.name] = header.file
    total = first.values.get(SPLIT_TENSORS)
    if len(parts) > 1 and total != len(names):
        message = f"{SPLIT_TENSORS} is {total}, the {len(parts)} parts hold {len(names)} tensors"
        yield Finding("G11", message, first.file, fatal=True)


def without_prediction_entries(config: Mapping[str, Any], blocks: int, left: int) -> dict[str, Any]:
    """Return the config with the first `left` entries of each array that has one for every one of the `blocks`."""
    architecture = str(config["model_type"]).removeprefix(MODEL_TYPE)
    by_block = {f"{architecture}.{key}" for key in _BY_BLOCK}

    def cut(name: str, value: Any) -> Any:
        of_blocks = name in CONFIG_KEYS or name in by_block
        return value[:left] if of_blocks and isinstance(value, list) and len(value) == blocks else value

    cut_config = {name: cut(name, value) for name, value in config.items()}
    return {**cut_config, METADATA: {key: cut(key, value) for key, value in config[METADATA].items()}}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GGUF keys that an edited config gives another value, without the architecture before them.

    None where one is removed. Raises ValueError for a config key that no GGUF key stands for.
    """
    architecture = str(before["model_type"]).removeprefix(MODEL_TYPE)
    changed = {
        key.removeprefix(f"{architecture}."): value
        for key, value in after[METADATA].items()
        if key.startswith(f"{architecture}.") and value != before[METADATA].get(key)
    }
    for name in before.keys() | after.keys():
        if before.get(name) == after.get(name) or name in (METADATA, _LAYERS):
            continue
        if name not in CONFIG_KEYS:
            raise ValueError(name)
        changed[CONFIG_KEYS[name]] = after.get(name)
    layers = [config.get(_LAYERS, 0) + config.get("num_nextn_predict_layers", 0) for config in (before, after)]
    if layers[0] != layers[1]:
        changed[_BLOCKS] = layers[1]
    return changed
