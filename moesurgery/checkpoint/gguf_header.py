"""A strict reader of GGUF headers: metadata, then what tensors there are and where. No library, no numpy.

As strict as llama.cpp's own loader where that refuses (order and padding of tensors, names, alignment), and stricter
where it would read on: no length is believed before the file is known to hold as much. All that is wrong is listed, up
to what makes the rest unreadable. Shapes are given as numpy has them, [experts, out, in]: GGUF's order reversed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesurgery.checkpoint.dtypes import BLOCKS, GGUF_TYPES, byte_count
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.header import MAX_PROBLEMS, Header, ReadAt, TensorInfo, bounded_count, wrong_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_GGUF_HEADER = 1 << 28  # vocabularies of 260,000 tokens take 15 MB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME = 63  # bytes of a tensor's name
_MAX_KEY = 65535
_MAX_DIMENSIONS = 4
_SHOWN = 4096  # entries of an array that are kept as values; of a longer one a digest is
_FIRST_READ = 1 << 17

# Types of values by their number: struct's letter, or what they are.
STRING, ARRAY, BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(slots=True)
class GgufHeader(Header):
    """The header of one GGUF file.

    `values` has every key's value: a number, a text, a list; of an array of more than 4,096 entries a text with its
    length and digest. `entries` are the bytes of each key with its value, as the file has them, `kinds` their types;
    `lengths` says of arrays how long they are.
    """

    values: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, bytes] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    version: int = 3
    alignment: int = DEFAULT_ALIGNMENT


class _BadHeaderError(Exception):
    """What is wrong, and nothing after it can be read."""

    def __init__(self, code: str, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.tensor = code, message, tensor


class _Cursor:
    """A place in the file. Reads ahead in growing steps, and never past the file's end or the bound on headers."""

    def __init__(self, size: int, read_at: ReadAt) -> None:
        self._bound = min(size, MAX_GGUF_HEADER)
        self._size = size
        self._read_at = read_at
        self.data = bytearray()
        self.at = 0

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes, and return where they begin in `data`."""
        start = self.at
        if count > self._bound - start:
            if start + count <= self._size:
                raise _BadHeaderError("G02", f"its header is larger than {MAX_GGUF_HEADER:,} bytes")
            raise _BadHeaderError(
                "G02", f"ends inside its header: {what} takes {count:,} bytes, {self._size - start:,} are left"
            )
        if start + count > len(self.data):
            wanted = min(self._bound, max(start + count, 2 * len(self.data), _FIRST_READ))
            self.data += self._read_at(len(self.data), wanted - len(self.data))
            if start + count > len(self.data):
                raise _BadHeaderError("G02", "ends inside its header")
        self.at = start + count
        return start

    def number(self, letter: str, what: str) -> Any:
        start = self.take(struct.calcsize("<" + letter), what)
        return struct.unpack_from("<" + letter, self.data, start)[0]

    def text(self, what: str, limit: int = MAX_GGUF_HEADER) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise _BadHeaderError("G03", f"{what} says that it is {length:,} bytes long")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise _BadHeaderError("G03", f"{what} is not UTF-8") from None


_Bad = Callable[..., None]


def scan_gguf_header(file: str, file_size: int, read_at: ReadAt, *, headers_only: bool = False) -> GgufHeader:
    """Read and check the header of `file`; never raises for what the bytes contain.

    `headers_only` accepts a file that ends before its data does.
    """
    header = GgufHeader(file=file, file_size=file_size)

    def bad(code: str, message: str, tensor: str | None = None) -> None:
        if len(header.problems) < MAX_PROBLEMS:
            header.problems.append(Finding(code, message, file, tensor, fatal=True))

    cursor = _Cursor(file_size, read_at)
    try:
        tensors, keys = _read_counts(header, cursor)
        for _ in range(keys):
            _read_key(header, cursor, bad)
        _read_alignment(header, bad)
        infos = [_read_info(header, cursor, bad) for _ in range(tensors)]
    except _BadHeaderError as error:
        bad(error.code, error.message, error.tensor)
        return header
    header.data_start = -(-cursor.at // header.alignment) * header.alignment
    header.digest = hashlib.sha256(cursor.data[: cursor.at]).hexdigest()
    known: list[TensorInfo] = []
    for info in infos:
        if info is not None:
            known.append(info._replace(start=header.data_start + info.start))
    if len(known) == len(infos) and not header.problems:
        _check_extent(header, known, bad, headers_only)
    header.tensors = known
    return header


def read_gguf_header(file: str, file_size: int, read_at: ReadAt) -> GgufHeader:
    """Read a header; raise CheckpointError at its first problem."""
    header = scan_gguf_header(file, file_size, read_at)
    for problem in header.problems:
        raise problem.as_error()
    return header


def _read_counts(header: GgufHeader, cursor: _Cursor) -> tuple[int, int]:
    start = cursor.take(4, "the magic number")
    if cursor.data[start : start + 4] != MAGIC:
        raise _BadHeaderError("G01", f"does not begin with 'GGUF' but with {bytes(cursor.data[start : start + 4])!r}")
    header.version = cursor.number("I", "the version")
    if header.version not in VERSIONS:
        swapped = int.from_bytes(header.version.to_bytes(4, "little"), "big") in VERSIONS
        what = "of a machine with the bytes of numbers in reverse" if swapped else f"of version {header.version:,}"
        raise _BadHeaderError("G01", f"is a GGUF {what}; little-endian ones of versions 2 and 3 are read")
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    for count, limit, least, what in ((keys, MAX_KEYS, 13, "keys"), (tensors, MAX_TENSORS, 25, "tensors")):
        if count > min(limit, header.file_size // least):
            raise _BadHeaderError(
                "G02", f"says that it has {count:,} {what}, more than {header.file_size:,} bytes hold"
            )
    return tensors, keys


def _read_key(header: GgufHeader, cursor: _Cursor, bad: _Bad) -> None:
    """Read one key and its value."""
    first = cursor.at
    key = cursor.text("a key", _MAX_KEY)
    if not key or not key.isprintable():
        bad("G03", f"has the key {key!r}, which is empty or holds control characters")
    if key in header.values:
        bad("G03", f"has the key {key!r} twice")
    kind = cursor.number("I", f"the type of {key!r}")
    if kind == ARRAY:
        header.values[key], header.lengths[key] = _read_array(cursor, key)
    else:
        header.values[key] = _read_scalar(cursor, kind, key)
    header.kinds[key] = kind
    header.entries[key] = bytes(cursor.data[first : cursor.at])


def _read_scalar(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return cursor.text(f"the value of {key!r}")
    if kind not in _SCALARS:
        raise _BadHeaderError("G03", f"{key!r} has a value of type {kind}, which is none")
    if kind == BOOL and (value := cursor.number("B", f"the value of {key!r}")) > 1:
        raise _BadHeaderError("G03", f"{key!r} is neither true nor false, but {value}")
    return bool(value) if kind == BOOL else cursor.number(_SCALARS[kind], f"the value of {key!r}")


def _read_array(cursor: _Cursor, key: str) -> tuple[Any, int]:
    """Return the value of an array as `GgufHeader` has it, and how long it is."""
    kind, count = cursor.number("I", f"the type of {key!r}"), cursor.number("Q", f"the length of {key!r}")
    start = cursor.at
    if kind in _SCALARS:
        size = struct.calcsize("<" + _SCALARS[kind])
        cursor.take(count * size, f"the array {key!r}")
        if count <= _SHOWN:
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", cursor.data, start)), count
    elif kind == STRING:
        if count <= _SHOWN:
            return [cursor.text(f"an entry of {key!r}") for _ in range(count)], count
        cursor.take(8 * count, f"the array {key!r}")  # at least
        cursor.at = start
        for _ in range(count):
            cursor.take(cursor.number("Q", f"an entry of {key!r}"), f"an entry of {key!r}")
    else:
        raise _BadHeaderError("G03", f"{key!r} is an array of type {kind}, which is none that arrays may have")
    digest = hashlib.sha256(cursor.data[start : cursor.at]).hexdigest()
    return f"{count} {'texts' if kind == STRING else 'numbers'}, SHA-256 {digest[:16]}", count


def _read_alignment(header: GgufHeader, bad: _Bad) -> None:
    alignment = header.values.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if ALIGNMENT in header.values and header.kinds[ALIGNMENT] != 4:
        bad("G04", f"{ALIGNMENT} is no 32-bit number")
    elif alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        bad("G04", f"{ALIGNMENT} is {alignment}, which is no power of two up to 1 MiB")
    else:
        header.alignment = alignment


def _read_info(header: GgufHeader, cursor: _Cursor, bad: _Bad) -> TensorInfo | None:
    """Read what is said of one tensor; its `start` counts from where data begins."""
    name = cursor.text("a tensor's name", _MAX_KEY)
    dimensions = cursor.number("I", f"the shape of {name!r}")
    if dimensions > _MAX_DIMENSIONS:
        raise _BadHeaderError("G06", f"has {dimensions:,} dimensions; GGUF allows {_MAX_DIMENSIONS}", name)
    sizes = [cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions)]
    kind, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")
    shape = tuple(reversed(sizes))
    if wrong := wrong_name(name):
        bad("G05", f"the name {wrong}", name)
    elif len(name.encode()) > MAX_NAME:
        bad("G05", f"the name has {len(name.encode())} bytes; llama.cpp reads at most {MAX_NAME}", name)
    dtype = GGUF_TYPES.get(kind)
    if dtype is None:
        bad("G07", f"is of type {kind}, which is not known", name)
        return None
    if bounded_count(sizes) is None:
        bad("G06", f"shape {list(shape)} has more elements than a file can hold", name)
        return None
    if dtype in BLOCKS and (not shape or shape[-1] % BLOCKS[dtype][0]):
        bad("G06", f"{dtype} {list(shape)}: its rows do not fill blocks of {BLOCKS[dtype][0]}", name)
        return None
    if offset % header.alignment:
        bad("G08", f"begins at byte {offset:,} of the data, no multiple of {header.alignment}", name)
        return None
    return TensorInfo(name, dtype, shape, header.file, offset, byte_count(dtype, shape))


def _check_extent(header: GgufHeader, tensors: list[TensorInfo], bad: _Bad, headers_only: bool) -> None:
    """The tensors follow each other in the order of the header, each padded to the alignment, up to the file's end."""
    position = end = header.data_start
    names: set[str] = set()
    for info in tensors:
        if info.name in names:
            bad("G05", "the name occurs twice in the header", info.name)
            return
        names.add(info.name)
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            bad("G08", f"{what} (starts at byte {info.start:,}, expected {position:,})", info.name)
            return
        end = position + info.nbytes
        position += -(-info.nbytes // header.alignment) * header.alignment
    if end > header.file_size:
        header.data_missing = headers_only
        if not headers_only:
            bad("G09", f"is truncated: {header.file_size:,} bytes, its header describes {end:,}")
    elif header.file_size > position and tensors:
        bad("G09", f"has {header.file_size - position:,} bytes after its last tensor")


def encoded_key(key: str, kind: int, value: Any) -> bytes:
    """Return the bytes of a key with its value, which is a number or text of type `kind`."""
    name = key.encode()
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)
    if kind == STRING:
        text = str(value).encode()
        return head + struct.pack("<Q", len(text)) + text
    if isinstance(value, list):
        letter = _SCALARS[kind]
        return head[:-4] + struct.pack("<IIQ", ARRAY, kind, len(value)) + struct.pack(f"<{len(value)}{letter}", *value)
    return head + struct.pack("<" + _SCALARS[kind], value)


def array_kind(entry: bytes, key: str) -> int:
    """Return the type of the entries of an array, from the bytes of its key and value."""
    return int(struct.unpack_from("<I", entry, 8 + len(key.encode()) + 4)[0])
