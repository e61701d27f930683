"""Where the bytes of a checkpoint come from: a local directory, the Hub, or any fsspec URL.

A source has file names (relative, '/'-separated), sizes, and a method to read a byte range. It never
follows a path out of the checkpoint. Sources are small and picklable, so that a shard task can carry one
to another process.

A source records the state of every file when it is first seen: a file that is replaced or overwritten afterwards is an
error, since the output would mix bytes of two models.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from moesurgery.checkpoint.http_answers import CHANGED, Asked, http_answers, hub_answers
from moesurgery.checkpoint.web import bound_the_hub, bounded
from moesurgery.errors import CheckpointError

MAX_FILES = 20_000  # a checkpoint directory with more is a mistake (a home directory, a data set)
MAX_FILE_BYTES = 1 << 60  # larger sizes reported by a server are rejected
_BLOCK = 8 << 20
_HUB_MODEL = re.compile(
    r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+(/[^/@]+)*?))?/*"
    r"((?<=/)(?P<file>[^@]+\.gguf)(@(?P<last>[^@]+))?)?/*"
)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_GGUF_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_MOST_BLOCKS = 9_999
# The address that a browser shows for a model; `kind` is what else the Hub has.
_HUB_PAGE = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/((?P<kind>datasets|spaces|collections|docs)/)?"
    r"(?P<name>[\w.-]+/[\w.-]+)?(/(tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)


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


# Keys of fsspec file info that change when, and only when, the file does.
_TELLING = (
    *("size", "ino", "mtime", "ETag", "etag", "checksum", "md5", "md5Hash", "content_md5", "Content-MD5", "crc32c"),
    *("generation", "version_id", "VersionId", "LastModified", "last_modified", "updated", "modified"),
)


@dataclass(frozen=True)
class RemoteSource:
    """Files behind an fsspec URL, read by ranges: `hf://org/name@revision`, `s3://…`, `https://…`.

    `url` is what fsspec opens; for the Hub it names a commit, so that every range is of one version. `sizes` are those
    of the listing. `seen`: an identifier of each file's state when it was first read: its ETag, or other file info.
    `chosen` as for `LocalSource`.
    """

    url: str
    label: str
    sizes: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    seen: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    chosen: str | None = None
    _local: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)
    _shared: list[tuple[Any, str]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[RemoteSource], tuple[Any, ...]]:
        return type(self), (self.url, self.label, self.sizes, self.seen, self.chosen)

    @property
    def name(self) -> str:
        if self.chosen is not None:
            return gguf_stem(self.chosen)
        return self.label.split("@")[0].rstrip("/").rsplit("/", 1)[-1] or "model"

    @property
    def identity(self) -> str:
        return f"{self.label}/{self.chosen}" if self.chosen is not None else self.label

    def _open(self) -> tuple[Any, str]:
        """Return a file system, of all threads where it is asynchronous inside, else of this one, and its root path."""
        if self._shared:
            return self._shared[0]
        if not hasattr(self._local, "opened"):
            import fsspec

            if self.url.startswith("hf://"):
                bound_the_hub()  # here too: a shard may be written by a process of its own
            try:
                self._local.opened = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise CheckpointError(
                    f"{self.url} cannot be opened: {error}", "see README.md, 'Remote models'"
                ) from None
            except Exception as error:  # of any kind: protocols are third-party code
                reason = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{self.url} cannot be opened: {reason}", "check the address") from None
            if self._local.opened[0].async_impl:
                self._shared.append(self._local.opened)
        return self._local.opened  # type: ignore[no-any-return]

    def files(self) -> dict[str, int]:
        sizes = {name: size for name, size in self._listed() if is_contained(name)}
        for name, size in sizes.items():
            self.sizes.setdefault(name, size)
        return sizes

    def irregular(self) -> dict[str, str]:
        return {name: "a path out of the checkpoint" for name, _ in self._listed() if not is_contained(name)}

    def _listed(self) -> list[tuple[str, int]]:
        system, root = self._open()
        with remote_errors(self.identity):
            parts = [f"{root.rstrip('/')}/{part}" for part in gguf_parts(self.chosen)] if self.chosen else None
            if parts is not None and not self._is_hub:  # a folder of a web server need not be listed
                entries = {part: system.info(part) for part in parts if len(parts) == 1 or system.exists(part)}
            else:
                entries = system.find(root, detail=True)
                if self._is_http:  # whose lists of links give no sizes
                    entries = {path: system.info(path) for path in entries if "?" not in path}
                entries = entries if parts is None else {part: entries[part] for part in parts if part in entries}
        if len(entries) > MAX_FILES:
            raise CheckpointError(f"{self.label} holds more than {MAX_FILES:,} files", "name the model's own folder")
        prefix = root.rstrip("/") + "/"
        files = [(p.removeprefix(prefix), d.get("size")) for p, d in sorted(entries.items()) if d.get("type") == "file"]
        for file, size in files:
            if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
                raise CheckpointError(
                    f"{self.label}/{file}: the server says that it has {size!r} bytes", "download the model first"
                )
        return files

    def local(self, file: str) -> None:
        contained(file)

    def read(self, file: str, start: int, length: int) -> bytes:
        size = self.sizes.get(file)
        stop = start + length if size is None else min(start + length, size)
        if stop <= start:
            return b""
        asked = Asked(f"{self.label}/{contained(file)}", start, stop, size, file, self.seen)
        with remote_errors(asked.where):
            data = self._range(asked)
        if size is not None:
            asked.check_length(len(data))
        return data

    def _range(self, asked: Asked) -> bytes:
        """Request a range, and check what the answer says of itself."""
        system, root = self._open()
        path = f"{root.rstrip('/')}/{asked.file}"
        more: dict[str, Any] = http_answers(asked) if self._is_http else {}
        if not self._is_hub and not self._is_http and asked.file not in self.seen:
            self.check(asked.file)
        return bytes(system.cat_file(path, start=asked.start, end=asked.stop, **more))

    @property
    def _is_hub(self) -> bool:
        return self.url.startswith("hf://")

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def version(self, file: str) -> str:
        return "" if self._is_hub else self._state(file)  # the commit is in the name

    def check(self, file: str, descriptor: int | None = None) -> None:
        if self._is_hub or self._is_http:
            return  # each answer was checked when it came
        now = self._state(file)
        if now != self.seen.setdefault(file, now):
            raise CheckpointError(f"{self.label}/{file} changed while it was in use", CHANGED)

    def _state(self, file: str) -> str:
        """Request an identifier of a file's state from the server, bypassing caches."""
        system, root = self._open()
        with remote_errors(f"{self.label}/{file}"):
            system.invalidate_cache()
            facts = system.info(f"{root.rstrip('/')}/{contained(file)}")
        known = [key for key in _TELLING if facts.get(key) is not None]
        return " ".join(
            f"{key}={facts[key]}" for key in (known if len(known) > 1 else ("size", "created")) if key in facts
        )


