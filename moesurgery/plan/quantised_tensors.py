"""Expressions of what a matrix is stored as when it is quantised: codes, scales, zero points, and a second scale."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Reader, evaluated
from moesurgery.plan.quantised_form import (
    LARGEST_SCALE,
    Form,
    OldScales,
    Quantities,
    on_steps,
    overall_scale,
    quantise,
    scales,
    squared_error,
)
from moesurgery.plan.rounding import RecordingReader

if TYPE_CHECKING:
    import torch

_CODES = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2", "e2m1": "U8", "int": "U8"}
_TOGETHER = 1 << 18  # elements of a matrix that are quantised, or looked at, together
_WHOLE, _ONE_IN = 1 << 16, 8  # elements of a matrix whose rounding is measured in all rows; else in one of so many


class _MadeScales:
    """Scales that came with codes, kept until they are asked for; not part of the expression.

    Who asks for scales before there are codes makes them, and none is kept from then on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
        self._given_up = False

    def __reduce__(self) -> tuple[type[_MadeScales], tuple[()]]:
        return type(self), ()

    def keep(self, matrix: int, first: int, last: int, scale: torch.Tensor) -> None:
        """Keep the scales of rows `first:last` of a matrix."""
        with self._lock:
            if not self._given_up:
                self._parts[matrix, first] = last, scale

    def take(self, matrix: int, first: int, last: int) -> torch.Tensor | None:
        """Return the scales of rows `first:last`, where such parts were kept, and let go of them."""
        import torch

        with self._lock:
            found, row = [], first
            while row < last and (matrix, row) in self._parts:
                row, scale = self._parts.pop((matrix, row))
                found.append(scale)
            if row == last:
                return found[0] if len(found) == 1 else torch.cat(found)
            self._given_up = True
            self._parts.clear()
            return None


