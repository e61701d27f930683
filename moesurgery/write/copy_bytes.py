"""Moving bytes from file to file without decoding them: clones, links, kernel copies, sparse copies.

Measured facts behind this file: copy_file_range shares blocks on XFS and btrfs only
where source and destination offset agree modulo the block size *and* the call is cut at block edges; an
anonymous mmap is the fastest buffer, and fastest when its offset in the page equals the file's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

from moesurgery.checkpoint.file_reader import PAGE, Buffer, open_to_read, read_full
from moesurgery.errors import CheckpointError
from moesurgery.write.job_control import ByteProgress

FICLONE = 0x40049409
# What says "not between these two files": fall back to reading and writing. After EIO that tells which side failed.
_FALLBACK = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.EIO}
)
_SYNC_FILE_RANGE_WRITE = 2


def write_full(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`."""
    done = 0
    while done < len(view):
        done += os.pwritev(descriptor, [view[done:]], offset + done)


def copy_range(
    source: int, target: int, start: int, to: int, length: int, buffer: Buffer, where: str, stop: threading.Event
) -> None:
    """Copy `length` bytes between descriptors, by the kernel where it can, sharing blocks where it can."""
    end = start + length
    while start < end and not stop.is_set():
        # Cut at block edges, so that the whole blocks in the middle can be shared.
        step = end - start
        if (start - to) % PAGE == 0 and step >= 2 * PAGE:
            head = -start % PAGE
            step = head if head else (step // PAGE) * PAGE
        step = min(step, 64 << 20)
        try:
            count = os.copy_file_range(source, target, step, start, to)
        except OSError as error:
            if error.errno not in _FALLBACK:
                raise
            _copy_by_buffer(source, target, start, to, end - start, buffer, where, stop)
            return
        if count == 0:
            raise CheckpointError(f"{where} ends at byte {start:,}, before its header says")
        start += count
        to += count


def _copy_by_buffer(
    source: int, target: int, start: int, to: int, length: int, buffer: Buffer, where: str, stop: threading.Event
) -> None:
    done = 0
    while done < length and not stop.is_set():
        view = buffer.at(start + done, min(buffer.size, length - done))
        read_full(source, view, start + done, where)
        write_full(target, view, to + done)
        done += len(view)


def clone(source: Path, target: int) -> bool:
    """Make the open empty file `target` share all blocks with `source`; return False where the filesystem cannot."""
    read = open_to_read(source)
    try:
        fcntl.ioctl(target, FICLONE, read)
    except OSError:
        return False
    finally:
        os.close(read)
    return True


def copy_file(source: Path, target: int, progress: ByteProgress, stop: threading.Event, *, durable: bool) -> None:
    """Copy a whole file into the open empty file `target`, leaving its holes holes."""
    buffer = Buffer()
    read = open_to_read(source)
    try:
        status = os.fstat(read)
        if status.st_blocks * 512 >= status.st_size:
            allocate(target, status.st_size)
        else:
            os.ftruncate(target, status.st_size)
        at = 0
        while at < status.st_size and not stop.is_set():
            start, end = _next_data(read, at, status.st_size)
            progress(start - at)
            while start < end and not stop.is_set():
                step = min(32 << 20, end - start)
                copy_range(read, target, start, start, step, buffer, str(source), stop)
                if durable:
                    start_writeback(target, start, step)
                progress(step)
                start += step
            at = end
    finally:
        os.close(read)


def _next_data(descriptor: int, at: int, size: int) -> tuple[int, int]:
    """Return the next stretch of data at or after `at`; (size, size) where only a hole is left."""
    try:
        start = os.lseek(descriptor, at, os.SEEK_DATA)
        return start, os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        return at, size  # the filesystem does not say: all of it is data


def allocate(descriptor: int, size: int) -> None:
    """Reserve `size` bytes now, so that a full disk is an error before hours of work and not after."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):  # not Linux
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _find_sync_file_range()


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range to disk, so that the final fsync has little left to do."""
    if _sync_file_range is not None and length:
        _sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)
