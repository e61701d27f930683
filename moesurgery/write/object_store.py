"""Where an output is uploaded to: a folder of an object store, by fsspec, or a repository of the Hub.

Neither can rename a folder. So files are put there one by one, and what makes them a checkpoint comes last.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesurgery.checkpoint.digest import sampled_digest
from moesurgery.checkpoint.remote_source import RemoteSource
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError, OutputError, SurgeryError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_S3FS_PART = 50 << 20  # bytes of a part of s3fs's multipart uploads, which its ETags tell
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/@]+))?/?")
_AGAIN = "then run the same command again: what is uploaded already is kept"


class Store(Protocol):
    """A place for the files of one output. Names are relative and '/'-separated.

    Every method raises OutputError, with the place and what to do, where the store or the network refuses.
    """

    @property
    def url(self) -> str: ...

    def files(self) -> dict[str, int]:
        """Return every file that is there with its size in bytes; none where there is no such place yet."""

    def begin(self, marker: str, deleted: Sequence[str]) -> None:
        """Put the small file `marker` there, which says that an upload is not finished, and delete others."""

    def upload(self, path: Path, name: str, sha256: str) -> None:
        """Upload a shard, and check what the store then has against the local file."""

    def state(self, name: str) -> str:
        """Return what tells this upload of a file from another."""

    def finish(self, files: Mapping[str, Path], last: Mapping[str, Path], deleted: Sequence[str], marker: str) -> None:
        """Upload small files, delete others, then upload `last`, in order; and delete the marker."""


def is_url(output: object) -> bool:
    """Whether an output is the address of a store, and no folder."""
    return isinstance(output, str) and "://" in output


def open_store(url: str) -> Store:
    """Return the store that a URL names. Raises OutputError for what cannot be written to."""
    protocol, _, rest = url.partition("://")
    if protocol in ("http", "https"):
        raise OutputError(f"{url} is read by web servers' rules, not written", "name a store: s3://, gs:// or hf://")
    if protocol in ("file", "local"):
        raise OutputError(f"{url} is a folder of this machine", f"write its path: -o {rest}")
    if protocol == "hf" and not rest.startswith("buckets/"):
        match = _HUB.fullmatch(url)
        if match is None:
            raise OutputError(
                f"{url} does not name a model of the Hub",
                "write hf://org/name, hf://org/name@revision or hf://buckets/…",
            )
        return HubRepository(match["repository"], match["revision"])
    if not rest.strip("/"):
        raise OutputError(f"{url} names no folder", f"write {protocol}://bucket/name")
    return ObjectStore(url.rstrip("/"))


class ObjectStore:
    """A folder behind an fsspec URL: `s3://bucket/name`, `gs://bucket/name`, `hf://buckets/org/name`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _open(self) -> tuple[Any, str]:
        """Return the file system, one for each thread, and the root path in it."""
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise OutputError(f"{self.url} cannot be opened: {error}", "see docs/stores.md") from None
        return system, root.rstrip("/")

    def files(self) -> dict[str, int]:
        with _store_errors(self.url, "listed"):
            system, root = self._open()
            system.invalidate_cache()
            try:
                entries = system.find(root, detail=True)
            except FileNotFoundError:
                return {}
        files = {path.removeprefix(f"{root}/"): facts for path, facts in entries.items()}
        return {name: facts["size"] for name, facts in files.items() if facts.get("type") == "file"}

    def begin(self, marker: str, deleted: Sequence[str]) -> None:
        with _store_errors(self.url, "written to"):
            system, root = self._open()
            system.pipe_file(f"{root}/{marker}", b"moesurgery has not finished uploading this checkpoint.\n")
            self._delete(deleted)

    def upload(self, path: Path, name: str, sha256: str) -> None:
        self._send(path, name)

    def _send(self, path: Path, name: str) -> None:
        with _store_errors(f"{self.url}/{name}", "uploaded"):
            system, root = self._open()
            system.put_file(str(path), f"{root}/{name}")
        self._check(path, name)

    def _check(self, path: Path, name: str) -> None:
        """Compare size and checksum with the local file; 64 blocks of it where the store gives no checksum of ours."""
        where = f"{self.url}/{name}"
        with _store_errors(where, "checked"):
            system, root = self._open()
            system.invalidate_cache()
            facts = system.info(f"{root}/{name}")
        size = path.stat().st_size
        if facts.get("size") != size:
            raise _differs(where, f"has {facts.get('size')} bytes, and {size:,} were sent")
        if md5 := facts.get("md5Hash"):  # Google's, of files that came in one piece
            if base64.b64decode(md5).hex() != _md5(path):
                raise _differs(where, "has another MD5 than what was sent")
            return
        tag = str(facts.get("ETag") or "").strip('"')
        if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag == (_md5_of_parts(path) if "-" in tag else _md5(path)):
            return
        # Where a bucket encrypts, or another program chose the parts, a tag is no MD5.
        local = LocalSource(path.parent)
        stored = RemoteSource(self.url, self.url, sizes={name: size})
        if sampled_digest(stored, name, size) != sampled_digest(local, path.name, size):
            raise _differs(where, "reads back otherwise than it was sent")

    def state(self, name: str) -> str:
        return RemoteSource(self.url, self.url).version(name)

    def finish(self, files: Mapping[str, Path], last: Mapping[str, Path], deleted: Sequence[str], marker: str) -> None:
        for name, path in files.items():
            self._send(path, name)
        self._delete(deleted)
        for name, path in last.items():
            self._send(path, name)
        self._delete([marker])

    def _delete(self, names: Sequence[str]) -> None:
        with _store_errors(self.url, "deleted from"):
            system, root = self._open()
            for name in names:
                system.rm_file(f"{root}/{name}")


