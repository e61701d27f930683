"""The folder that a job works in, `OUT.partial`: made, or taken over from an earlier run of the same job.

Everybody who may write beside the output may have put that folder there, and a repository may hold one. So a folder
that is there is taken over only where it is what a job of this user leaves behind: a real folder with nothing but real
files and folders, all of the user who runs this. And it is believed only where its record names the very lock file
that lies beside it, by the time of its last change, which nobody can choose: a copy, or what was checked out or
unpacked, is begun again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.filenames import WORK
from moesurgery.errors import OutputError
from moesurgery.write.open_folder import OPEN_FOLDER, OpenFolder
from moesurgery.write.shard import disk_error

RECORD, LOCK = f"{WORK}/plan", f"{WORK}/lock"
_NEW_RECORD = f"{WORK}/plan.tmp"
_MOST_RECORD = 1 << 16
_KEPT = re.compile(r"/(plan|plan\.new|lock|.+\.json|.+\.tmp)\Z")  # plan.new: of earlier versions


class BusyError(OutputError):
    """Another process has locked the working folder."""


class WorkFolder(OpenFolder):
    """A claimed `OUT.partial`, in the open folder `parent`, with a lock that keeps other jobs out until `release`.

    `in_parts`: the job is written by several processes, which share the lock.
    """

    def __init__(self, parent: OpenFolder, name: str, plan_id: str, *, in_parts: bool = False) -> None:
        super().__init__(parent.path / name, parent.descriptor_of(name, OPEN_FOLDER), parent.group)
        self.parent = parent
        self.plan_id = plan_id
        self.in_parts = in_parts
        self.lock = -1

    def unlock(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def release(self) -> None:
        self.unlock()
        self.close()
        self.parent.close()

    def record(self, *, replaces: int | None = None, durable: bool = False) -> None:
        """Write down what this job is; `replaces` is the inode of the old output while this is put in its place."""
        content = {"plan": self.plan_id, "lock": mark(self.lock), "replaces": replaces, "in_parts": self.in_parts}
        self.write(_NEW_RECORD, [json.dumps(content).encode()], durable=durable)
        self.replace(_NEW_RECORD, RECORD)
        if durable:
            self.folder(WORK).sync()

    def keep(self, names: set[str]) -> None:
        """Delete all but these files and what the job itself keeps."""
        kept = {*names, *(name[:end] for name in names for end, c in enumerate(name) if c == "/"), WORK}
        for name, _ in reversed(list(self.entries())):
            if name not in kept and not name.startswith(f"{WORK}/"):
                self.remove(name)

    def discard(self) -> None:
        """Delete the folder, unless it has been published, or moved by somebody else."""
        if self.parent.is_folder(self.path.name, self.inode):
            self.keep(set())
            self.remove(WORK)
            self.parent.remove_folder(self.path.name)


def claim(partial: Path, plan_id: str, *, force: bool, in_parts: bool = False, group: int | None = None) -> WorkFolder:
    """Make or take over the working folder, and lock it.

    `in_parts`: other processes will write into it, too. `group`: id of the Unix group whose members may do so and are
    trusted. Raises OutputError where it is no unfinished job of this user, or one of another plan and not `force`.
    """
    try:
        for _ in range(3):
            parent = _open_parent(partial, group)
            if parent.make_folder(partial.name, 0o700) and group is not None:  # otherwise nobody else may change it
                _give_to_group(parent, partial, group)
            _check_folder(parent, partial.name)
            work = WorkFolder(parent, partial.name, plan_id, in_parts=in_parts)
            try:
                _take(work)
                if parent.is_folder(partial.name, work.inode):
                    _begin(work, force=force)
                    return work
            except BaseException:
                work.release()
                raise
            work.release()  # its job has published or deleted it in the meantime
    except OSError as error:
        raise disk_error(error, partial) from error
    raise busy(partial)


def share(work: WorkFolder) -> None:
    """Let other parts of the same job have the lock, too."""
    fcntl.flock(work.lock, fcntl.LOCK_SH)


def join(partial: Path, plan_id: str, *, group: int | None = None) -> WorkFolder | None:
    """Return the working folder of a job that other processes are writing in parts, with the lock that they share.

    None where there is no such folder, or where its first process is still making it. Raises OutputError where it is
    written by a job of another plan, or of one process.
    """
    try:
        parent = _open_parent(partial, group)
        if not parent.exists(f"{partial.name}/{LOCK}"):
            return None
        _check_folder(parent, partial.name)
        work = WorkFolder(parent, partial.name, plan_id, in_parts=True)
        lock = lock_of(work, shared=True)
        if lock is None:
            if (read_record(work) or {}).get("in_parts", True):
                return None
            raise busy(partial)
        work.lock = lock
        record = _record_of_lock(work)
        if record is None or not parent.is_folder(partial.name, work.inode):
            work.release()
            return None
        if record.get("plan") != plan_id:
            work.release()
            raise _other_plan(partial)
        return work
    except OSError as error:
        raise disk_error(error, partial) from error


def reopen(partial: Path, *, group: int | None = None) -> WorkFolder:
    """Return the working folder of an unfinished job, whatever its plan, with the lock for this process alone.

    Raises OutputError where there is none, or where parts of it are being written.
    """
    try:
        parent = _open_parent(partial, group)
        if not parent.exists(f"{partial.name}/{LOCK}"):
            raise OutputError(f"there is no unfinished job {partial}", "write its parts first, with --part I/N")
        _check_folder(parent, partial.name)
        work = WorkFolder(parent, partial.name, "", in_parts=True)
        try:
            _take(work)
            record = _record_of_lock(work)
            if record is None or not parent.is_folder(partial.name, work.inode):
                raise _foreign(partial, f"its record, {RECORD}, is of another folder")
            work.plan_id = str(record.get("plan"))
        except BaseException:
            work.release()
            raise
        return work
    except OSError as error:
        raise disk_error(error, partial) from error


def _open_parent(partial: Path, group: int | None) -> OpenFolder:
    parent = OpenFolder.open(partial.parent)
    parent.group = group
    return parent


def _give_to_group(parent: OpenFolder, partial: Path, group: int) -> None:
    descriptor = parent.descriptor_of(partial.name, OPEN_FOLDER)
    try:
        os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, 0o2770)
    except PermissionError as error:
        parent.remove_folder(partial.name)
        raise OutputError(
            f"{partial} cannot be given to group {group}: {error.strerror}", "give a group that you are in: `id`"
        ) from None
    finally:
        os.close(descriptor)


def _check_folder(parent: OpenFolder, name: str) -> None:
    """Refuse what cannot be a folder that this user made."""
    status = parent.status(name)
    if not stat.S_ISDIR(status.st_mode):
        raise _foreign(parent.path / name, f"it is {kind(status)}")
    if not is_ours(parent, status):
        raise _foreign(parent.path / name, f"it belongs to {owner(status)}")


def _take(work: WorkFolder) -> None:
    """Lock the folder and close it to others; refuse it where anything is in it that no job of this user leaves."""
    status = os.fstat(work.descriptor)
    if not is_ours(work, status):  # looked at again: another folder may have got this name
        raise _foreign(work.path, f"it belongs to {owner(status)}")
    closed, opened = (0o077, stat.S_IRWXU) if work.group is None else (0o007, 0o2770)
    with suppress(OSError):  # where the filesystem has no such rights
        os.fchmod(work.descriptor, stat.S_IMODE(status.st_mode) & ~closed | opened)
    running = work.is_folder(WORK) and work.is_file(LOCK)
    if running:
        work.lock = _locked(work)
    _check_content(work)
    if not running:
        work.make_folder(WORK)
        with suppress(FileExistsError):
            os.close(work.create(LOCK))
        work.lock = _locked(work)


def _locked(work: WorkFolder) -> int:
    lock = lock_of(work)
    if lock is None:
        raise busy(work.path)
    return lock


def lock_of(folder: OpenFolder, *, shared: bool = False) -> int | None:
    """Return a descriptor of a working folder's lock file, locked; None where another process has locked it."""
    lock = folder.descriptor_of(LOCK, os.O_RDWR)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _begin(work: WorkFolder, *, force: bool) -> None:
    """Empty the folder of all that is not of this very job, and write the record."""
    record = read_record(work)
    if record is not None and record.get("plan") != work.plan_id and not force:
        raise _other_plan(work.path)
    same = record is not None and (record.get("plan"), record.get("lock")) == (work.plan_id, mark(work.lock))
    for name, _ in reversed(list(work.entries())):
        # The record stays until the new one takes its place: without one, a folder is taken for somebody else's.
        if name not in (WORK, LOCK, RECORD) and (not same or (name.startswith(f"{WORK}/") and name.endswith(".tmp"))):
            work.remove(name)
    work.record()


