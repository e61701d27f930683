"""A checkpoint: config.json as raw JSON, and every tensor's dtype, shape, file and offset. No weights.

Opening one reads headers only, so it costs the same for 50 MB and for 1 TB.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.header import Header, TensorInfo, parse_json, read_header, repeated_keys
from moesurgery.checkpoint.source import LocalSource, Source, contained, open_source
from moesurgery.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "moesurgery.json"
MAX_JSON_BYTES = 200_000_000

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Weights in other forms. They would be stale beside an edited checkpoint, so they are not carried over.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|pkl)",
    re.IGNORECASE,
)
# What a directory listing adds and no model needs.
_NEVER_CARRIED = (INDEX, PROVENANCE, CONFIG, ".gitattributes", ".gitignore")


@dataclass
class Checkpoint:
    """Headers and config of one model. `tensors` is in file order, shard by shard."""

    source: Source
    config: dict[str, Any]
    headers: list[Header]
    index_metadata: dict[str, Any] | None
    file_sizes: dict[str, int] = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {info.name: info for header in self.headers for info in header.tensors}

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shards(self) -> list[str]:
        return [header.file for header in self.headers]

    @property
    def headers_only(self) -> bool:
        """Whether some shard holds no more than its header."""
        return any(header.data_missing for header in self.headers)

    @property
    def stored_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def side_files(self) -> list[str]:
        """Files to carry over: tokenizer, generation config, chat template, code, licence, README."""
        shards = set(self.shards)
        return [
            file
            for file in self.file_sizes
            if file not in shards and file not in _NEVER_CARRIED and not _OTHER_WEIGHTS.fullmatch(file)
        ]

    @cached_property
    def other_weights(self) -> list[str]:
        """Weight files that are no part of this checkpoint (pickles, GGUF, consolidated copies)."""
        shards = set(self.shards) | {INDEX}
        return [file for file in self.file_sizes if file not in shards and _OTHER_WEIGHTS.fullmatch(file)]


def read_json(source: Source, file: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Read one JSON object from a checkpoint. Raises CheckpointError."""
    if file not in sizes:
        raise CheckpointError(f"{source.identity} has no {file}")
    if sizes[file] > MAX_JSON_BYTES:
        raise CheckpointError(f"{source.identity}/{file} is {sizes[file]:,} bytes, too large for its kind")
    try:
        # Real configs hold Infinity (Mamba's time_step_limit): Python writes it, so it is read and kept.
        value = parse_json(source.read(file, 0, sizes[file]), constants=True)
    except ValueError as error:
        raise CheckpointError(f"{source.identity}/{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source.identity}/{file} is not a JSON object")
    return value


def open_checkpoint(reference: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open the checkpoint that `reference` names: a directory, `hf://org/name[@revision]`, a URL.

    With `headers_only`, shards may end before their data does. Raises CheckpointError.
    """
    source = open_source(reference)
    sizes = source.files()
    if CONFIG not in sizes:
        raise CheckpointError(f"{reference} has no {CONFIG}", _hint_without_config(source))
    config = read_json(source, CONFIG, sizes)
    shards, weight_map, metadata = _shards(source, sizes)
    workers = 2 * (os.cpu_count() or 1) if isinstance(source, LocalSource) else 16

    def header_of(file: str) -> Header:
        return read_header(
            file, sizes[file], lambda start, length: source.read(file, start, length), headers_only=headers_only
        )

    if len(shards) == 1:
        headers = [header_of(shards[0])]
    else:
        with ThreadPoolExecutor(min(workers, len(shards))) as pool:
            headers = list(pool.map(header_of, shards))
    checkpoint = Checkpoint(source, config, headers, metadata, sizes)
    _check_names(checkpoint, weight_map)
    return checkpoint


def _hint_without_config(source: Source) -> str:
    if isinstance(source, LocalSource):
        found = sorted(p.parent.name for p in source.root.glob(f"*/{CONFIG}"))
        if found:
            return f"did you mean one of its folders: {', '.join(found[:5])}?"
    return "name the folder that holds config.json and *.safetensors"


def _shards(source: Source, sizes: dict[str, int]) -> tuple[list[str], dict[str, str] | None, dict[str, Any] | None]:
    """Return the shard files, the index's weight map and its metadata (both None without an index)."""
    if INDEX in sizes:
        index = read_json(source, INDEX, sizes)
        weight_map = index.get("weight_map")
        where = f"{source.identity}/{INDEX}"
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise CheckpointError(f"{where}: weight_map is not a non-empty object of file names")
        if repeated := repeated_keys(weight_map):
            raise CheckpointError(f"{where}: {repeated[0]!r} is mapped twice")
        files = sorted(contained(f) for f in set(weight_map.values()))
        if SINGLE in sizes and SINGLE not in files:
            raise CheckpointError(
                f"{source.identity} has both {SINGLE} and {INDEX}, and loaders disagree on which counts",
                "remove the one that is stale",
            )
        for file in files:
            if file not in sizes:
                named = sum(f == file for f in weight_map.values())
                raise CheckpointError(
                    f"{where} names {file} ({named} tensors), which does not exist", "download the missing shard"
                )
            source.local(file)  # refuses a link out of the checkpoint before anything is read
        metadata = index.get("metadata")
        return files, weight_map, metadata if isinstance(metadata, dict) else {}
    files = [SINGLE] if SINGLE in sizes else sorted(f for f in sizes if _SHARD.fullmatch(f))
    if not files:
        others = [f for f in sizes if _OTHER_WEIGHTS.fullmatch(f) and "/" not in f]
        if not others:
            raise CheckpointError(f"{source.identity} has no weights", f"it should hold {SINGLE} or {INDEX}")
        raise CheckpointError(
            f"{source.identity} has no {SINGLE} or {INDEX}, only {', '.join(others[:3])}",
            "convert the weights to safetensors first; pickles are never opened",
        )
    source.local(files[0])
    return files, None, None


def _check_names(checkpoint: Checkpoint, weight_map: dict[str, str] | None) -> None:
    """Every tensor stands in exactly one shard, and in the one that the index says."""
    total = sum(len(header.tensors) for header in checkpoint.headers)
    if total != len(checkpoint.tensors):
        seen: dict[str, str] = {}
        for header in checkpoint.headers:
            for info in header.tensors:
                if info.name in seen:
                    raise CheckpointError(
                        f"{checkpoint.source.identity}: tensor {info.name!r} stands in both"
                        f" {seen[info.name]} and {info.file}"
                    )
                seen[info.name] = info.file
    if weight_map is None:
        return
    tensors = checkpoint.tensors
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{checkpoint.source.identity}/{INDEX} maps {name!r} to {file}, which does not hold it",
                "the index is stale or a shard belongs to another model; `moesurgery validate` lists all differences",
            )
        if tensors[name].file != file:
            raise CheckpointError(
                f"{checkpoint.source.identity}/{INDEX} maps {name!r} to {file}, but it is in {tensors[name].file}"
            )
    if len(weight_map) != len(tensors):
        unlisted = next(name for name in tensors if name not in weight_map)
        raise CheckpointError(
            f"{checkpoint.source.identity}: {unlisted!r} in {tensors[unlisted].file} is not listed in {INDEX}",
            "loaders would read it all the same; make the index complete or remove the stale shard",
        )
