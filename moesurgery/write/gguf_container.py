"""What stands before the data of a GGUF file: metadata, edited where the plan's config is, and where each tensor is."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.dtypes import GGUF_TYPES
from moesurgery.checkpoint.gguf_files import (
    ARCHITECTURE,
    PROVENANCE_KEY,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    changed_keys,
)
from moesurgery.checkpoint.gguf_header import ARRAY, MAGIC, STRING, GgufHeader, array_kind, encoded_key
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.plan.plan import Plan

_TYPE_NUMBERS = {name: number for number, name in GGUF_TYPES.items()}
_U16, _U32, _I32, _F32 = 2, 4, 5, 6
_NAME, _SIZE_LABEL = "general.name", "general.size_label"
KEYS_OF_THE_WRITER = (_NAME, _SIZE_LABEL, PROVENANCE_KEY)  # which an edit changes whatever it is


@dataclass(frozen=True)
class GgufPart:
    """One file of a GGUF: version, alignment and metadata, each key with its value in the file's own bytes."""

    version: int
    alignment: int
    keys: tuple[bytes, ...] = field(repr=False)
    digest: str = field(default="")

    def with_digest(self) -> GgufPart:
        """Return the part with the digest of its keys, which stands for them where plans are told apart."""
        return replace(self, digest=hashlib.sha256(b"".join(self.keys)).hexdigest())

    def header(self, entries: Sequence[tuple[str, Expr]]) -> bytes:
        """Return metadata and places of tensors: all before the data but for the padding."""
        parts = [MAGIC, struct.pack("<IQQ", self.version, len(entries), len(self.keys)), *self.keys]
        at = 0
        for name, expr in entries:
            encoded = name.encode()
            parts.append(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(expr.shape)))
            parts.append(struct.pack(f"<{len(expr.shape)}QIQ", *reversed(expr.shape), _TYPE_NUMBERS[expr.dtype], at))
            at += self.padded(expr.nbytes)
        return b"".join(parts)

    def padded(self, nbytes: int) -> int:
        """Return a size with the padding to the next place where a tensor may begin."""
        return -(-nbytes // self.alignment) * self.alignment


def gguf_parts_of(plan: Plan, groups: Sequence[Sequence[str]]) -> list[GgufPart]:
    """Return the metadata of each of the files that the tensors `groups` go into; all but the first hold little.

    Raises RefusedError where the plan changes a config key that no GGUF key stands for.
    """
    source = plan.checkpoint.gguf
    assert source is not None
    keys = _edited(plan, source)
    parts = []
    for number in range(len(groups)):
        own = dict(keys) if number == 0 else {}
        for key in (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS):
            own.pop(key, None)
        if len(groups) > 1:
            own[SPLIT_NUMBER] = encoded_key(SPLIT_NUMBER, _U16, number)
            own[SPLIT_COUNT] = encoded_key(SPLIT_COUNT, _U16, len(groups))
            own[SPLIT_TENSORS] = encoded_key(SPLIT_TENSORS, _I32, sum(map(len, groups)))
        parts.append(GgufPart(source.version, source.alignment, tuple(own.values())).with_digest())
    return parts


def _edited(plan: Plan, source: GgufHeader) -> dict[str, bytes]:
    """Return the bytes of every key of the whole model."""
    keys = dict(source.entries)
    try:
        changed = changed_keys(plan.checkpoint.config, plan.config)
    except ValueError as error:
        raise RefusedError(
            f"a GGUF has no key for {error} of config.json, which a step changes",
            "edit the checkpoint that it was made from, and convert that",
        ) from None
    for key, value in changed.items():
        _set(keys, source, f"{source.values[ARCHITECTURE]}.{key}", value)
    if plan.steps:
        done = ", ".join(dict.fromkeys(step.operation for step in plan.steps))
        _set(keys, source, _NAME, f"{source.values.get(_NAME) or plan.checkpoint.name} ({done})")
        _set(
            keys,
            source,
            PROVENANCE_KEY,
            f"{__version__}: " + "; ".join(f"{s.operation}: {s.summary}" for s in plan.steps),
        )
        keys.pop(_SIZE_LABEL, None)  # such as 64x1.7B: no longer true
    return keys


def _set(keys: dict[str, bytes], source: GgufHeader, key: str, value: Any) -> None:
    """Give a key a new value of the type that it has; of a key that is new its value tells the type."""
    if value is None:
        keys.pop(key, None)
        return
    kind = source.kinds.get(key)
    if kind is None:
        kind = STRING if isinstance(value, str) else _F32 if isinstance(value, float) else _U32
    elif kind == ARRAY:
        kind = array_kind(source.entries[key], key)
    keys[key] = encoded_key(key, kind, value)