def read_record(folder: OpenFolder) -> dict[str, Any] | None:
    """Return what a working folder says it is; None where it says nothing."""
    try:
        text = folder.read(RECORD, _MOST_RECORD)
    except OSError:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {}


def _record_of_lock(work: WorkFolder) -> dict[str, Any] | None:
    """Return the record where it names the very lock file that lies beside it."""
    record = read_record(work)
    return record if record and record.get("lock") == mark(work.lock) else None


def is_ours(folder: OpenFolder, status: os.stat_result) -> bool:
    """Whether something in `folder` belongs to the user who runs this, or to the group that shares the folder."""
    if status.st_uid == os.geteuid() or (folder.group is not None and status.st_gid == folder.group):
        return True
    # On some network filesystems what we make is not ours by number: then that number is the one to look for.
    probe = f"moesurgery-{secrets.token_hex(8)}.tmp"
    try:
        os.close(folder.create(probe))
        made = folder.status(probe).st_uid
        folder.remove(probe)
    except OSError:
        return False
    return status.st_uid == made


def mark(lock: int) -> int:
    """Return what tells a lock file from its copies: when it was last changed, which the kernel alone decides."""
    return os.fstat(lock).st_ctime_ns


def _check_content(folder: OpenFolder) -> None:
    """Refuse a folder in which anything is that no job of this user leaves."""
    entries = dict(folder.entries())
    for name, status in entries.items():
        path = folder.path / name
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            raise _foreign(folder.path, f"{path} is {kind(status)}")
        # A shard may be a hard link to the source's, whose owner is anybody; its manifest says what it is.
        shard = not name.startswith(f"{WORK}/") or name.endswith(".tmp")
        linked = shard and stat.S_ISREG(status.st_mode) and status.st_nlink > 1
        if not linked and not is_ours(folder, status):
            raise _foreign(folder.path, f"{path} belongs to {owner(status)}")
    if RECORD not in entries and not all(kept_by_a_job(name, status) for name, status in entries.items()):
        raise _foreign(folder.path, f"it has no record of a plan, {RECORD}")


def kept_by_a_job(name: str, status: os.stat_result) -> bool:
    """Whether something has a name that jobs give to what they keep for themselves, in `.moesurgery`."""
    inside = name == WORK or name.startswith(f"{WORK}/")
    usual = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and _KEPT.search(name) is not None)
    return inside and usual


def kind(status: os.stat_result) -> str:
    """Say in words what something is that is neither a folder nor what was expected."""
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


def owner(status: os.stat_result) -> str:
    """Name the user who owns a file."""
    import pwd

    try:
        return f"the user {pwd.getpwuid(status.st_uid).pw_name}"
    except KeyError:
        return f"the user {status.st_uid}"


def _foreign(partial: Path, why: str) -> OutputError:
    return OutputError(
        f"{partial} exists and is no unfinished job of ours: {why}",
        "move it away, or choose another folder with -o",
    )


def _other_plan(partial: Path) -> OutputError:
    return OutputError(
        f"{partial} holds an unfinished job of another recipe or of changed inputs",
        "finish that job, delete the folder, or start over with --force",
    )


def busy(partial: Path) -> BusyError:
    """Return the error for a folder that another process is writing."""
    return BusyError(f"another process is writing {partial}", "wait for it, or choose another folder")
