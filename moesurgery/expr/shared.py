"""Functions of whole tensors with several results, computed once: an order of rows, the two factors of a matrix.

Expressions that share a `SharedComputation` are evaluated by different threads, for different tensors; the last few
results are kept, so that it is computed once in each process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.expr.elementwise import narrowed
from moesurgery.expr.nodes import Copy, Expr, Reader, Unary
from moesurgery.expr.tensors import Gather, function_name

if TYPE_CHECKING:
    import torch

KEPT = 8  # solutions in memory, per process


@dataclass(frozen=True)
class SharedComputation:
    """`function(*values, **parameters)`: a module-level function of torch tensors that returns a tuple of new ones."""

    function: Callable[..., tuple[Any, ...]]
    of: tuple[Expr, ...]
    parameters: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Solution({function_name(self.function)}, {self.of!r}, {self.parameters!r})"

    def results(self, reader: Reader) -> tuple[torch.Tensor, ...]:
        """Return the function's results, computing them in one thread at a time."""
        with _lock:
            entry = _kept.setdefault(self, _Entry())
            _kept.move_to_end(self)
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
        with entry.lock:
            if entry.results is None:
                values = [expr.evaluate(0, expr.numel, reader).view(expr.shape) for expr in self.of]
                entry.results = self.function(*values, **dict(self.parameters))
            return entry.results


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.results: tuple[torch.Tensor, ...] | None = None


_lock = threading.Lock()
_kept: OrderedDict[SharedComputation, _Entry] = OrderedDict()


@dataclass(frozen=True)
class SharedResult(Expr):
    """One of the results of a solution, rounded to `dtype`. Memory: all inputs of the solution, and its results."""

    solution: SharedComputation
    index: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def chunk_multiple(self) -> int:
        return max(self.numel, 1)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.solution.of

    def ranges(self, start: int, stop: int) -> Iterator[Copy]:
        return iter(())  # read once for all results

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        result = self.solution.results(reader)[self.index]
        if tuple(result.shape) != self.shape:
            raise AssertionError(f"{self.solution.function.__name__} gave {tuple(result.shape)}, planned {self.shape}")
        return narrowed(result.reshape(-1)[start:stop].clone(), self.dtype)


@dataclass(frozen=True)
class Reordered(Unary):
    """The rows of `of` in the order given by `order`, an I64 vector, when evaluated."""

    order: Expr

    @property
    def chunk_multiple(self) -> int:
        return Gather(self.of, tuple(range(self.shape[0]))).chunk_multiple

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, self.order)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        order = self.order.evaluate(0, self.order.numel, reader)
        return Gather(self.of, tuple(order.tolist())).evaluate(start, stop, reader)
