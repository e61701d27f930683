"""A strict reader of safetensors headers: 8 bytes of length, then JSON. No torch, no numpy.

Stricter than safetensors 0.8 itself, which accepts a repeated tensor name (its specification forbids it,
and parsers differ on which one wins). A header is read as a list of problems rather than up to the first
one, so that `validate` can report them all; everything else calls `read_header`, which raises.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from moesurgery.checkpoint.dtypes import SAFETENSORS_BITS
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.checkpoint.strict_json import parse_json, repeated_keys

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_ELEMENTS = 2**63 - 1
MAX_PROBLEMS = 1000  # of one header: a hostile one could make millions
FIRST_READ = 1 << 17  # one request over the network covers most headers

ReadAt = Callable[[int, int], bytes]


class TensorInfo(NamedTuple):
    """One tensor as a header describes it; `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(slots=True)
class Header:
    """The header of one shard. `digest` is the SHA-256 of its JSON bytes."""

    file: str
    tensors: list[TensorInfo] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = 0
    file_size: int = 0
    digest: str = ""
    problems: list[Finding] = field(default_factory=list)
    # Set where the file ends before its data does, and the caller asked only for headers.
    data_missing: bool = False


def header_digest(file_size: int, read_at: ReadAt) -> str:
    """Return the SHA-256 of a header's JSON bytes without looking into them."""
    first = read_at(0, min(FIRST_READ, file_size))
    length = min(int.from_bytes(first[:LENGTH_BYTES], "little"), file_size)
    data = first[LENGTH_BYTES : LENGTH_BYTES + length]
    return hashlib.sha256(data + read_at(LENGTH_BYTES + len(data), length - len(data))).hexdigest()


def scan_header(file: str, file_size: int, read_at: ReadAt, *, headers_only: bool = False) -> Header:
    """Read and check the header of `file`; never raises for what the bytes contain.

    `headers_only` accepts a file that ends before its data does (a shard of which only the header was
    copied): enough to count parameters, never to write.
    """
    header = Header(file=file, file_size=file_size)

    def bad(code: str, message: str, tensor: str | None = None, *, fatal: bool = True) -> None:
        severity: Severity = "error" if fatal else "warning"
        if len(header.problems) < MAX_PROBLEMS:
            header.problems.append(Finding(code, message, file, tensor, severity=severity, fatal=fatal))

    first = read_at(0, min(FIRST_READ, file_size)) if file_size else b""
    if other := _other_file_type(first):
        bad("S08", f"is {other}, not safetensors")
        return header
    if file_size < LENGTH_BYTES:
        bad("S01", f"is {file_size} bytes long, too short for a safetensors file")
        return header
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        bad("S01", f"declares a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}")
        return header
    if LENGTH_BYTES + length > file_size:
        bad("S01", f"declares a header of {length:,} bytes but is only {file_size:,} bytes long")
        return header
    data = first[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(data) < length:
        data += read_at(LENGTH_BYTES + len(data), length - len(data))
    if len(data) < length:
        bad("S01", "ends inside its header")
        return header
    header.data_start = LENGTH_BYTES + length
    header.digest = hashlib.sha256(data).hexdigest()
    if not data.startswith(b"{"):
        bad("S02", "the header does not start with '{'", fatal=not data.lstrip(b" \t\r\n").startswith(b"{"))
    try:
        table = parse_json(data)
    except ValueError as error:
        bad("S02", f"the header is not valid JSON: {error}")
        return header
    if not isinstance(table, dict):
        bad("S02", "the header is not a JSON object")
        return header
    for name in repeated_keys(table):
        bad("S03", "the name occurs twice in the header", name)
    _read_metadata(header, table.pop("__metadata__", None), bad)
    for name, entry in table.items():
        info = _read_entry(header, name, entry, bad)
        if info is not None:
            header.tensors.append(info)
    header.tensors.sort(key=lambda t: (t.start, t.nbytes))
    if len(header.tensors) == len(table):  # else there are holes where the entries that were refused would be
        _check_extent(header, bad, headers_only)
    return header


def read_header(file: str, file_size: int, read_at: ReadAt) -> Header:
    """Read a header; raise CheckpointError at its first fatal problem."""
    header = scan_header(file, file_size, read_at)
    for problem in header.problems:
        if problem.fatal:
            raise problem.as_error()
    return header


def _other_file_type(first: bytes) -> str | None:
    """Name the actual file type where it is a common one in place of weights (HTML, pickle, …)."""
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if first.startswith(b"PK\x03\x04"):
        return "a zip archive (perhaps a PyTorch pickle)"
    # A pickle starts with PROTO and a version; as a header length those bytes would be enormous.
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and first[2:3] in b"}]c(\x8a\x95":
        return "a Python pickle"
    if first.startswith(b"GGUF"):
        return "a GGUF file"
    if first[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    return None


Bad = Callable[..., None]


def _read_metadata(header: Header, metadata: object, bad: Bad) -> None:
    if metadata is None:
        bad("S07", "the header has no __metadata__ (older loaders ask for its 'format')", fatal=False)
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        bad("S07", "__metadata__ is not an object of strings")
        return
    for key in repeated_keys(metadata):
        bad("S03", f"__metadata__ has the key {key!r} twice")
    header.metadata = dict(metadata)


_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})


def bounded_count(shape: Sequence[int]) -> int | None:
    """Return the number of elements of a shape; None where a factor takes it beyond MAX_ELEMENTS."""
    elements = 1
    for size in shape:
        elements *= size
        if elements > MAX_ELEMENTS:
            return None
    return elements


def _read_entry(header: Header, name: str, entry: object, bad: Bad) -> TensorInfo | None:
    if not isinstance(entry, dict):
        bad("S02", "the entry is not an object", name)
        return None
    for key in repeated_keys(entry):
        bad("S03", f"the entry has the key {key!r} twice", name)
    if wrong := wrong_name(name):
        bad("P07", f"the name {wrong}", name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if len(entry) > 3 or not entry.keys() <= _ENTRY_KEYS:
        bad("S02", f"the entry has unknown keys {reprlib.repr(sorted(entry.keys() - _ENTRY_KEYS))}", name)
    bits = SAFETENSORS_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        bad("S04", f"unknown dtype {reprlib.repr(dtype)}", name)
        return None
    if not _are_sizes(shape):
        bad("S04", f"shape {reprlib.repr(shape)} is not a list of non-negative integers", name)
        return None
    if not _are_sizes(offsets) or len(offsets) != 2:
        bad("S05", f"data_offsets {reprlib.repr(offsets)} are not two non-negative integers", name)
        return None
    elements = bounded_count(shape)
    if elements is None:
        bad("S04", f"shape {reprlib.repr(shape)} has more elements than a file can hold", name)
        return None
    begin, end = offsets
    if 8 * (end - begin) != elements * bits:
        needed = f"{dtype} {reprlib.repr(shape)} takes {elements * bits / 8:g} bytes"
        bad("S05", f"{needed}, data_offsets hold {end - begin}", name)
        return None
    assert isinstance(dtype, str)
    return TensorInfo(name, dtype, tuple(shape), header.file, header.data_start + begin, end - begin)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of non-negative integers of 63 bits; a boolean or a float is none."""
    if type(value) is not list:
        return False
    for n in value:  # noqa: SIM110 - all() takes twice as long, and this runs twice for each of 140,000 tensors
        if type(n) is not int or not 0 <= n <= MAX_ELEMENTS:
            return False
    return True


def wrong_name(name: str) -> str | None:
    """Return why a tensor name is invalid: no model has such a name, and tools may mishandle it."""
    if not name:
        return "is empty"
    if not name.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        return "contains control characters"
    if ("/" in name or "\\" in name) and (".." in re.split(r"[/\\]", name) or name[0] in "/\\"):
        return "is a path that leads elsewhere"
    return None


def _check_extent(header: Header, bad: Bad, headers_only: bool) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing after the last."""
    position = header.data_start
    for info in header.tensors:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            bad("S06", f"{what} (starts at byte {info.start:,}, expected {position:,})", info.name)
            return
        position += info.nbytes
    if position == header.file_size or any(p.fatal for p in header.problems):
        return
    if position > header.file_size:
        header.data_missing = headers_only
        if not headers_only:
            bad("S06", f"is truncated: {header.file_size:,} bytes, its header describes {position:,}")
    else:
        bad("S06", f"has {header.file_size - position:,} bytes after its last tensor")
