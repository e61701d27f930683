"""Giving a finished folder its output's name, in place of an old output or of nothing; and what a kill leaves of that.

An old output and the new one exchange their names at once where kernel and filesystem can (`RENAME_EXCHANGE` on Linux,
`RENAME_SWAP` on macOS). Elsewhere the old one is first renamed to `OUT.replaced-…`: killed at that very moment there is
no OUT until the next run with this output, which gives the old one its name back. What the old one was is in the new
one's record (its inode), so that this run or the next deletes that folder and no other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moesurgery.checkpoint.filenames import WORK
from moesurgery.errors import OutputError
from moesurgery.write.claim import LOCK, WorkFolder, is_ours, kept_by_a_job, kind, lock_of, mark, read_record
from moesurgery.write.open_folder import OpenFolder, replaced_meanwhile
from moesurgery.write.output_folder import check_replaceable
from moesurgery.write.shard import disk_error

_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})  # the last by seccomp


def publish(work: WorkFolder, output: Path, *, force: bool, durable: bool) -> None:
    """Give the finished folder its name. Killed at any point, it is whole under one name or the other.

    Raises OutputError where something else has taken its name or the output's in the meantime.
    """
    parent, partial, name = work.parent, work.path.name, output.name
    if not parent.is_folder(partial, work.inode):
        raise replaced_meanwhile(work.path)
    with suppress(OSError):  # as other folders are, now that it is finished; where the filesystem has such rights
        os.fchmod(work.descriptor, stat.S_IMODE(work.status(WORK).st_mode))
    if not parent.exists(name) or (parent.is_folder(name) and not parent.folder(name).names()):
        parent.replace(partial, name)  # an empty folder gives way at once
        if not parent.is_folder(name, work.inode):
            parent.replace(name, partial)
            raise replaced_meanwhile(work.path)
        old = None
    elif not parent.is_folder(name):
        raise OutputError(
            f"{output} appeared while {work.path} was written, and is {kind(parent.status(name))}",
            f"mv {work.path} to a place of your choice",
        )
    elif not force:
        raise OutputError(
            f"{output} appeared while {work.path} was written", f"mv {work.path} to a place of your choice"
        )
    else:
        old = _take_place(work, name, durable=durable)
    if durable:
        parent.sync()
    if old is not None:
        _delete(parent, old)
    if force:
        _delete_earlier(parent, name)
    work.unlock()  # a network filesystem keeps a file that is open
    _remove_work(work)


def recover(output: Path) -> None:
    """Finish what a killed job has left undone when it published: give the old output its name back, or delete it.

    Raises OutputError where that job still runs, or where something came into the old output that is no part of it.
    """
    try:
        parent = OpenFolder.open(output.parent)
    except OSError:
        return  # it is said later that there is no such folder
    try:
        if parent.is_folder(output.name):
            _finish(parent, output)
        elif not parent.exists(output.name):
            _give_back(parent, output)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return  # this is said later, too: no job can have had such a name
        raise disk_error(error, output) from error


def _finish(parent: OpenFolder, output: Path) -> None:
    """Delete the old output, and what the job kept for itself in the new one."""
    folder = parent.folder(output.name)
    if not folder.is_folder(WORK) or not _all_kept_by_a_job(folder):
        return
    if folder.exists(LOCK):  # unless it was killed when it had deleted that
        lock = lock_of(folder)
        if lock is None:
            raise OutputError(f"another process is writing {output}", "wait for it, or choose another folder")
        try:
            if (old := _replaced(parent, folder, lock, output.name)) is not None:
                _delete(parent, old, emptied=True)
        finally:
            os.close(lock)
    _remove_work(folder)


def _remove_work(folder: OpenFolder) -> None:
    """Delete what a job keeps for itself; another process may be about to do the same."""
    with suppress(FileNotFoundError):
        folder.remove(WORK)


def _give_back(parent: OpenFolder, output: Path) -> None:
    """Give an old output its name again, where a job was killed after taking it and before giving it to the new one."""
    partial = f"{output.name}.partial"
    if not parent.is_folder(partial) or not is_ours(parent, parent.status(partial)):
        return
    folder = parent.folder(partial)
    if not folder.is_file(LOCK) or (lock := lock_of(folder)) is None:
        return
    try:
        if (old := _replaced(parent, folder, lock, output.name)) is not None:
            parent.replace(old, output.name)
    finally:
        os.close(lock)


def _all_kept_by_a_job(folder: OpenFolder) -> bool:
    """Whether `.moesurgery` in a published output is what its job left there: files of this user by the usual names."""
    return all(
        is_ours(folder, status) and kept_by_a_job(name, status)
        for name, status in folder.entries()
        if name == WORK or name.startswith(f"{WORK}/")
    )


def _replaced(parent: OpenFolder, folder: OpenFolder, lock: int, output: str) -> str | None:
    """Return the name of the folder that the job of `folder` was putting itself in place of, where it is there."""
    record = read_record(folder) or {}
    inode = record.get("replaces")
    if not isinstance(inode, int) or record.get("lock") != mark(lock):
        return None
    names = [f"{output}.partial", *_set_aside(parent, output)]
    return next((name for name in names if parent.is_folder(name, inode)), None)


def _set_aside(parent: OpenFolder, output: str) -> list[str]:
    return [name for name in parent.names() if re.fullmatch(re.escape(output) + r"\.replaced-\d+", name)]


def _take_place(work: WorkFolder, name: str, *, durable: bool) -> str:
    """Put the finished folder in place of the old output, and return the name that the old one now has."""
    parent, partial = work.parent, work.path.name
    folder = parent.folder(name)
    check_replaceable(folder)  # again: hours may have passed
    work.record(replaces=folder.inode, durable=durable)
    aside = partial if exchange(parent, partial, name) else f"{name}.replaced-{os.getpid()}"
    if aside != partial:
        parent.replace(name, aside)
        try:
            parent.replace(partial, name)
        except BaseException:
            parent.replace(aside, name)
            raise
    try:
        if not parent.is_folder(name, work.inode) or not parent.is_folder(aside, folder.inode):
            raise replaced_meanwhile(work.path)
        check_replaceable(folder)  # and again: now nothing finds it by its name
    except BaseException:
        if aside != partial:
            parent.replace(name, partial)
            parent.replace(aside, name)
        else:
            exchange(parent, partial, name)
        raise
    return aside


def _delete(parent: OpenFolder, name: str, *, emptied: bool = False) -> None:
    """Delete an old output: what it consists of, and nothing that comes into it meanwhile."""
    folder = parent.folder(name)
    try:
        for entry in reversed(check_replaceable(folder, emptied=emptied)):
            if not folder.is_folder(entry):
                folder.remove(entry)
            else:
                folder.remove_folder(entry)
        parent.remove_folder(name)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise OutputError(
            f"something came into {error.filename}, a part of the old output, while that was deleted",
            f"the new output is whole: move what you need out of {folder.path}, and delete that",
        ) from None


def _delete_earlier(parent: OpenFolder, output: str) -> None:
    """Delete old outputs that jobs of earlier versions were killed over, where they hold nothing else."""
    for name in _set_aside(parent, output):
        if parent.is_folder(name) and is_ours(parent, parent.status(name)):
            with suppress(OutputError):
                _delete(parent, name, emptied=True)


def _find_exchange() -> Callable[..., int] | None:
    """Return the C library's function for renaming with flags; None where it has none."""
    name = "renameatx_np" if sys.platform == "darwin" else "renameat2"
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):
        return None
    return function


_rename_with_flags = _find_exchange()
_EXCHANGE = 2  # RENAME_EXCHANGE and RENAME_SWAP alike


def exchange(parent: OpenFolder, first: str, second: str) -> bool:
    """Let two names of a folder change places at once; return False where kernel or filesystem cannot."""
    if _rename_with_flags is None:
        return False
    at = parent.descriptor
    if _rename_with_flags(at, os.fsencode(first), at, os.fsencode(second), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(parent.path / second))
