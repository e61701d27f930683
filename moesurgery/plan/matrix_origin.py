"""Which stored matrix a matrix of an edited plan is, or is nearest to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS, element_count
from moesurgery.expr.nodes import Concat, Expr, Slice
from moesurgery.expr.tensors import Transposed
from moesurgery.plan.dequantise import Dequantised


def origin_of(expr: Expr) -> Dequantised | None:
    """Return the dequantised weight that an expression is, [out, in] or [in, out]."""
    expr = expr.of if isinstance(expr, Transposed) else expr
    return expr if isinstance(expr, Dequantised) and expr.held is not None else None


def first_origin(expr: Expr) -> Dequantised | None:
    """Return the first dequantised weight that an expression is computed from."""
    return origin_of(expr) or next((found for part in expr.inputs if (found := first_origin(part)) is not None), None)


@dataclass(frozen=True)
class _Run:
    """Elements `start:stop` (flattened) of an expression that is no selection."""

    expr: Expr
    start: int
    stop: int


def _runs(expr: Expr, start: int, stop: int) -> Iterator[_Run]:
    """Yield what elements of an expression are elements of, neighbours joined."""
    last: _Run | None = None
    for run in _pieces(expr, start, stop):
        if last is not None and last.expr is run.expr and last.stop == run.start:
            last = replace(last, stop=run.stop)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _pieces(expr: Expr, start: int, stop: int) -> Iterator[_Run]:
    if isinstance(expr, Concat):
        for part, first, last in expr.within(start, stop):
            yield from _pieces(part, first, last)
    elif isinstance(expr, Slice):
        yield from _pieces(expr.of, expr.offset + start, expr.offset + stop)
    else:
        yield _Run(expr, start, stop)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a tensor: the stored one that it is, or is nearest to, and whether it is that one unchanged."""

    origin: Dequantised | None
    index: int
    same: bool


def _nearest(run: _Run) -> tuple[Dequantised | None, int]:
    """Return the stored matrix that an edited one is nearest to, the first that it is computed from, and its index."""
    expr = run.expr
    while (origin := origin_of(expr)) is None:
        same_size = [part for part in expr.inputs if part.numel == expr.numel and part.dtype in PLAIN_FLOATS]
        if not same_size:
            first = next(iter(expr.inputs), None)
            if not isinstance(expr, (Slice, Concat)) or first is None:
                return None, 0
            run = next(_pieces(expr, run.start, run.stop))
            expr = run.expr
            continue
        expr = same_size[0]
        if isinstance(expr, (Slice, Concat)):
            run = next(_pieces(expr, run.start, run.stop))
            expr = run.expr
    return origin, run.start // element_count(origin.shape[-2:])


def traced_matrices(expr: Expr, own: Dequantised | None) -> Iterator[Matrix]:
    """Yield the matrices of a weight; `own` is what has its name in the opened plan."""
    size = element_count(expr.shape[-2:])
    for number in range(expr.numel // size if size else 0):
        runs = list(_runs(expr, number * size, (number + 1) * size))
        run = runs[0]
        origin = origin_of(run.expr)
        if len(runs) == 1 and origin is not None and run.expr.shape[-2:] == expr.shape[-2:] and run.start % size == 0:
            yield Matrix(origin, run.start // size, True)
            continue
        near, index = _nearest(run)
        if near is None and own is not None and number < own.numel // size:
            near, index = own, number
        fits = near is not None and element_count(near.shape[-2:]) == size
        yield Matrix(near if fits else None, index, False)
