"""A folder held open by a descriptor, through which everything in it is reached.

No link is followed, neither in the last part of a name nor on the way to it, and whoever renames the folder or puts
another in its place meanwhile changes nothing: files are made, read and deleted where the descriptor is. A file is
always made new (`O_EXCL`), so that nothing is written through a name, or a hard link, that was there before.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import OutputError

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})


class OpenFolder:
    """An open folder; names in it are relative and '/'-separated. `path` is for messages.

    It may be sent to another process or machine, which opens the folder again and refuses another one of that name.
    Methods raise OSError with the whole path as its file name. `group`: id of the Unix group whose members may read
    and write what is made in it; None for what the umask says.
    """

    def __init__(self, path: Path, descriptor: int, group: int | None = None) -> None:
        self.path = path
        self.group = group
        self.descriptor = descriptor
        self.inode = os.fstat(descriptor).st_ino
        self.close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: Path) -> OpenFolder:
        """Open a folder that a user names: links on the way to it are theirs, and are followed."""
        return cls(path, os.open(path, OPEN_FOLDER | os.O_CLOEXEC))

    def __reduce__(self) -> tuple[object, tuple[Path, int, int | None]]:
        return _open_again, (self.path, self.inode, self.group)

    @property
    def source(self) -> LocalSource:
        """The folder to be read like a checkpoint, whatever its path leads to by now."""
        held = Path(f"/proc/self/fd/{self.descriptor}")
        return LocalSource(held if held.exists() else self.path)

    def folder(self, name: str) -> OpenFolder:
        """Open a folder in this one."""
        return OpenFolder(self.path / name, self.descriptor_of(name, OPEN_FOLDER))

    def descriptor_of(self, name: str, flags: int) -> int:
        """Open what is there under a name. A pipe is not waited for."""
        with self._within(name) as (at, last):
            return os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)

    def status(self, name: str) -> os.stat_result:
        """Return what is known of a name; of a link itself, not of what it leads to."""
        with self._within(name) as (at, last):
            return os.stat(last, dir_fd=at, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        try:
            self.status(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_folder(self, name: str, inode: int | None = None) -> bool:
        """Whether `name` is a folder and no link; with `inode`, whether it is that very one."""
        if not self.exists(name):
            return False
        status = self.status(name)
        return stat.S_ISDIR(status.st_mode) and inode in (None, status.st_ino)

    def is_file(self, name: str) -> bool:
        """Whether `name` is a regular file."""
        return self.exists(name) and stat.S_ISREG(self.status(name).st_mode)

    def make_folder(self, name: str, mode: int = 0o777) -> bool:
        """Make a folder; return False where something of that name is there."""
        with self._within(name) as (at, last):
            try:
                self._make(last, at, mode)
            except FileExistsError:
                return False
        return True

    def _make(self, name: str, at: int, mode: int = 0o777) -> None:
        os.mkdir(name, mode, dir_fd=at)
        if self.group is not None:
            os.chmod(name, 0o2770, dir_fd=at)  # new files in it belong to the group, too

    def create(self, name: str) -> int:
        """Make a file and the folders that it lies in, and return its descriptor. The name must be free."""
        with self._within(name, make=True) as (at, last):
            descriptor = os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=at)
        if self.group is not None:
            os.fchmod(descriptor, 0o660)
        return descriptor

    def read(self, name: str, limit: int) -> bytes:
        """Return a small regular file, or its first `limit` bytes."""
        descriptor = self.descriptor_of(name, os.O_RDONLY)
        try:
            with _named(self.path / name):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                return os.pread(descriptor, limit, 0)
        finally:
            os.close(descriptor)

    def write(self, name: str, content: Iterable[bytes], *, durable: bool) -> None:
        """Put a file under `name`; one that was there is deleted first, and never written into."""
        self.remove(name)
        with open(self.create(name), "wb") as file, self._within(name):
            file.writelines(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def link(self, source: Path, name: str) -> bool:
        """Hard-link `name` to the file `source`; return False where that cannot be, as across filesystems."""
        with self._within(name, make=True) as (at, last):
            try:
                os.link(source, last, dst_dir_fd=at)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return False
                raise
        return True

    def replace(self, name: str, target: str) -> None:
        """Give a file another name, in place of the file that may have it."""
        with self._within(name) as (at, last), self._within(target, make=True) as (to, new):
            os.replace(last, new, src_dir_fd=at, dst_dir_fd=to)

    def remove(self, name: str) -> None:
        """Delete a file, a link or a folder with all that is in it. It may be missing."""
        if not self.exists(name):
            return
        is_folder = self.is_folder(name)
        with self._within(name) as (at, last):
            if is_folder:
                shutil.rmtree(last, dir_fd=at)
            else:
                os.unlink(last, dir_fd=at)

    def remove_folder(self, name: str) -> None:
        """Delete an empty folder."""
        with self._within(name) as (at, last):
            os.rmdir(last, dir_fd=at)

    def names(self) -> list[str]:
        """Return the names of what lies right in this folder, in order."""
        with _named(self.path):
            return sorted(os.listdir(self.descriptor))

    def entries(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield (name, status) of everything below, each folder before what is in it."""
        for name in self.names():
            status = self.status(name)
            yield name, status
            if stat.S_ISDIR(status.st_mode):
                inner = self.folder(name)
                yield from ((f"{name}/{below}", of) for below, of in inner.entries())
                inner.close()

    def sync(self) -> None:
        """Make renames in this folder durable."""
        with _named(self.path):
            os.fsync(self.descriptor)

    def sync_file(self, name: str) -> None:
        """Wait until a file that is there, and its name, are on disk."""
        with self._within(name) as (at, last):
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.fsync(at)

    @contextmanager
    def _within(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Give a descriptor of the folder that `name` lies in, and its last part."""
        *folders, last = name.split("/")
        if not {"", ".", ".."}.isdisjoint((*folders, last)):
            raise OutputError(f"{name!r} is no name of a file in {self.path}")
        at = self.descriptor
        try:
            with _named(self.path / name):
                for folder in folders:
                    if make:
                        with suppress(FileExistsError):
                            self._make(folder, at)
                    inner = os.open(folder, OPEN_FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                    if at != self.descriptor:
                        os.close(at)
                    at = inner
                yield at, last
        finally:
            if at != self.descriptor:
                os.close(at)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the whole path in an OSError, which knows the last part at most."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _open_again(path: Path, inode: int, group: int | None) -> OpenFolder:
    folder = OpenFolder.open(path.parent).folder(path.name)
    folder.group = group
    if folder.inode != inode:
        raise replaced_meanwhile(path)
    return folder


def replaced_meanwhile(path: Path) -> OutputError:
    """Return the error for a folder that is no longer the one that was opened."""
    return OutputError(
        f"{path} was moved or replaced by something else while it was written",
        "choose a folder in which nobody else may rename files, with -o",
    )
