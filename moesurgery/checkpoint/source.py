"""Where the bytes of a checkpoint come from: what any source has, and a local directory.

A source has file names (relative, '/'-separated), sizes, and a method to read a byte range. It never
follows a path out of the checkpoint. Sources are small and picklable, so that a shard task can carry one
to another process.

A source records the state of every file when it is first seen: a file that is replaced or overwritten afterwards is an
error, since the output would mix bytes of two models.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from moesurgery.checkpoint.http_answers import CHANGED
from moesurgery.errors import CheckpointError

MAX_FILES = 20_000  # a checkpoint directory with more is a mistake (a home directory, a data set)
MAX_FILE_BYTES = 1 << 60  # larger sizes reported by a server are rejected
_BLOCK = 8 << 20
_GGUF_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_MOST_BLOCKS = 9_999


class Source(Protocol):
    """Read access to the files of one checkpoint."""

    @property
    def name(self) -> str:
        """A short name for output folders and cards: never a local path."""

    @property
    def identity(self) -> str:
        """What provenance records: `hf://org/name@<commit>`, a URL, or the folder's name."""

    def files(self) -> dict[str, int]:
        """Return every regular file below the root with its size in bytes."""

    def irregular(self) -> dict[str, str]:
        """Return what is neither a regular file nor a folder, with what it is: never opened."""

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return `length` bytes of `file` from `start`; fewer only at its end.

        Raises CheckpointError where they cannot be read, or the file is not what it was when it was first seen.
        """

    def version(self, file: str) -> str:
        """Return an identifier of the current state of `file`, such as an ETag; "" where there is none."""

    def check(self, file: str, descriptor: int | None = None) -> None:
        """Raise CheckpointError where `file` is not what it was when it was first seen.

        `descriptor`: of the opened file, which may have been replaced under its name since.
        """

    def local(self, file: str) -> Path | None:
        """Return a path that the kernel can copy from, or None where there is none."""


def gguf_parts(file: str) -> list[str]:
    """Return the names of all files of the GGUF that `file` is, or is a part of, in order."""
    if (match := _GGUF_SPLIT.fullmatch(file)) is None or not 0 < int(match["count"]) <= _MOST_BLOCKS:
        return [file]
    count = int(match["count"])
    return [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def gguf_stem(file: str) -> str:
    """Return what a GGUF file is called without its ending and the number of the part."""
    match = _GGUF_SPLIT.fullmatch(file)
    return match["stem"] if match is not None else file[: -len(".gguf")]


def read_in_parts(source: Source, file: str, size: int) -> Iterator[bytes]:
    """Yield the `size` bytes of a file in parts of 8 MB; a part is shorter where the file ends before."""
    for start in range(0, size, _BLOCK):
        yield source.read(file, start, min(_BLOCK, size - start))


def is_contained(file: str) -> bool:
    """Whether `file` is a plain relative path inside a checkpoint."""
    path = PurePosixPath(file)
    if not file or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
        return False
    return bool(path.parts) and ":" not in path.parts[0]


def contained(file: str) -> str:
    """Return `file` if it is a plain relative path inside a checkpoint; raise CheckpointError."""
    if not is_contained(file):
        raise CheckpointError(
            f"the path {file!r} leaves the checkpoint",
            "a checkpoint may only name files beside its config.json; do not use this one",
        )
    return file


class _State(NamedTuple):
    """The state of a local file, by which a replaced or overwritten file is detected."""

    inode: int
    size: int
    written: int  # ns

    def change(self, now: _State) -> str | None:
        """Describe how a file's state differs from this one; None where it does not."""
        if now.inode != self.inode:
            return "was replaced by another file"
        if now.size != self.size:
            return f"has {now.size:,} bytes now, it had {self.size:,}"
        return "was written to" if now.written != self.written else None