class remote_errors:  # noqa: N801 - reads as a statement
    """Turn whatever a remote library raises into a CheckpointError about `where`; bound size and time of responses."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._bounds = bounded(where)

    def __enter__(self) -> None:
        self._bounds.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._bounds.__exit__(None, None, None)
        if error is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
            return
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, (TypeError, LookupError, AttributeError)):
            reason = f"the server's answer is not understood ({type(error).__name__}: {reason})"
        hint = "check the name and the network; for a private model set HF_TOKEN"
        raise CheckpointError(f"{self.where} cannot be read: {reason}", hint) from None


@dataclass(frozen=True)
class HubSource(RemoteSource):
    """A commit on the Hub. Files that are in the Hub's cache are read there, all others by ranges."""

    snapshot: LocalSource | None = None

    def __reduce__(self) -> tuple[type[RemoteSource], tuple[Any, ...]]:
        return type(self), (self.url, self.label, self.sizes, self.seen, self.chosen, self.snapshot)

    def local(self, file: str) -> Path | None:  # type: ignore[override]
        contained(file)
        if self.snapshot is None or not (self.snapshot.root / file).exists():
            return None
        return self.snapshot.local(file)

    def read(self, file: str, start: int, length: int) -> bytes:
        if self.snapshot is not None and self.local(file) is not None:
            return self.snapshot.read(file, start, length)
        return super().read(file, start, length)

    def _range(self, asked: Asked) -> bytes:
        # Not by fsspec, whose file systems, one for each thread, ask again which commit and what file it is.
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        bound_the_hub()  # here too: a shard may be written by a process of its own
        repository, _, below = self.url.removeprefix("hf://").partition("@")
        commit, _, folder = below.partition("/")
        url = hf_hub_url(repository, asked.file, subfolder=folder or None, revision=commit)
        headers = {**build_hf_headers(), "range": f"bytes={asked.start}-{asked.stop - 1}"}
        with hub_answers(asked):
            answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
            return answer.content

    def check(self, file: str, descriptor: int | None = None) -> None:
        if self.snapshot is not None and self.local(file) is not None:
            self.snapshot.check(file, descriptor)


