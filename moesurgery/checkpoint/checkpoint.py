"""A checkpoint: config.json as raw JSON, and every tensor's dtype, shape, file and offset. No weights.

Opening one reads headers only, so it costs the same for 50 MB and for 1 TB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.filenames import CONFIG, INDEX, PROVENANCE
from moesurgery.checkpoint.gguf_header import GgufHeader
from moesurgery.checkpoint.header import Header, TensorInfo
from moesurgery.checkpoint.scan import OTHER_WEIGHTS, Scan, scan_checkpoint
from moesurgery.checkpoint.source import Source
from moesurgery.checkpoint.source_address import open_source
from moesurgery.errors import RefusedError

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
    def gguf(self) -> GgufHeader | None:
        """The header of the first GGUF file, which has the metadata; None for safetensors."""
        first = self.headers[0] if self.headers else None
        return first if isinstance(first, GgufHeader) else None

    def refuse_gguf(self, what: str) -> None:
        """Raise RefusedError where this is a GGUF; `what` cannot be done with one."""
        if self.gguf is not None:
            raise RefusedError(
                f"{self.source.identity} is a GGUF: {what}",
                "name the safetensors checkpoint that it was made from; docs/gguf.md says what GGUF files go with",
            )

    @property
    def headers_only(self) -> bool:
        """Whether some shard holds no more than its header."""
        return any(header.data_missing for header in self.headers)

    @property
    def stored_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def side_files(self) -> list[str]:
        """Files to carry over: tokenizer, generation config, chat template, code, licence, README. None of a GGUF."""
        if self.gguf is not None:
            return []
        shards = set(self.shards)
        return [
            file
            for file in self.file_sizes
            if file not in shards and file not in _NEVER_CARRIED and not OTHER_WEIGHTS.fullmatch(file)
        ]

    @cached_property
    def other_weights(self) -> list[str]:
        """Weight files that are no part of this checkpoint (pickles, GGUF, consolidated copies)."""
        if self.gguf is not None:
            return []
        shards = set(self.shards) | {INDEX}
        return [file for file in self.file_sizes if file not in shards and OTHER_WEIGHTS.fullmatch(file)]


def open_checkpoint(reference: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open the checkpoint that `reference` names: a directory, a GGUF file, `hf://…`, a URL.

    With `headers_only`, shards may end before their data does. Raises CheckpointError at the first finding of the
    scan that makes the checkpoint unusable.
    """
    scan = scan_checkpoint(open_source(reference), headers_only=headers_only)
    for problem in scan.problems:
        if problem.fatal:
            identity = scan.source.identity  # of a GGUF the file itself
            raise problem.as_error(identity.removesuffix(problem.file or "").rstrip("/") or None)
    return checkpoint_of(scan)


def checkpoint_of(scan: Scan) -> Checkpoint:
    """Return the checkpoint that a scan without fatal findings describes."""
    return Checkpoint(scan.source, scan.config or {}, scan.headers, scan.index_metadata, scan.sizes)