class HubRepository:
    """A model repository of the Hub, made as a private one where there is none. Each upload is a commit."""

    def __init__(self, repository: str, revision: str | None = None) -> None:
        self.repository = repository
        self.revision = revision

    @property
    def url(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")

    def files(self) -> dict[str, int]:
        return {file.path: file.size for file in self._tree()}

    def digests(self) -> dict[str, int]:
        """Return the SHA-256 of every large file that is there, with its size in bytes."""
        return {file.lfs.sha256: file.size for file in self._tree() if file.lfs is not None}

    def _tree(self) -> list[RepoFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with _store_errors(self.url, "listed"):
            try:
                tree = list(HfApi().list_repo_tree(self.repository, recursive=True, revision=self.revision))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return []
        return [file for file in tree if isinstance(file, RepoFile) and file.path != ".gitattributes"]

    def create(self, *, private: bool | None) -> list[str]:
        """Make repository and branch where they are not there; return the files that a new branch begins with.

        `private`: None for what the organisation has set.
        """
        from huggingface_hub import HfApi

        before = self.files()
        with _store_errors(self.url, "made"):
            HfApi().create_repo(self.repository, private=private, exist_ok=True)
            if self.revision:
                HfApi().create_branch(self.repository, branch=self.revision, exist_ok=True)
        return sorted(self.files().keys() - before.keys())

    def begin(self, marker: str, deleted: Sequence[str]) -> None:
        inherited = self.create(private=True)
        content = {marker: b"moesurgery has not finished uploading this checkpoint.\n"}
        self.commit("Begin an upload by moesurgery", content, [*deleted, *inherited])

    def upload(self, path: Path, name: str, sha256: str) -> None:
        self.commit(f"Add {name}", {name: path})
        where = f"{self.url}/{name}"
        with _store_errors(where, "checked"):
            size, stored = self._facts(name)
        if size != path.stat().st_size:
            raise _differs(where, f"has {size} bytes, and {path.stat().st_size:,} were sent")
        if stored is not None and stored != sha256:
            raise _differs(where, "has another SHA-256 than what was sent")

    def state(self, name: str) -> str:
        with _store_errors(f"{self.url}/{name}", "checked"):
            return " ".join(map(str, self._facts(name)))

    def _facts(self, name: str) -> tuple[int | None, str | None]:
        """Return size and SHA-256 of a file; None for what the Hub does not know."""
        from huggingface_hub import HfApi

        for file in HfApi().get_paths_info(self.repository, [name], revision=self.revision):
            lfs = getattr(file, "lfs", None)
            return getattr(file, "size", None), None if lfs is None else lfs.sha256
        return None, None

    def finish(self, files: Mapping[str, Path], last: Mapping[str, Path], deleted: Sequence[str], marker: str) -> None:
        self.commit("Finish an upload by moesurgery", {**files, **last}, [*deleted, marker])

    def commit(self, message: str, files: Mapping[str, Path | bytes], deleted: Sequence[str] = ()) -> str:
        """Add and delete files in one commit, and return its address."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in deleted]
        with _store_errors(self.url, "written to"):
            done = HfApi().create_commit(self.repository, operations, commit_message=message, revision=self.revision)
        return done.commit_url


@contextmanager
def _store_errors(where: str, done: str) -> Iterator[None]:
    """Say where it was and what to do of whatever a store's library raises: of any kind, for it is third-party code."""
    try:
        yield
    except CheckpointError as error:
        raise OutputError(error.message, error.hint) from None
    except SurgeryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        login = "log in (hf auth login, or HF_TOKEN)" if where.startswith("hf://") else "check credentials"
        raise OutputError(f"{where} cannot be {done}: {reason}", f"{login}, address and network, {_AGAIN}") from None


def _differs(where: str, how: str) -> OutputError:
    return OutputError(f"{where} {how}", "run the same command again: it uploads this file once more")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(path: Path) -> str:
    """Return the ETag that S3 gives to a file that came in parts: the MD5 of their MD5s, and how many they were."""
    digests = []
    with open(path, "rb") as file:
        while part := file.read(_S3FS_PART):
            digests.append(hashlib.md5(part, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
