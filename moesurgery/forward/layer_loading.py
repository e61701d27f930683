"""Load the values of expressions into tensors on a device, at the speed of the page cache.

Tensors that a plan only selects and joins are byte ranges of files (`Expr.pieces`). They are read without intermediate
copies: into the tensor itself on the CPU, into pinned memory for transfer to a GPU, by several threads, since one alone
copies a few GB/s. Quantised weights are sent to a GPU as stored and dequantised there, so that only their bytes cross
the bus. Everything else is evaluated on the processor, chunk by chunk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import BITS
from moesurgery.checkpoint.file_reader import FileReader, as_bytes
from moesurgery.checkpoint.source import Source
from moesurgery.expr.elementwise import Cast, Scale
from moesurgery.expr.nodes import Compute, Concat, Copy, Expr, Piece, Slice, Stored, torch_dtype
from moesurgery.expr.tensors import ConcatLast, SliceLast, Transposed
from moesurgery.plan.dequantise import Dequantised

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 32 << 20  # of an expression that are evaluated at once
STAGE_BYTES = 64 << 20  # of pinned memory, for each thread that reads for a GPU
SPAN_BYTES = 8 << 20  # that one thread reads before it takes the next
THREADS = 6  # more wait for the interpreter's lock: an H200's machine reads 11 GB/s with 6, 9 with 12
ALIGNED = 256

# Expressions that compute on the device of their inputs.
_ANYWHERE = (Stored, Slice, Concat, Dequantised, Cast, Scale, SliceLast, ConcatLast, Transposed)


class Loader:
    """Fills tensors of one device, by `threads` on a GPU. Threads may share it."""

    def __init__(self, device: torch.device, threads: int = THREADS) -> None:
        self.device = device
        self.threads = min(threads, os.cpu_count() or 1)
        self.on_gpu = device.type == "cuda"
        self._here = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._readers: list[FileReader] = []  # one of each thread

    def fill(self, targets: Sequence[tuple[torch.Tensor, Expr]]) -> None:
        """Fill contiguous tensors of the device, of any floating dtype, with the values of expressions.

        On a GPU the tensors are filled when this returns; what the current stream does afterwards may use them.
        """
        jobs = [(out.view(-1), start, span, expr) for out, expr in targets for start, span in _spans(expr)]
        if not self.on_gpu:
            for job in jobs:
                self._to_memory(*job)
            return
        import torch

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, "load")
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self.device))  # the memory may still be in use by what was there before
        for done in [self._pool.submit(self._to_gpu, free, *job) for job in jobs]:
            done.result().synchronize()

    def check(self) -> None:
        """Raise CheckpointError where a file that was read is not what it was when its header was read.

        On the CPU the files are closed: a process may have about 1,000 open, and models have hundreds of shards.
        """
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.check()
        if not self.on_gpu:
            self._reader().close()

    def _to_memory(self, flat: torch.Tensor, start: int, span: list[Piece], expr: Expr) -> None:
        reader = self._reader()
        size = BITS[expr.dtype] // 8
        for piece in span:
            if isinstance(piece, Compute):
                reader.begin_chunk()
                into = flat[start : start + piece.stop - piece.start]
                into.copy_(piece.expr.evaluate(piece.start, piece.stop, reader))
                start += len(into)
                continue
            count = piece.nbytes // size
            into = flat[start : start + count]
            if into.dtype == torch_dtype(expr.dtype):
                _read(reader, piece, as_bytes(into))
            else:
                self._converted(into, piece, reader, expr)
            start += count

    def _converted(self, into: torch.Tensor, piece: Copy, reader: FileReader, expr: Expr) -> None:
        """Read a byte range in one dtype into a tensor of another, some of it at a time."""
        import torch

        kind, size = torch_dtype(expr.dtype), BITS[expr.dtype] // 8
        step = max(size, min(CHUNK_BYTES, piece.nbytes) // size * size)
        room = getattr(self._here, "room", None)
        if room is None or len(room) < step:
            room = self._here.room = torch.empty(step, dtype=torch.uint8)
        for at in range(0, piece.nbytes, step):
            length = min(step, piece.nbytes - at)
            part = piece._replace(start=piece.start + at, nbytes=length)
            _read(reader, part, as_bytes(room[:length]))
            into[at // size : (at + length) // size].copy_(room[:length].view(kind))

    def _to_gpu(self, free: torch.cuda.Event, flat: torch.Tensor, start: int, span: list[Piece], expr: Expr) -> Any:
        """Read one span and start its copy to the GPU; return an event that completes with the copy."""
        import torch

        with torch.no_grad(), torch.cuda.device(self.device):
            staged = getattr(self._here, "staged", None)
            if staged is None:
                staged = self._here.staged = StagedReader(self.device)
                self._watched(staged.files)
            with torch.cuda.stream(staged.stream):
                staged.stream.wait_event(free)
                if isinstance(span[0], Compute):
                    self._computed(flat, start, span[0], staged)
                else:
                    nbytes = sum(piece.nbytes for piece in span)
                    room, view = staged.room(nbytes)
                    at = 0
                    for piece in span:
                        _read(staged.files, piece, view[at : at + piece.nbytes])  # type: ignore[arg-type]
                        at += piece.nbytes
                    values = room.view(torch_dtype(expr.dtype))
                    into = flat[start : start + len(values)]
                    into.copy_(
                        values if into.dtype == values.dtype else values.to(self.device, non_blocking=True),
                        non_blocking=True,
                    )
                return staged.stream.record_event()

    def _computed(self, flat: torch.Tensor, start: int, piece: Compute, staged: StagedReader) -> None:
        staged.files.begin_chunk()
        values = piece.expr.evaluate(piece.start, piece.stop, staged if _anywhere(piece.expr) else staged.files)
        flat[start : start + piece.stop - piece.start].copy_(values)

    def _reader(self) -> FileReader:
        reader = getattr(self._here, "reader", None)
        if reader is None:
            reader = self._here.reader = self._watched(FileReader())
        return reader

    def _watched(self, reader: FileReader) -> FileReader:
        with self._lock:
            self._readers.append(reader)
        return reader


class StagedReader:
    """An `expr.nodes.Reader` that returns bytes on a GPU, read through pinned memory. One per thread."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.files = FileReader()
        self._memory = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._bytes = as_bytes(self._memory)
        self._used = 0

    def room(self, nbytes: int) -> tuple[torch.Tensor, memoryview]:
        """Return pinned memory that no copy is still reading from, also as writable bytes."""
        import torch

        if nbytes > len(self._memory):
            larger = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            return larger, as_bytes(larger)
        if self._used + nbytes > len(self._memory):
            self.stream.synchronize()
            self._used = 0
        at = self._used
        self._used = -(-(at + nbytes) // ALIGNED) * ALIGNED
        return self._memory[at : at + nbytes], self._bytes[at : at + nbytes]

    def read(self, source: Source, file: str, start: int, nbytes: int) -> torch.Tensor:
        room, view = self.room(nbytes)
        self.files.fill(view, source, file, start)
        return room.to(self.device, non_blocking=True)

    def passing(self, source: Source, file: str, start: int, nbytes: int) -> memoryview:
        return self.files.passing(source, file, start, nbytes)


def _read(reader: FileReader, piece: Copy, view: memoryview) -> None:
    reader.fill(view, piece.source, piece.file, piece.start)


def _spans(expr: Expr) -> Iterator[tuple[int, list[Piece]]]:
    """Yield runs of byte ranges that are read together, and parts to evaluate, each with its first element."""
    bits = BITS[expr.dtype]
    run: list[Piece] = []
    begun = at = held = 0
    for piece in _cut(expr):
        if run and (isinstance(piece, Compute) or held + piece.nbytes > SPAN_BYTES):
            yield begun, run
            run, held = [], 0
        if not run:
            begun = at
        at += piece.nbytes * 8 // bits
        if isinstance(piece, Compute):
            yield begun, [piece]
            continue
        if run and isinstance(run[-1], Copy) and isinstance(piece, Copy) and _follows(run[-1], piece):
            run[-1] = run[-1]._replace(nbytes=run[-1].nbytes + piece.nbytes)
        else:
            run.append(piece)
        held += piece.nbytes
    if run:
        yield begun, run


def _follows(before: Copy, piece: Copy) -> bool:
    """Whether a byte range begins where another ends."""
    together = before.file == piece.file and before.start + before.nbytes == piece.start
    return together and (before.source is piece.source or before.source == piece.source)


def _cut(expr: Expr) -> Iterator[Piece]:
    """Yield an expression's pieces: no byte range longer than a thread's pinned memory, no part than a chunk."""
    for piece in expr.pieces():
        if not isinstance(piece, Compute):
            for at in range(0, piece.nbytes, SPAN_BYTES):
                yield piece._replace(start=piece.start + at, nbytes=min(SPAN_BYTES, piece.nbytes - at))
            continue
        of = piece.expr
        step = max(1, CHUNK_BYTES // max(1, of.nbytes // max(1, of.numel)) // of.chunk_multiple) * of.chunk_multiple
        for first in range(piece.start, piece.stop, step):
            yield piece._replace(start=first, stop=min(first + step, piece.stop))


def _anywhere(expr: Expr) -> bool:
    return isinstance(expr, _ANYWHERE) and all(map(_anywhere, expr.inputs))
