"""Checkpoints on the Hub and behind fsspec URLs, read by ranges: `hf://org/name@revision`, `s3://…`, `https://…`."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.http_answers import CHANGED, RangeRequest, http_answers
from moesurgery.checkpoint.hub_client import bound_the_hub, bounded
from moesurgery.checkpoint.source import (
    MAX_FILE_BYTES,
    MAX_FILES,
    LocalSource,
    Source,
    contained,
    gguf_parts,
    gguf_stem,
    is_contained,
)
from moesurgery.errors import CheckpointError

_HUB_MODEL = re.compile(
    r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+(/[^/@]+)*?))?/*"
    r"((?<=/)(?P<file>[^@]+\.gguf)(@(?P<last>[^@]+))?)?/*"
)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

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
        request = RangeRequest(f"{self.label}/{contained(file)}", start, stop, size, file, self.seen)
        with remote_errors(request.where):
            data = self._range(request)
        if size is not None:
            request.check_length(len(data))
        return data

    def _range(self, request: RangeRequest) -> bytes:
        """Request a range, and check what the answer says of itself."""
        system, root = self._open()
        path = f"{root.rstrip('/')}/{request.file}"
        more: dict[str, Any] = http_answers(request) if self._is_http else {}
        if not self._is_hub and not self._is_http and request.file not in self.seen:
            self.check(request.file)
        return bytes(system.cat_file(path, start=request.start, end=request.stop, **more))

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

    def _range(self, request: RangeRequest) -> bytes:
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
        url = hf_hub_url(repository, request.file, subfolder=folder or None, revision=commit)
        headers = {**build_hf_headers(), "range": f"bytes={request.start}-{request.stop - 1}"}
        answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        request.check(answer.status_code, answer.headers)
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