@dataclass(frozen=True)
class Encoding:
    """Matrices `of` [..., out, in] (float32) in a form; `name` is for messages.

    `scale` and `zero` are what they had, [..., out / tall, in / wide] in number: kept where they fit. `columns`: the
    group of each input (I32) where groups are not neighbours. `overall` is the second scale of all matrices. `weights`
    (F32) [..., in]: what squared errors are weighed by, such as the mean squares of the inputs.
    """

    name: str
    of: Expr
    form: Form
    scale: Expr | None = None
    zero: Expr | None = None
    columns: Expr | None = None
    overall: Expr | None = None
    weights: Expr | None = None
    _made: _MadeScales = field(default_factory=_MadeScales, repr=False, compare=False)

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """How many scales a matrix has, down and across."""
        out, width = self.of.shape[-2:]
        return -(-out // self.form.tall), -(-width // self.form.wide)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        parts = (self.of, self.scale, self.zero, self.columns, self.overall, self.weights)
        return tuple(e for e in parts if e is not None)

    def scales(self, matrix: int, first: int, last: int, reader: Reader) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales and zero points of rows `first:last` of one matrix, of whole blocks.

        Those that came with codes, where there are any; so it is best to ask for codes first.
        """
        made = None if self.form.zeros else self._made.take(matrix, first, last)
        if made is not None:
            return made, None
        values, _, old, overall, weights = self._read(matrix, first, last, reader)
        with self._finite():
            return scales(values, self.form, old, overall, weights)

    def codes(self, matrix: int, first: int, last: int, reader: Reader) -> torch.Tensor:
        """Return the codes [rows, in] of rows `first:last` of one matrix, of whole blocks.

        A reader that records rounding is told of it: in all rows, or in every eighth of a large matrix.
        """
        import torch

        values, order, old, overall, weights = self._read(matrix, first, last, reader)
        with self._finite():
            found = quantise(values, self.form, old, overall, weights)
        if not self.form.zeros:
            self._made.keep(matrix, first, last, found.scale)
        if isinstance(reader, RecordingReader):
            rows = torch.arange(0, last - first, _ONE_IN if element_count(self.of.shape[-2:]) > _WHOLE else 1)
            blocks = rows // self.form.tall
            zero = None if found.zero is None else found.zero[blocks]
            some = Quantities(found.codes[rows], found.scale[blocks], zero)
            squares = squared_error(values[rows], self.form, some, overall)
            reader.record.add(str(self.form), self.name, matrix, first, squares)
        if order is not None:
            return torch.empty_like(found.codes).index_copy_(1, order, found.codes)
        return found.codes

    @contextmanager
    def _finite(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            raise _not_finite(self.name) from None

    def _read(
        self, matrix: int, first: int, last: int, reader: Reader
    ) -> tuple[torch.Tensor, torch.Tensor | None, OldScales | None, torch.Tensor | None, torch.Tensor | None]:
        """Return values [rows, in], the order that their inputs were put in, and what else `quantise` wants."""
        import torch

        out, width = self.of.shape[-2:]
        at = matrix * out
        values = evaluated(self.of, (at + first) * width, (at + last) * width, reader).view(last - first, width)
        overall = None if self.overall is None else self.overall.evaluate(0, 1, reader)
        weights = None
        if self.weights is not None:
            weights = evaluated(self.weights, matrix * width, (matrix + 1) * width, reader)
        down, across = self.blocks
        tall = self.form.tall
        where = ((matrix * down + first // tall) * across, (matrix * down + -(-last // tall)) * across)
        old = None
        if self.scale is not None:
            zero = None if self.zero is None else evaluated(self.zero, *where, reader)
            old = OldScales(evaluated(self.scale, *where, reader), zero)
        order = None
        if self.columns is not None:
            order = torch.argsort(self.columns.evaluate(0, width, reader), stable=True)
            values = values[:, order].contiguous()
            weights = None if weights is None else weights[order]
        return values, order, old, overall, weights


@dataclass(frozen=True)
class QuantisedPart(Expr):
    """The codes [..., out, in], scales or zero points [..., out / tall, in / wide] of an encoding."""

    encoding: Encoding
    part: Literal["codes", "scale", "zero"]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        form = self.encoding.form
        codes = "I8" if form.signed else _CODES[form.numbers]
        return {"codes": codes, "scale": form.scale_dtype, "zero": "U8"}[self.part]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        shape = self.encoding.of.shape
        return shape if self.part == "codes" else (*shape[:-2], *self.encoding.blocks)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.encoding.inputs

    @property
    def _row(self) -> int:
        """The elements of a row of blocks."""
        width = self.shape[-1]
        return self.encoding.form.tall * width if self.part == "codes" else width

    @cached_property
    def chunk_multiple(self) -> int:
        out, width = self.encoding.of.shape[-2:]
        tall = self.encoding.form.tall
        apart = (tall * width) % self.encoding.of.chunk_multiple == 0 and out % tall == 0
        return self._row if apart else self.shape[-2] * self.shape[-1]

    @property
    def memory(self) -> int:
        elements = self.chunk_multiple * (1 if self.part == "codes" else self.encoding.form.wide)
        return max(elements * 4 * 4, self.encoding.of.memory)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        tall, out = self.encoding.form.tall, self.encoding.of.shape[-2]
        size = self.shape[-2] * self.shape[-1]
        step = tall * max(1, _TOGETHER // (tall * self.encoding.of.shape[-1]))
        found = []
        while start < stop:
            matrix, inside = divmod(start, size)
            until = min(stop - matrix * size, size)
            rows, last = inside // self._row * tall, min(-(-until // self._row) * tall, out)
            while rows < last:
                some = min(rows + step, last)
                found.append(self._part(matrix, rows, some, reader).reshape(-1))
                rows = some
            start = matrix * size + until
        values = found[0] if len(found) == 1 else torch.cat(found)
        return values.bitwise_xor_(128).view(torch.int8) if self.dtype == "I8" else values

    def _part(self, matrix: int, first: int, last: int, reader: Reader) -> torch.Tensor:
        if self.part == "codes":
            return self.encoding.codes(matrix, first, last, reader)
        scale, zero = self.encoding.scales(matrix, first, last, reader)
        if self.part == "scale":
            return scale
        assert zero is not None
        return zero


def is_scale(expr: Expr) -> bool:
    """Whether an expression is the scales of quantised matrices."""
    return isinstance(expr, QuantisedPart) and expr.part == "scale"


class _Memo:
    """A scale that takes a pass over whole matrices, once for all chunks and threads; not part of the expression."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[_Memo], tuple[()]]:
        return type(self), ()


@dataclass(frozen=True)
class OverallScale(Expr):
    """The second scale (F32) of whole matrices `of` [out, in] together: what they had is kept where it fits them all.

    `old` is what it was, `scales` the first scales of each matrix, as they were.
    """

    name: str
    of: tuple[Expr, ...]
    form: Form
    old: Expr | None = None
    scales: tuple[Expr, ...] = ()
    shape: tuple[int, ...] = ()
    _memo: _Memo = field(default_factory=_Memo, repr=False, compare=False)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return "F32"

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (*self.of, *self.scales, *(() if self.old is None else (self.old,)))

    @property
    def memory(self) -> int:
        return max(_TOGETHER * 16, *(expr.memory for expr in self.of))

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        with self._memo.lock:
            if self._memo.value is None:
                self._memo.value = self._computed(reader)
            return self._memo.value.clone()

    def _computed(self, reader: Reader) -> torch.Tensor:
        import torch

        # A copy: what a reader returns is memory that it uses again, and the scale is kept.
        old = None if self.old is None else self.old.evaluate(0, 1, reader).float().clone()
        most, same = 0.0, old is not None and bool(self.scales)
        for i, expr in enumerate(self.of):
            out, width = expr.shape[-2:]
            rows = expr.chunk_multiple // width if expr.chunk_multiple % width == 0 else out
            rows *= max(1, _TOGETHER // (rows * width))
            for first in range(0, out, rows):
                last = min(first + rows, out)
                values = expr.evaluate(first * width, last * width, reader).view(-1, width)
                least, largest = torch.aminmax(values)
                most = max(most, float(largest), -float(least))
                if same and old is not None:
                    across = -(-width // self.form.wide)
                    scale = evaluated(self.scales[i], first * across, last * across, reader).view(-1, across)
                    same = on_steps(values, self.form, scale, old)
        if not math.isfinite(most):
            raise _not_finite(self.name)
        needed = overall_scale(self.form, most)
        if old is None:
            return needed
        used = float(needed / old if self.form.overall == "times" else old / needed)
        # The smallest first scale that is as fine as the others is 2^-6: there is range to spare.
        return old if same or LARGEST_SCALE**-1 < used <= self.form.limit / self.form.largest else needed


def _not_finite(name: str) -> RefusedError:
    return RefusedError(
        f"{name} would hold numbers that are not finite, and cannot be quantised",
        "`moesurgery validate --level values` finds them in a model; else look at the recipe's factors",
    )
