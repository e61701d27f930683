"""Pickles recognised by content and read as a list of opcodes; nothing is ever unpickled.

Published scanners were bypassed by names, by broken archives and by calls that were not on their lists. So
the presence of a pickle is what is reported, by content and not by name, and a call to anything but the usual
tensor builders only makes it graver: no pickle is ever called clean.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass

from moesurgery.checkpoint.header import ReadAt

MAX_PICKLE = 8 << 20  # bytes of one pickle that are read: what comes later is not judged, and said so
MAX_MEMBERS = 64

# What torch.save and TrainingArguments name; everything else is worth an error.
_USUAL = frozenset(
    ("torch", "numpy", "collections", "transformers", "accelerate", "argparse", "datetime", "copyreg", "_codecs")
)
_BUILT_IN = frozenset(
    (
        *("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "bytes", "bytearray"),
        *("str", "object", "slice", "range"),
    )
)
_NEVER = frozenset(("eval", "exec", "load", "system", "popen", "hub", "compile", "import_module", "getattr"))


@dataclass(frozen=True)
class Pickle:
    """A pickle in a file. `unexpected`: names besides the usual builders. `partial`: only its start was read."""

    kind: str
    unexpected: tuple[str, ...]
    partial: bool


def find_pickle(size: int, read_at: ReadAt) -> Pickle | None:
    """Say whether a file is a pickle, or an archive with one. Reads a bounded part of it."""
    first = read_at(0, min(size, 4096))
    if first.startswith(b"PK\x03\x04"):
        return _in_archive(size, read_at)
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        data = read_at(0, min(size, MAX_PICKLE))
        names, _ = _names(data)
        return Pickle("a Python pickle", _unexpected(names), len(data) < size) if names is not None else None
    if first[:1] in _TEXT_STARTS:
        data = read_at(0, min(size, MAX_PICKLE))
        names, calls = _names(data)
        if names and calls:  # ordinary text now and then begins with valid opcodes, but calls nothing
            return Pickle("a Python pickle (protocol 0)", _unexpected(names), len(data) < size)
    return None


_TEXT_STARTS = frozenset((b"c", b"(", b"]", b"}", b"V", b"S", b"I", b"N"))


class _Window(io.RawIOBase):
    """A file of a checkpoint as zipfile wants it."""

    def __init__(self, size: int, read_at: ReadAt) -> None:
        self.size, self.read_at, self.position = size, read_at, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        data = self.read_at(self.position, min(left, MAX_PICKLE if count < 0 else count))
        self.position += len(data)
        return data


def _in_archive(size: int, read_at: ReadAt) -> Pickle | None:
    """Look for pickles in a zip archive, as torch.save makes them."""
    named: list[str] = []
    partial = False
    try:
        with zipfile.ZipFile(_Window(size, read_at)) as archive:
            members = archive.infolist()
            partial = len(members) > MAX_MEMBERS and not any(m.filename.endswith(".pkl") for m in members)
            members.sort(key=lambda m: not m.filename.endswith(".pkl"))
            seen = False
            for member in members[:MAX_MEMBERS]:
                with archive.open(member) as file:
                    data = file.read(MAX_PICKLE)
                if not member.filename.endswith(".pkl") and data[:1] != b"\x80":
                    continue
                names, _ = _names(data)
                if names is not None:
                    seen = True
                    partial |= member.file_size > len(data)
                    named += names
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError):
        return Pickle("a damaged zip archive (perhaps a PyTorch pickle)", (), True)
    except Exception as error:  # zlib.error and friends are no common base
        if type(error).__name__ in ("error", "LZMAError"):
            return Pickle("a damaged zip archive (perhaps a PyTorch pickle)", (), True)
        raise
    return Pickle("a PyTorch pickle", _unexpected(named), partial) if seen else None


def _names(data: bytes) -> tuple[list[str] | None, bool]:
    """Return the globals that a pickle names (None where it is no pickle), and whether it calls anything."""
    global_names: list[str] = []
    calls = False
    recent: list[str] = []  # the texts pushed last: what STACK_GLOBAL takes
    memo: dict[int, str] = {}
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(data):
            count += 1
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                global_names.append(str(argument).replace(" ", ".", 1))
            elif name == "STACK_GLOBAL":
                global_names.append(".".join(recent[-2:]) if len(recent) >= 2 else "something unnamed")
            elif "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
                recent.append(str(argument))
                del recent[:-8]
            elif name == "MEMOIZE" and recent:
                memo[len(memo)] = recent[-1]
            elif name in ("BINPUT", "LONG_BINPUT", "PUT") and recent:
                memo[int(str(argument))] = recent[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                recent.append(memo.get(int(str(argument)), "?"))
            calls |= name in ("REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD")
    except (ValueError, UnicodeDecodeError, IndexError):
        return (global_names, calls) if count >= 4 and data[:1] == b"\x80" else (None, False)
    return global_names, calls


def _unexpected(names: list[str]) -> tuple[str, ...]:
    unexpected = []
    for name in dict.fromkeys(names):
        module, _, rest = name.partition(".")
        if module in ("builtins", "__builtin__"):
            usual = rest in _BUILT_IN
        else:
            usual = module in _USUAL and not _NEVER.intersection(name.split("."))
        if not usual:
            unexpected.append(name)
    return tuple(unexpected)
