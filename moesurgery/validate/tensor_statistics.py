"""One streaming pass over weights: what is needed to judge them, in memory that does not grow with them. numpy only.

Magnitudes of floating types order as their bits do without the sign, so the largest value, infinities and NaN
come from integer arithmetic at the speed of memory. The root mean square is taken over every eighth value: it is
only ever compared by orders of magnitude.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from moesurgery.checkpoint.arrays import numbers
from moesurgery.checkpoint.block_values import FACTORS, block_values
from moesurgery.checkpoint.dtypes import BLOCKS
from moesurgery.checkpoint.file_reader import BUFFER, Buffer, FileReader
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.checkpoint.read_ahead import read_remote
from moesurgery.checkpoint.source import Source
from moesurgery.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

BLOCK = 64  # bytes: the grain in which stretches of zeros are seen
SHORTEST_RUN = 256  # bytes of zeros in a row that are worth a look
MOST_RUNS = 64
_REMOTE_CHUNK = 16 << 20
_SAMPLE = 8

# numpy's unsigned type, the bits of the magnitude, and the largest finite magnitude.
FLOAT_FORMATS: dict[str, tuple[str, int, int]] = {
    "BF16": ("<u2", 0x7FFF, 0x7F7F),
    "F16": ("<u2", 0x7FFF, 0x7BFF),
    "F32": ("<u4", 0x7FFFFFFF, 0x7F7FFFFF),
    "F64": ("<u8", 0x7FFFFFFFFFFFFFFF, 0x7FEFFFFFFFFFFFFF),
    "F8_E4M3": ("u1", 0x7F, 0x7E),
    "F8_E5M2": ("u1", 0x7F, 0x7B),
    "F8_E8M0": ("u1", 0xFF, 0xFE),
}
_NO_INFINITY = frozenset({"F8_E4M3", "F8_E8M0"})


class Span(NamedTuple):
    """Bytes to judge on their own: a tensor, or one expert's part of a stacked one."""

    info: TensorInfo
    expert: int | None
    start: int
    nbytes: int


