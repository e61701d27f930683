"""Expressions that change some neurons of an FFN: parts of it, neurons drawn anew, noise.

What they need to know of the weights (clusters of gate rows, mean and deviation of what is replaced) is found when
the first byte is written, once per tensor, so that planning reads headers alone. Random numbers depend on a key and
on the position, not on order, threads or chunks.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.plan.expr import Expr, Reader, torch_dtype
from moesurgery.plan.reader import FileReader
from moesurgery.plan.tensors import Normal, Picked

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 1 << 18  # elements to look at together


class _Memo:
    """The last few results of a slow function, shared by all threads; each is computed once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, Future[Any]] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        with self._lock:
            future = self._found.get(key)
            first = future is None
            if future is None:
                future = self._found[key] = Future()
                while len(self._found) > self._size:
                    self._found.popitem(last=False)
        if first:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._found.pop(key, None)
        return future.result()


_statistics = _Memo(64)
_members = _Memo(8)


def whole_rows(of: Expr) -> int:
    """Return the least number of elements of `of` that are whole rows and can be evaluated apart."""
    return math.lcm(of.granule, of.shape[-1])


def in_chunks(of: Expr) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows as float32) of a matrix, a part at a time."""
    import torch

    reader = FileReader()
    step = max(1, CHUNK // whole_rows(of)) * whole_rows(of)
    try:
        for start in range(0, of.numel, step):
            reader.begin_chunk()
            part = of.evaluate(start, min(start + step, of.numel), reader)
            yield start // of.shape[-1], part.view(-1, of.shape[-1]).to(torch.float32)
    finally:
        reader.close()


@dataclass(frozen=True)
class Partition:
    """The I neurons of an FFN in `parts` equal parts: at random, or by clusters of their rows in `gate` [I, H]."""

    method: Literal["random", "clusters"]
    parts: int
    key: int
    gate: Expr

    def members(self, part: int) -> np.ndarray:
        """Return the neurons of one part, ascending."""
        found: np.ndarray = _members.get(self, self._compute)[part]
        return found

    def _compute(self) -> np.ndarray:
        import numpy as np

        from moesurgery.surgery.upcycling.clusters import balanced_clusters, quantised_rows, shuffled

        width = self.gate.shape[0]
        if self.method == "random":
            return np.sort(shuffled(width, self.key).reshape(self.parts, -1), axis=1)
        rows = quantised_rows(width, self.gate.shape[1], ((at, rows.numpy()) for at, rows in in_chunks(self.gate)))
        labels = balanced_clusters(rows, self.parts, self.key)
        return np.argsort(labels, kind="stable").reshape(self.parts, -1)


@dataclass(frozen=True)
class NeuronRows(Expr):
    """The rows of `of` [I, H] that belong to one part."""

    of: Expr
    partition: Partition
    part: int

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.of.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.of.shape[0] // self.partition.parts, self.of.shape[1])

    @property
    def granule(self) -> int:
        return self.shape[1] if self.shape[1] % self.of.granule == 0 else self.numel

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, self.partition.gate)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        return Picked(self.of, tuple(self.partition.members(self.part).tolist())).evaluate(start, stop, reader)


@dataclass(frozen=True)
class NeuronColumns(Expr):
    """The columns of `of` [H, I] that belong to one part."""

    of: Expr
    partition: Partition
    part: int

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.of.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.of.shape[0], self.of.shape[1] // self.partition.parts)

    @property
    def granule(self) -> int:
        return whole_rows(self.of) // self.partition.parts

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, self.partition.gate)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        parts = self.partition.parts
        rows = self.of.evaluate(start * parts, stop * parts, reader).view(-1, self.of.shape[1])
        return rows[:, torch.from_numpy(self.partition.members(self.part))].reshape(-1)


@dataclass(frozen=True)
class _Changed(Expr):
    """A matrix of the dtype and shape of `of`."""

    of: Expr

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def granule(self) -> int:
        return whole_rows(self.of)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Redrawn(_Changed):
    """`of` with `count` of its neurons drawn anew from N(mean, std) of the entries they replace (Drop-Upcycling).

    Neurons are rows (`axis` 0: gate, up) or columns (1: down); equal `choice` and `count` choose the same ones.
    Source: Nakamura et al., arXiv 2502.19261, section 3.
    """

    axis: int
    count: int
    choice: int
    key: int

    def chosen(self) -> np.ndarray:
        """Return the neurons that are replaced, ascending."""
        import numpy as np

        from moesurgery.surgery.upcycling.clusters import shuffled

        return np.sort(shuffled(self.of.shape[self.axis], self.choice)[: self.count])

    def _moments(self) -> tuple[np.ndarray, float, float]:
        import torch

        chosen = self.chosen()
        index = torch.from_numpy(chosen)
        total = squares = 0.0
        for first, rows in in_chunks(self.of):
            if self.axis == 0:
                inside = index[(index >= first) & (index < first + len(rows))] - first
                part = rows[inside].double()
            else:
                part = rows[:, index].double()
            total += part.sum().item()
            squares += part.square().sum().item()
        size = len(chosen) * self.of.shape[1 - self.axis]
        mean = total / size
        return chosen, mean, math.sqrt(max(squares / size - mean * mean, 0.0))

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import numpy as np
        import torch

        chosen, mean, std = _statistics.get(self, self._moments)
        width = self.of.shape[1]
        rows = self.of.evaluate(start, stop, reader).view(-1, width)
        first, last = start // width, stop // width
        # The replaced entries, in order, take the numbers of one stream: which part of it is theirs?
        if self.axis == 0:
            begin, end = (int(np.searchsorted(chosen, row)) * width for row in (first, last))
            index = torch.from_numpy(chosen[begin // width : end // width] - first)
        else:
            begin, end = first * self.count, last * self.count
            index = torch.from_numpy(chosen)
        drawn = Normal(std, self.key, "F32", (end,)).evaluate(begin, end, reader) + mean
        if self.axis == 0:
            rows[index] = drawn.view(-1, width).to(rows.dtype)
        else:
            rows[:, index] = drawn.view(-1, self.count).to(rows.dtype)
        return rows.view(-1)


@dataclass(frozen=True)
class Noisy(_Changed):
    """`of` + N(0, s^2), s being `std`, or `std` times the standard deviation of `of` where it is `relative`."""

    std: float
    relative: bool
    key: int

    def _deviation(self) -> float:
        total = squares = 0.0
        for _, rows in in_chunks(self.of):
            wide = rows.double()
            total += wide.sum().item()
            squares += wide.square().sum().item()
        mean = total / self.of.numel
        return math.sqrt(max(squares / self.of.numel - mean * mean, 0.0))

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        scale = self.std * (_statistics.get(self.of, self._deviation) if self.relative else 1.0)
        noise = Normal(scale, self.key, "F32", self.shape).evaluate(start, stop, reader)
        return (self.of.evaluate(start, stop, reader).to(torch.float32) + noise).to(torch_dtype(self.dtype))
