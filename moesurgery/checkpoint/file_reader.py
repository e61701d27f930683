"""Bytes for evaluations: open files and reusable buffers, one set per thread.

An anonymous mmap is the fastest buffer to read into, and fastest when its offset in the page equals the
file's (a large bytearray sits at the worst address).
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from moesurgery.checkpoint.read_ahead import Fetched, read_remote
from moesurgery.checkpoint.source import Source
from moesurgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PAGE = 4096
BUFFER = 1 << 20
MOST_OPEN = 16  # files of one reader: releases have hundreds of shards, and a process may have 1,024 files open


class Buffer:
    """One reusable megabyte per thread and nesting level, in the page phase of the file it is read from."""

    def __init__(self, size: int = BUFFER) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size + PAGE)
        self.view = memoryview(self._map)

    def at(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes whose address agrees with the file offset modulo the page (and with 8)."""
        phase = offset % PAGE & ~7
        return self.view[phase : phase + length]


def open_to_read(path: Path) -> int:
    """Open a source file; raise CheckpointError where it cannot be (an OSError would be taken for the output's)."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_full(descriptor: int, view: memoryview, offset: int, where: str) -> None:
    """Fill `view` from `offset`; raise CheckpointError where the file ends or the disk fails."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{where}, byte {offset + done:,}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{where} ends at byte {offset + done:,}, before its header says")
        done += count


class FileReader:
    """Open files and buffers of one thread that evaluates expressions. An `expr.nodes.Reader`.

    `fetched`: ranges of remote files that were read ahead.
    """

    def __init__(self) -> None:
        self.fetched: Fetched | None = None
        self._open: dict[Path, int] = {}  # the one last used last
        self._lock = threading.Lock()  # of what is open: `check` may be called by another thread
        self._paths: dict[tuple[Source, str], Path | None] = {}
        self._buffers: list[Buffer] = []
        self._used = 0
        self._passing: Buffer | None = None
        self._last: tuple[Source, str, Path | None] | None = None

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    __del__ = close  # an engine's readers live as long as the engine does

    def check(self) -> None:
        """Raise CheckpointError where a file that was read is not what it was when its header was read."""
        for (source, file), path in list(self._paths.items()):  # another thread may be reading
            with self._lock:
                source.check(file, self._open.get(path) if path is not None else None)

    def begin_chunk(self) -> None:
        """Release all buffers: what was read before is no longer needed."""
        self._used = 0

    def read(self, source: Source, file: str, start: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a source as a uint8 tensor, valid until the next `begin_chunk`."""
        import torch

        if nbytes > BUFFER or nbytes == 0:
            tensor = torch.empty(nbytes, dtype=torch.uint8)
            self.fill(as_bytes(tensor), source, file, start)
            return tensor
        if self._used == len(self._buffers):
            self._buffers.append(Buffer())
        self._used += 1
        return torch.frombuffer(
            self.bytes_at(source, file, start, nbytes, self._buffers[self._used - 1]), dtype=torch.uint8
        )

    def passing(self, source: Source, file: str, start: int, nbytes: int) -> memoryview:
        """Return bytes of a source, valid until the next call: to be decoded at once. Needs no torch."""
        if nbytes > BUFFER:
            view = memoryview(bytearray(nbytes))
            self.fill(view, source, file, start)
            return view
        if self._passing is None:
            self._passing = Buffer()
        return self.bytes_at(source, file, start, nbytes, self._passing)

    def bytes_at(self, source: Source, file: str, start: int, nbytes: int, buffer: Buffer) -> memoryview:
        """Return bytes of a source in `buffer`, to be changed in place."""
        view = buffer.at(start, nbytes)
        self.fill(view, source, file, start)
        return view

    def fill(self, view: memoryview, source: Source, file: str, start: int) -> None:
        """Fill `view` with bytes of a source."""
        path = self.path(source, file)
        if path is None:
            if self.fetched is None or not self.fetched.fill(view, source, file, start):
                view[:] = read_remote(source, file, start, len(view))
        else:
            read_full(self.descriptor(path), view, start, str(path))

    def path(self, source: Source, file: str) -> Path | None:
        """Return the path of a source file, checked once: it must not lead out of the checkpoint."""
        if self._last is not None and self._last[0] is source and self._last[1] == file:
            return self._last[2]
        if (source, file) not in self._paths:
            self._paths[source, file] = source.local(file)
        self._last = source, file, self._paths[source, file]
        return self._last[2]

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of a file, valid until the next call."""
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is None:
                if len(self._open) >= MOST_OPEN:
                    os.close(self._open.pop(next(iter(self._open))))
                descriptor = open_to_read(path)
            self._open[path] = descriptor
            return descriptor


def as_bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a tensor as bytes."""
    import torch

    return values.detach().contiguous().view(-1).view(torch.uint8).numpy().data