def open_hub(reference: str) -> Source:
    """Resolve `hf://org/name[@revision]`, or `hf://org/name/file.gguf`, to a commit and return its source.

    With HF_HUB_OFFLINE=1 that is the snapshot in the Hub's cache, and no request is made.
    """
    from huggingface_hub import HfApi, constants

    named = _HUB_MODEL.fullmatch(reference)
    if named is None:
        raise CheckpointError(
            f"{reference} does not name a model",
            "write hf://org/name or hf://org/name@revision, or hf://org/name/file.gguf for a GGUF",
        )
    repository, revision, file = named["repository"], named["revision"] or named["last"] or "", named["file"]
    folder, _, chosen = contained(file).rpartition("/") if file else ("", "", None)
    below = f"/{folder}" if folder else ""
    if constants.HF_HUB_OFFLINE:
        snapshot = _cached_snapshot(repository, revision)
        if snapshot is None:
            raise CheckpointError(
                f"{reference} is not in the Hub's cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
                f"unset HF_HUB_OFFLINE, or download it first: hf download {repository}{f' {file}' if file else ''}",
            )
        return LocalSource(snapshot.root / folder, chosen=chosen) if chosen else snapshot
    bound_the_hub()
    try:
        with remote_errors(reference):
            commit = HfApi().model_info(repository, revision=revision or None).sha
    except CheckpointError as error:
        if _cached_snapshot(repository, revision) is not None:
            error.hint = f"{error.hint}; HF_HUB_OFFLINE=1 reads the snapshot in the Hub's cache"
        raise
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{reference}: the server names no commit, but {commit!r}", "is it the Hub that answers?")
    label = f"hf://{repository}@{commit}{below}"
    snapshot = _cached_snapshot(repository, commit)
    if snapshot is not None and folder:
        snapshot = LocalSource(snapshot.root / folder)
    return HubSource(url=label, label=label, chosen=chosen, snapshot=snapshot)


def _cached_snapshot(repository: str, revision: str) -> LocalSource | None:
    """Return the folder of a revision in the Hub's cache, which may lack files; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return LocalSource(Path(folder))


def open_source(reference: str | Path) -> Source:
    """Return the source that `reference` names: a directory, a GGUF file, `hf://…`, a URL.

    Raises CheckpointError for a path that does not exist; a bare `org/name` is not looked up on the Hub,
    so that a typing error never reaches the network.
    """
    text = str(reference)
    if text.startswith("hf://"):
        return open_hub(text)
    if page := _HUB_PAGE.match(text):
        kind, name, revision = page["kind"], page["name"], page["revision"]
        if kind or not name:
            raise CheckpointError(f"{text} is a page of the Hub, and no model", "name a model: hf://org/name")
        raise CheckpointError(
            f"{text} is a page of the Hub", f"write hf://{name}{f'@{revision}' if revision else ''} for the model"
        )
    if "://" in text:
        if text.lower().endswith(".gguf"):
            folder, _, chosen = text.rpartition("/")
            return RemoteSource(url=folder, label=folder, chosen=chosen)
        return RemoteSource(url=text, label=text)
    path = Path(text)
    if os.path.isdir(text):  # False for a name that no file can have
        return LocalSource(path)
    if os.path.isfile(text):
        if path.suffix.lower() == ".gguf":
            return LocalSource(path.parent, chosen=path.name)
        raise CheckpointError(f"{text} is a file, not a checkpoint directory", f"try {path.parent}")
    hint = None
    if text.startswith("hf:"):
        hint = f"for a model on the Hub write hf://{text.removeprefix('hf:').lstrip('/')}"
    elif near := nearest_path(path):
        hint = f"did you mean {near}?"
    elif len(path.parts) == 2 and not path.is_absolute() and not text.startswith("."):
        hint = f"for a model on the Hub write hf://{text}"
    raise CheckpointError(f"{text}: no such directory", hint)


def nearest_path(path: Path) -> Path | None:
    """Return the entry beside `path` with the most similar name; None where there is none."""
    try:
        beside = [name for _, name in zip(range(MAX_FILES), sorted(os.listdir(path.parent)), strict=False)]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, [name for name in beside if not name.startswith(".")], n=1)
    return path.with_name(close[0]) if close else None
