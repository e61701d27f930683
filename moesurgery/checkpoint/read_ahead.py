"""Reading ahead of remote files: ranges that will be wanted are fetched by several connections, in the order given.

A range request waits for its first byte, and a store gives one connection a part of the link. So while one range is
written, the next ones are on their way; how many is bounded by their bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from moesurgery.checkpoint.source import Source
from moesurgery.errors import CheckpointError

CONNECTIONS = 8  # threads of this process that fetch
REQUEST = 8 << 20  # bytes of one request at most
AHEAD = 128 << 20  # bytes that all jobs of this process hold at most, and one unit of work each

Range = tuple[Source, str, int, int]  # source, file, first byte, number of bytes


def read_remote(source: Source, file: str, start: int, length: int) -> bytes:
    """Read a range through the source; raise CheckpointError where it comes back short."""
    data = source.read(file, start, length)
    if len(data) != length:
        raise CheckpointError(f"{file} ends before its header says", "the file is damaged or has changed; start again")
    return data


@cache
def _connections() -> ThreadPoolExecutor:
    """Return the threads that fetch: of the process, so that their connections stay open from shard to shard."""
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="read ahead")


os.register_at_fork(after_in_child=_connections.cache_clear)  # a child has none of the threads


class Fetched:
    """The remote ranges of one unit of work, which are there or on their way."""

    def __init__(self, ranges: Iterable[Range] = (), stop: threading.Event | None = None) -> None:
        self._blocks: list[tuple[Range, Future[bytes]]] = []
        for source, file, first, nbytes in ranges:
            for start in range(first, first + nbytes, REQUEST):
                block = source, file, start, min(REQUEST, first + nbytes - start)
                self._blocks.append((block, _connections().submit(_fetch, block, stop)))

    def fill(self, view: memoryview, source: Source, file: str, start: int) -> bool:
        """Fill `view` from byte `start` of a file, and return whether all of it was among the ranges.

        Waits for what is on its way. Raises what its reading raised.
        """
        done = 0
        while done < len(view):
            part = self._part(source, file, start + done, len(view) - done)
            if part is None:
                return False
            view[done : done + len(part)] = part
            done += len(part)
        return True

    def parts(self, source: Source, file: str, start: int, nbytes: int) -> Iterator[memoryview | bytes]:
        """Yield a range in parts, without copying what was fetched."""
        while nbytes:
            part: memoryview | bytes | None = self._part(source, file, start, nbytes)
            if part is None:
                part = read_remote(source, file, start, min(REQUEST, nbytes))
            yield part
            start += len(part)
            nbytes -= len(part)

    def _part(self, source: Source, file: str, start: int, nbytes: int) -> memoryview | None:
        for (of, name, first, length), data in self._blocks:
            if first <= start < first + length and name == file and of is source:
                return memoryview(data.result())[start - first : start - first + nbytes]
        return None

    def cancel(self) -> None:
        for _, data in self._blocks:
            data.cancel()


def _fetch(block: Range, stop: threading.Event | None) -> bytes:
    if stop is not None and stop.is_set():
        raise KeyboardInterrupt
    return read_remote(*block)


class ReadAhead:
    """Fetches what units of work will read, in their order, while earlier ones are worked on.

    `wanted`: of each unit, the remote ranges that it reads; a range that is not named is read when it is asked for, one
    that is named in vain costs its transfer. `most`: bytes of all units that are fetched and not done, where the first
    of them has no more. After `stop` nothing new is fetched.
    """

    def __init__(self, wanted: list[list[Range]], most: int, stop: threading.Event) -> None:
        self._wanted = wanted
        self._most = most
        self._stop = stop
        self._lock = threading.Lock()
        self._fetched: dict[int, Fetched] = {}
        self._next = 0
        self._held = 0

    def begin(self, unit: int) -> Fetched:
        """Return the ranges of a unit; fetch what comes after it as far as there is room."""
        with self._lock:
            while self._next < len(self._wanted) and (
                self._next <= unit or self._held + self._size(self._next) <= self._most
            ):
                self._held += self._size(self._next)
                self._fetched[self._next] = Fetched(self._wanted[self._next], self._stop)
                self._next += 1
            return self._fetched[unit]

    def end(self, unit: int) -> None:
        """Let go of a unit that is done."""
        with self._lock:
            del self._fetched[unit]
            self._held -= self._size(unit)

    def close(self) -> None:
        """Fetch nothing more."""
        with self._lock:
            for fetched in self._fetched.values():
                fetched.cancel()
            self._fetched.clear()

    def _size(self, unit: int) -> int:
        return sum(nbytes for *_, nbytes in self._wanted[unit])
