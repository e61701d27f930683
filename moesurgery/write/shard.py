"""One output shard: header first, space reserved, body filled by parallel positional writes.

A task is idempotent and picklable: it may run twice, on another thread, in another process or on another
machine that sees the same directories. It ends with a rename and a small manifest, so that an interrupted
job continues where it stopped.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.arrays import NotFiniteError, keep_freed_memory
from moesurgery.checkpoint.dtypes import BITS
from moesurgery.checkpoint.file_reader import BUFFER, PAGE, Buffer, FileReader, as_bytes
from moesurgery.checkpoint.filenames import WORK
from moesurgery.checkpoint.read_ahead import AHEAD, Fetched, Range, ReadAhead
from moesurgery.checkpoint.source import Source
from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import OutputError, SurgeryError
from moesurgery.expr.nodes import Compute, Copy, Expr, Piece
from moesurgery.plan.rounding import RecordingReader, RoundingRecord
from moesurgery.write import copy_bytes
from moesurgery.write.finite import FiniteCheck
from moesurgery.write.gguf_container import GgufPart
from moesurgery.write.job_control import JobControl
from moesurgery.write.open_folder import OpenFolder
from moesurgery.write.shard_manifest import TRIES, done, tried_again, work_name, write_manifest
from moesurgery.write.shard_units import aligned, chunk_elements, cut_piece, scales_later, units_of


@dataclass(frozen=True)
class ShardTask:
    """Everything needed to write one shard.

    `whole`: the source shard of which this is an exact copy. `gguf`: what else a GGUF file holds; None for safetensors.
    """

    name: str
    entries: tuple[tuple[str, Expr], ...]
    metadata: tuple[tuple[str, str], ...]
    phase: int  # where the data starts modulo the page: that of the main source shard
    whole: tuple[Source, str, int] | None = None  # source, file, size
    gguf: GgufPart | None = None

    @property
    def header(self) -> bytes:
        """All bytes before the data."""
        if self.gguf is not None:
            header = self.gguf.header(self.entries)
            return header + bytes(self.gguf.padded(len(header)) - len(header))
        return make_header(self.entries, self.metadata, self.phase)

    @property
    def alignment(self) -> int:
        """What the places where tensors begin are multiples of; zeros fill what is left before the next."""
        return self.gguf.alignment if self.gguf is not None else 1

    @property
    def size(self) -> int:
        """The size of the file."""
        if self.whole is not None:
            return self.whole[2]
        return len(self.header) + sum(aligned(expr.nbytes, self.alignment) for _, expr in self.entries)

    @property
    def data_bytes(self) -> int:
        return sum(expr.nbytes for _, expr in self.entries)


@dataclass(frozen=True)
class Manner:
    """How to write; none of it changes a byte of the result."""

    threads: int = 2
    link: bool = False
    reflink: bool = False  # the output's filesystem can share blocks with the sources
    durable: bool = True  # wait for the disk, so that not even a power cut leaves half a checkpoint
    ahead: int = AHEAD  # bytes of remote files that are fetched before they are wanted


def make_header(entries: tuple[tuple[str, Expr], ...], metadata: tuple[tuple[str, str], ...], phase: int) -> bytes:
    """Return the bytes before the data: length and JSON, padded so that the data starts at `phase` mod 4096.

    Equal phase in source and target is what lets a filesystem share the blocks of unchanged tensors.
    """
    table: dict[str, Any] = {"__metadata__": {**dict(sorted(metadata)), "format": "pt"}} if metadata else {}
    if not table:
        table = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, expr in entries:
        table[name] = {"dtype": expr.dtype, "shape": list(expr.shape), "data_offsets": [at, at + expr.nbytes]}
        at += expr.nbytes
    text = compact_json(table).encode()
    text += b" " * ((phase - 8 - len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    task: ShardTask, folder: OpenFolder, plan_id: str, manner: Manner, watch: JobControl | None = None
) -> int:
    """Write one shard into the working folder and return its size. Does nothing where it is already complete.

    Raises OutputError (full disk), CheckpointError (a source ends too early or has changed) and whatever an expression
    refuses; the shard is then absent.
    """
    watch = watch or JobControl()
    if done(folder, task.name, plan_id):
        size = folder.status(task.name).st_size
        watch.progress(task.data_bytes)
        return size
    unique = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    temporary = f"{WORK}/{work_name(task.name)}.{unique}.tmp"
    record = RoundingRecord()
    try:
        if task.whole is not None and (path := task.whole[0].local(task.whole[1])) is not None:
            _copy_whole(path, folder, temporary, task, manner, watch)
            task.whole[0].check(task.whole[1])
        else:
            _write_body(task, folder, temporary, manner, watch, record)
        if watch.stop.is_set():
            raise KeyboardInterrupt
        size = folder.status(temporary).st_size
        if done(folder, task.name, plan_id):
            return size  # the same part was started twice, and the other was faster
        folder.replace(temporary, task.name)
        if manner.durable:
            folder.sync()
        for _ in range(TRIES):
            tried_again(lambda: write_manifest(folder, task.name, plan_id, record.summary(), durable=manner.durable))
            if done(folder, task.name, plan_id):
                break  # else the same part was started twice, and the other has put its own file there meanwhile
        return size
    except OSError as error:
        raise disk_error(error, folder.path) from error
    finally:
        with suppress(OSError):  # a disk that refused the file may refuse this, too; the next run removes it
            folder.remove(temporary)


def disk_error(error: OSError, where: Path) -> SurgeryError:
    """Say what an OSError during writing means."""
    if error.errno == errno.EFBIG:
        return OutputError(
            f"a file for {where} is larger than its filesystem or `ulimit -f` allows ({error.strerror})",
            "write smaller shards, such as --max-shard-size 2GB, or choose another disk with -o",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no space left for {where} ({error.strerror})",
            "free some space and run the same command again: finished shards are kept",
        )
    return OutputError(f"cannot write {error.filename or where}: {error.strerror}")


def _copy_whole(
    source: Path, folder: OpenFolder, target: str, task: ShardTask, manner: Manner, watch: JobControl
) -> None:
    if manner.link and folder.link(source, target):
        watch.progress(task.data_bytes)
        return
    descriptor = folder.create(target)
    try:
        if copy_bytes.clone(source, descriptor):
            watch.progress(task.data_bytes)
        else:
            progress = _without_header(task, watch).progress
            copy_bytes.copy_file(source, descriptor, progress, watch.stop, durable=manner.durable)
        if manner.durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_header(task: ShardTask, watch: JobControl) -> JobControl:
    """Return a watch for the copy of a whole shard, whose header is not counted."""
    assert task.whole is not None
    header = task.whole[2] - task.data_bytes
    lock = threading.Lock()

    def progress(count: int) -> None:
        nonlocal header
        with lock:
            skipped = min(header, count)
            header -= skipped
        watch.progress(count - skipped)

    return JobControl(progress, watch.stop)


def _write_body(
    task: ShardTask, folder: OpenFolder, target: str, manner: Manner, watch: JobControl, record: RoundingRecord
) -> None:
    if task.whole is not None:  # a remote shard: its bytes as they are, for its header may be spelt otherwise than ours
        header, total = b"", task.whole[2]
        units = list(cut_piece(Copy(task.whole[0], task.whole[1], 0, total), 0))
        watch = _without_header(task, watch)
    else:
        header = task.header
        total = task.size
        units = list(scales_later(units_of(task.entries, len(header), task.alignment), 2 * manner.threads))
    descriptor = folder.create(target)
    try:
        if manner.reflink:
            os.ftruncate(descriptor, total)  # blocks to be shared need no space of their own
        else:
            copy_bytes.allocate(descriptor, total)
        copy_bytes.write_full(descriptor, memoryview(header), 0)
        try:
            _run_units(units, descriptor, manner, watch, record)
        except NotFiniteError as error:
            raise error.of(_tensor_at(task, error.at - len(header))) from None
        if manner.durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tensor_at(task: ShardTask, offset: int) -> str:
    """Return the name of the tensor that byte `offset` of the data belongs to."""
    for name, expr in task.entries:
        if offset < expr.nbytes:
            return name
        offset -= aligned(expr.nbytes, task.alignment)
    raise AssertionError(f"byte {offset} is behind the last tensor of {task.name}")


def _run_units(
    units: list[tuple[Piece, int]], descriptor: int, manner: Manner, watch: JobControl, record: RoundingRecord
) -> None:
    threads = max(1, min(manner.threads, len(units)))
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(units)):
        waiting.put(number)
    wanted = _remote_ranges([piece for piece, _ in units])
    ahead = ReadAhead(wanted, manner.ahead, watch.stop) if any(wanted) else None
    failures: list[BaseException] = []

    def work() -> None:
        reader = Worker(watch.stop, record)
        try:
            while not failures and not watch.stop.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    reader.reader.check()
                    return
                piece, at = units[number]
                reader.perform(piece, descriptor, at, ahead.begin(number) if ahead else None)
                if ahead is not None:
                    ahead.end(number)
                if manner.durable:
                    copy_bytes.start_writeback(descriptor, at, piece.nbytes)
                watch.progress(piece.nbytes)
        except BaseException as error:
            failures.append(error)
        finally:
            reader.close()

    if threads == 1:
        work()
    else:
        pool = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    if ahead is not None:
        ahead.close()
    if failures:
        raise failures[0]


def _remote_ranges(pieces: list[Piece]) -> list[list[Range]]:
    """Return of each piece what it reads of files that are not on this machine."""
    remote: dict[tuple[Source, str], bool] = {}

    def is_remote(part: Copy) -> bool:
        where = part.source, part.file
        if where not in remote:
            remote[where] = part.source.local(part.file) is None
        return remote[where]

    return [
        [
            part
            for part in (piece.expr.ranges(piece.start, piece.stop) if isinstance(piece, Compute) else [piece])
            if is_remote(part)
        ]
        for piece in pieces
    ]


@contextmanager
def _at(offset: int) -> Iterator[None]:
    """Say of a number that may not be written where in the file it was to stand."""
    try:
        yield
    except NotFiniteError as error:
        error.at += offset
        raise


class Worker:
    """One thread that fills a shard."""

    def __init__(self, stop: threading.Event, record: RoundingRecord | None = None) -> None:
        self.stop = stop
        self.reader = FileReader() if record is None else RecordingReader(record)
        self._copy_buffer = Buffer()
        self._finite = FiniteCheck()
        keep_freed_memory()

    def close(self) -> None:
        self.reader.close()

    def perform(self, piece: Piece, target: int, at: int, fetched: Fetched | None = None) -> None:
        """Write one unit of work at byte `at` of the open file `target`. `fetched`: what was read ahead for it."""
        self.reader.fetched = fetched
        if isinstance(piece, Copy):
            self._copy(piece, target, at)
        else:
            self._compute(piece, target, at)

    def _copy(self, piece: Copy, target: int, at: int) -> None:
        path = self.reader.path(piece.source, piece.file)
        if path is not None:
            copy_bytes.copy_range(
                self.reader.descriptor(path),
                target,
                piece.start,
                at,
                piece.nbytes,
                self._copy_buffer,
                str(path),
                self.stop,
            )
            return
        for data in (self.reader.fetched or Fetched()).parts(*piece):
            copy_bytes.write_full(target, memoryview(data), at)
            at += len(data)

    def _compute(self, piece: Compute, target: int, at: int) -> None:
        step = chunk_elements(piece.expr, BUFFER // 2)  # no more than a merge computes at once: nothing to be joined
        bits = BITS[piece.expr.dtype]
        first = piece.start
        while first < piece.stop and not self.stop.is_set():
            last = min(piece.stop, (first // step + 1) * step)
            self.reader.begin_chunk()
            place = at + (first - piece.start) * bits // 8
            with _at(place):
                if piece.expr.numpy_only:
                    data = piece.expr.raw(first, last, self.reader)
                else:
                    data = as_bytes(piece.expr.evaluate(first, last, self.reader))
                self._finite.check(data, piece.expr, first, last, self.reader)
            copy_bytes.write_full(target, data, place)
            first = last