def _state(status: os.stat_result) -> _State:
    return _State(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class LocalSource:
    """A directory, with Hub cache symlinks (`snapshots/<sha>/x -> ../../blobs/<digest>`) allowed.

    `seen`: the state of each file when it was first listed or read. `chosen`: the GGUF file that was named; of the
    directory it and the other parts that it is split into are then all there is.
    """

    root: Path
    seen: dict[str, _State] = field(default_factory=dict, repr=False, compare=False)
    chosen: str | None = None

    @property
    def name(self) -> str:
        if self.chosen is not None:
            return gguf_stem(self.chosen)
        snapshot = self.root.resolve()
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            return snapshot.parent.parent.name.split("--")[-1]
        return snapshot.name or "model"

    @property
    def identity(self) -> str:
        if self.chosen is not None:
            return self.chosen
        snapshot = self.root.resolve()
        repository = snapshot.parent.parent.name
        if snapshot.parent.name == "snapshots" and repository.startswith("models--"):
            return "hf://" + "/".join(repository.split("--")[1:]) + "@" + snapshot.name
        return self.name

    def files(self) -> dict[str, int]:
        states = {name: entry for name, entry in self._entries() if isinstance(entry, _State)}
        for name, state in states.items():
            self.seen.setdefault(name, state)
        return {name: state.size for name, state in states.items()}

    def irregular(self) -> dict[str, str]:
        return {name: entry for name, entry in self._entries() if isinstance(entry, str)}

    def _entries(self) -> Iterator[tuple[str, _State | str]]:
        """Yield (name, state) of regular files and (name, kind) of everything else, in order of names."""
        if self.chosen is not None:
            parts = [name for name in gguf_parts(self.chosen) if os.path.lexists(self.root / name)]
            yield from ((name, _state_or_kind(self.root / name)) for name in parts)
            return
        waiting = [self.root]
        count = 0
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    ordered = sorted(entries, key=lambda e: e.name)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None
            inside = [e for e in ordered if e.is_dir(follow_symlinks=False)]
            waiting += [Path(e.path) for e in reversed(inside) if not _skipped(Path(e.path))]
            for entry in ordered:
                if entry.is_dir(follow_symlinks=False):
                    continue
                count += 1
                if count > MAX_FILES:
                    raise CheckpointError(
                        f"{self.root} holds more than {MAX_FILES:,} files", "name the model's own folder"
                    )
                path = Path(entry.path)
                yield path.relative_to(self.root).as_posix(), _state_or_kind(path)

    def local(self, file: str) -> Path:
        """Return the real path of `file`; raise CheckpointError where it leads out of the checkpoint."""
        path = self.root / contained(file)
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise CheckpointError(f"{path} is missing", "copy or download the checkpoint again") from None
        if file != self.chosen and not any(real.is_relative_to(allowed) for allowed in self._allowed()):
            raise CheckpointError(
                f"{path} is a link to {real}, outside the checkpoint",
                "replace the link by the file; only a Hub cache may link to its own blobs",
            )
        if not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        return real

    def _allowed(self) -> list[Path]:
        root = self.root.resolve()
        allowed = [root]
        for parent in root.parents:
            if parent.name == "snapshots":
                allowed.append(parent.parent / "blobs")
        return allowed

    def read(self, file: str, start: int, length: int) -> bytes:
        path = self.local(file)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            hint = "ask for the right to read it" if error.errno == errno.EACCES else None
            raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint) from None
        try:
            blocks = []
            while length > 0 and (block := os.pread(descriptor, min(length, _BLOCK), start)):
                blocks.append(block)
                start += len(block)
                length -= len(block)
            # The time of a write is set before its first byte: what was read until now is of the state seen now.
            self.hold(file, os.fstat(descriptor))
            return b"".join(blocks)
        except OSError as error:
            raise CheckpointError(f"{path}, byte {start:,}: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def version(self, file: str) -> str:
        return " ".join(map(str, _state(self.local(file).stat())))

    def check(self, file: str, descriptor: int | None = None) -> None:
        try:
            for where in (self.root / file,) if descriptor is None else (descriptor, self.root / file):
                self.hold(file, os.stat(where))
        except OSError as error:
            raise CheckpointError(
                f"{self.root / file} changed while it was in use: {error.strerror}", CHANGED
            ) from None

    def hold(self, file: str, status: os.stat_result) -> None:
        """Raise CheckpointError where a file is not in the state in which it was first seen: this one, if it is new."""
        now = _state(status)
        if change := self.seen.setdefault(file, now).change(now):
            raise CheckpointError(f"{self.root / file} changed while it was in use: it {change}", CHANGED)


def _skipped(folder: Path) -> bool:
    """Whether a folder is no part of a model: version control, download caches, another model.

    A model inside a model is an edit that was written there, mostly.
    """
    if folder.name in (".git", ".cache", ".moesurgery") or folder.name.endswith(".partial"):
        return True
    if (folder / "moesurgery.json").exists():
        return True
    return (folder / "config.json").exists() and next(folder.glob("*.safetensors"), None) is not None


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a link to a folder",
    stat.S_IFLNK: "a link to nothing",
}


def _state_or_kind(path: Path) -> _State | str:
    """Return the state of a regular file (links followed), or what else it is."""
    try:
        try:
            status = path.stat()
        except OSError:
            status = path.lstat()
    except OSError as error:  # gone since it was listed, as files of /proc are
        return f"a name of nothing ({error.strerror})"
    kind = stat.S_IFMT(status.st_mode)
    return _state(status) if kind == stat.S_IFREG else _KINDS.get(kind, "no regular file")