@dataclass
class Statistics:
    """What is known of a span once it was read. `runs` are stretches of zero bytes, counted from its start."""

    nan: int = 0
    infinite: int = 0
    largest: float = 0.0
    sum_of_squares: float = 0.0
    sampled: int = 0
    fingerprint: int = 0
    unread: bool = False
    zero: bool = True
    runs: list[tuple[int, int]] = field(default_factory=list)
    _open: int | None = None

    @property
    def rms(self) -> float:
        return float((self.sum_of_squares / self.sampled) ** 0.5) if self.sampled else 0.0

    def add(self, data: memoryview, at: int, dtype: str) -> None:
        """Take in the bytes from `at`, which follow those taken in before, in whole blocks but for the last."""
        import numpy as np

        if dtype in FLOAT_FORMATS:
            self._magnitudes(data, dtype)
            self._sample(data, dtype)
        elif dtype in BLOCKS:
            self._blocks(data, dtype)
        whole = len(data) // 8 * 8
        words, rest = np.frombuffer(data[:whole], np.uint64), bytes(data[whole:])
        self.fingerprint = (self.fingerprint * 31 + int(words.sum(dtype=np.uint64))) & (2**64 - 1)
        self.fingerprint ^= int.from_bytes(rest, "little")
        self._zeros(words, rest, at)

    def finish(self, nbytes: int) -> Statistics:
        """Say that all `nbytes` were taken in."""
        self._stop(nbytes)
        return self

    def _sample(self, data: memoryview, dtype: str) -> None:
        import numpy as np

        codes = np.ascontiguousarray(np.frombuffer(data, FLOAT_FORMATS[dtype][0])[::_SAMPLE])
        values = numbers(codes.data.cast("B"), dtype)
        assert values is not None
        with np.errstate(all="ignore"):
            values = values.astype(np.float64)
            values = values[np.isfinite(values)]
            self.sum_of_squares += float(np.square(values).sum())  # a dot product would wake BLAS's threads
            self.sampled += len(values)

    def _blocks(self, data: memoryview, dtype: str) -> None:
        """Count blocks whose factors are not finite; dequantise every eighth block."""
        import numpy as np

        blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[dtype][1])
        for at in FACTORS.get(dtype, ()):
            codes = np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2") & 0x7FFF
            self.nan += int(np.count_nonzero(codes > 0x7C00))
            self.infinite += int(np.count_nonzero(codes == 0x7C00))
        try:
            values = block_values(np.ascontiguousarray(blocks[::_SAMPLE]).data.cast("B"), dtype)
        except (RefusedError, ValueError):  # the library is not there, or does not know the type
            self.unread = True
            return
        values = values[np.isfinite(values)].astype(np.float64)
        self.largest = max(self.largest, float(np.abs(values).max(initial=0.0)))
        self.sum_of_squares += float(np.square(values).sum())
        self.sampled += len(values)

    def _magnitudes(self, data: memoryview, dtype: str) -> None:
        import numpy as np

        kind, mask, largest_finite = FLOAT_FORMATS[dtype]
        codes = np.frombuffer(data, kind)
        codes = codes & codes.dtype.type(mask)
        top = int(codes.max(initial=0))
        if top > largest_finite:
            beyond = int(np.count_nonzero(codes > largest_finite))
            infinite = 0 if dtype in _NO_INFINITY else int(np.count_nonzero(codes == largest_finite + 1))
            self.nan += beyond - infinite
            self.infinite += infinite
            top = int(codes[codes <= largest_finite].max(initial=0))
        value = numbers(np.array([top], kind).tobytes(), dtype)
        assert value is not None
        self.largest = max(self.largest, float(value[0]))

    def _zeros(self, words: np.ndarray, rest: bytes, at: int) -> None:
        """Follow stretches of zeros, block by block, across the parts in which the span is read."""
        import numpy as np

        count = len(words) // 8
        blocks, last = words[: count * 8], words[count * 8 :]
        # Weights have hardly ever eight zero bytes in a row, so that most parts are done with one look.
        filled = np.ones(count, bool)
        if (blocks[::8] == 0).any():
            filled = np.asarray(blocks.reshape(-1, 8).any(axis=1))
        changes = np.flatnonzero(filled[1:] != filled[:-1]) + 1
        for block in (0, *changes.tolist()) if count else ():
            if filled[block]:
                self._stop(at + block * BLOCK)
            elif self._open is None:
                self._open = at + block * BLOCK
        if last.any() or any(rest):
            self.zero = False
            self._stop(at + count * BLOCK)
        if filled.any():
            self.zero = False

    def _stop(self, place: int) -> None:
        if self._open is not None and place - self._open >= SHORTEST_RUN and len(self.runs) < MOST_RUNS:
            self.runs.append((self._open, place))
        self._open = None


def survey(source: Source, spans: Sequence[Span], progress: Callable[[int], None], threads: int) -> list[Statistics]:
    """Read all spans once, in order, and return what is known of each.

    Raises CheckpointError where a file cannot be read, or has changed.
    """
    local = threading.local()
    readers: list[FileReader] = []

    def measured(span: Span) -> Statistics:
        if not hasattr(local, "reader"):
            local.reader, local.buffer = FileReader(), Buffer()
            readers.append(local.reader)
        statistics = Statistics()
        remote = local.reader.path(source, span.info.file) is None
        step = _REMOTE_CHUNK if remote else BUFFER
        if span.info.dtype in BLOCKS:
            step -= step % math.lcm(BLOCK, BLOCKS[span.info.dtype][1])
        for at in range(0, span.nbytes, step):
            length = min(step, span.nbytes - at)
            if remote:
                data = memoryview(read_remote(source, span.info.file, span.start + at, length))
            else:
                data = local.reader.bytes_at(source, span.info.file, span.start + at, length, local.buffer)
            statistics.add(data, at, span.info.dtype)
            progress(length)
        return statistics.finish(span.nbytes)

    try:
        if threads == 1:
            statistics = [measured(span) for span in spans]
        else:
            with ThreadPoolExecutor(threads) as pool:
                statistics = list(pool.map(measured, spans))
        for reader in readers:
            reader.check()
        return statistics
    finally:
        for reader in readers:
            reader.close()
