"""Expressions that change some neurons of an FFN: parts of it, neurons drawn anew, noise.

What they need to know of the weights (clusters of gate rows, mean and deviation of what is replaced) is a
`SharedComputation`: computed once, when the first byte is written, so that planning reads headers alone. Random
numbers depend on a key and on the position, not on order, threads or chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moesurgery.expr.elementwise import narrowed
from moesurgery.expr.nodes import Expr, Reader, Unary
from moesurgery.expr.random import Normal
from moesurgery.expr.shared import SharedComputation
from moesurgery.expr.tensors import Gather

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 20  # elements that are widened together


def partition(gate: Expr, method: str, parts: int, key: int) -> SharedComputation:
    """Return the division of I neurons in equal parts: at random, or by clusters of their rows in `gate` [I, H]."""
    if method == "random":
        return SharedComputation(_random_parts, (), (("width", gate.shape[0]), ("parts", parts), ("key", key)))
    return SharedComputation(_clustered_parts, (gate,), (("parts", parts), ("key", key)))


def _random_parts(*, width: int, parts: int, key: int) -> tuple[torch.Tensor, ...]:
    import torch

    from moesurgery.surgery.upcycle.balanced_clusters import shuffled

    return tuple(torch.from_numpy(shuffled(width, key)).view(parts, -1).sort(dim=1).values)


def _clustered_parts(gate: torch.Tensor, *, parts: int, key: int) -> tuple[torch.Tensor, ...]:
    import numpy as np
    import torch

    from moesurgery.surgery.upcycle.balanced_clusters import balanced_clusters

    labels = balanced_clusters(gate, parts, key)
    return tuple(torch.from_numpy(np.argsort(labels, kind="stable")).view(parts, -1))


@dataclass(frozen=True)
class _Part(Expr):
    """What one part of the neurons has in `of`. `parts` are as many index vectors as there are parts."""

    of: Expr
    parts: SharedComputation
    count: int
    part: int

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.of.dtype

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, *self.parts.of)


@dataclass(frozen=True)
class NeuronSlice(_Part):
    """The rows of `of` [I, H] that belong to one part."""

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.of.shape[0] // self.count, self.of.shape[1])

    @property
    def chunk_multiple(self) -> int:
        return self.shape[1] if self.shape[1] % self.of.chunk_multiple == 0 else self.numel

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        members = self.parts.results(reader)[self.part]
        return Gather(self.of, tuple(members.tolist())).evaluate(start, stop, reader)


@dataclass(frozen=True)
class NeuronSliceLast(_Part):
    """The columns of `of` [H, I] that belong to one part."""

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.of.shape[0], self.of.shape[1] // self.count)

    @property
    def chunk_multiple(self) -> int:
        return _whole_rows(self.of) // self.count

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        members = self.parts.results(reader)[self.part]
        rows = self.of.evaluate(start * self.count, stop * self.count, reader).view(-1, self.of.shape[1])
        return rows[:, members].reshape(-1)


def _whole_rows(of: Expr) -> int:
    """Return the least number of elements of `of` that are whole rows and can be evaluated apart."""
    return math.lcm(of.chunk_multiple, of.shape[-1])


@dataclass(frozen=True)
class _Changed(Unary):
    """A matrix of the dtype and shape of `of`."""

    @property
    def chunk_multiple(self) -> int:
        return _whole_rows(self.of)


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

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        parameters = (("axis", self.axis), ("count", self.count), ("choice", self.choice))
        chosen, (mean, std) = SharedComputation(_replaced, (self.of,), parameters).results(reader)
        width = self.of.shape[1]
        rows = self.of.evaluate(start, stop, reader).view(-1, width)
        first, last = start // width, stop // width
        # The replaced entries, in order, take the numbers of one stream: which part of it is theirs?
        if self.axis == 0:
            begin, end = (int(at) * width for at in torch.searchsorted(chosen, torch.tensor([first, last])))
            index = chosen[begin // width : end // width] - first
        else:
            begin, end = first * self.count, last * self.count
            index = chosen
        drawn = Normal(float(std), self.key, "F32", (end,)).evaluate(begin, end, reader) + mean.float()
        if self.axis == 0:
            rows[index] = drawn.view(-1, width).to(rows.dtype)
        else:
            rows[:, index] = drawn.view(-1, self.count).to(rows.dtype)
        return rows.view(-1)


def _replaced(of: torch.Tensor, *, axis: int, count: int, choice: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neurons to replace, ascending, and the mean and deviation of their entries."""
    import torch

    from moesurgery.surgery.upcycle.balanced_clusters import shuffled

    chosen = torch.from_numpy(shuffled(of.shape[axis], choice)[:count]).sort().values
    return chosen, _moments(of.index_select(axis, chosen))


@dataclass(frozen=True)
class Noisy(_Changed):
    """`of` + N(0, s^2), s being `std`, or `std` times the standard deviation of `of` where it is `relative`."""

    std: float
    relative: bool
    key: int

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        std = self.std
        if self.relative:
            std *= float(SharedComputation(_moments_of, (self.of,)).results(reader)[0][1])
        noise = Normal(std, self.key, "F32", self.shape).evaluate(start, stop, reader)
        return narrowed(self.of.evaluate(start, stop, reader).to(torch.float32) + noise, self.dtype)


def _moments_of(of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (_moments(of),)


def _moments(of: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of all entries, in float64."""
    import torch

    total = squares = 0.0
    for part in _blocks(of):
        total += part.sum().item()
        squares += part.square().sum().item()
    mean = total / of.numel()
    return torch.tensor([mean, math.sqrt(max(squares / of.numel() - mean * mean, 0.0))], dtype=torch.float64)


def _blocks(of: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = of.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK].double()
