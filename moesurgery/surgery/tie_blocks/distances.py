"""How far blocks are from what replaces them: ||W - R|| / ||W||, for each kind of tensor.

A sample of evenly spaced rows gives the ratio to about a percent, and reads a few megabytes per block where all of it
would mean reading the model. numpy only.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Expr, reshape
from moesurgery.plan.plan import Table

if TYPE_CHECKING:
    import numpy as np

Distances = Literal["sampled", "exact", "none"]
_RUNS = 8  # places in a tensor
SAMPLE = 1 << 16  # values per kind of tensor and block
EXPERTS = 8  # of those stored apart, as many are looked at
_CHUNK = 1 << 20  # values at a time
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Compared = tuple[str, int, Expr, Sequence[Expr]]  # name inside the block, position, the tensor, the mean of these


def relative_distances(compared: Sequence[Compared], how: Distances) -> tuple[dict[str, dict[int, float]], int]:
    """Return, for each kind of tensor and each position, the relative distance; quantised tensors are left out.

    Second, how many values were left out because they or what replaces them are not finite.
    """
    kinds: dict[tuple[str, int], list[Compared]] = defaultdict(list)
    for entry in compared:
        if all(expr.dtype in PLAIN_FLOATS for expr in (entry[2], *entry[3])):
            kinds[_NUMBER.sub("#", entry[0]).removesuffix(".weight"), entry[1]].append(entry)
    by_kind: dict[str, dict[int, float]] = defaultdict(dict)
    left_out = 0
    for (kind, position), entries in kinds.items():
        if how == "sampled":
            entries = entries[:: -(-len(entries) // EXPERTS)]
        squares = [_squares(entry, SAMPLE // len(entries) if how == "sampled" else None) for entry in entries]
        apart, whole = (math.fsum(sums[i] for sums in squares) for i in range(2))
        left_out += sum(sums[2] for sums in squares)
        by_kind[kind][position] = math.sqrt(apart / whole) if whole else 0.0
    return dict(by_kind), left_out


def _squares(entry: Compared, sample: int | None) -> tuple[float, float, int]:
    """Return the sums of (W - R)^2 and of W^2 over finite values, and how many others there are."""
    import numpy as np

    _, _, expr, parts = entry
    apart, whole, left_out = 0.0, 0.0, 0
    for start, stop in _runs(expr, sample):
        own = _rows(expr, start, stop)
        with np.errstate(invalid="ignore"):  # of infinities of both signs
            other = np.mean([_rows(part, start, stop) for part in parts], axis=0)
        finite = np.isfinite(own) & np.isfinite(other)
        left_out += finite.size - int(finite.sum())
        apart += float(np.square(own[finite] - other[finite]).sum())
        whole += float(np.square(own[finite]).sum())
    return apart, whole, left_out


def _rows(expr: Expr, start: int, stop: int) -> np.ndarray:
    import numpy as np

    width = expr.shape[-1] if expr.shape else 1
    return values_of(reshape(expr, (expr.numel // width, width)), (start, stop)).astype(np.float64)


def _runs(expr: Expr, sample: int | None) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows (of the last axis): all in chunks, or about `sample` values in a few places."""
    width = max(1, expr.shape[-1] if expr.shape else 1)
    rows = expr.numel // width
    if sample is None or expr.numel <= sample:
        step = max(1, _CHUNK // width)
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    runs = min(_RUNS, max(1, sample // width))
    length = max(1, sample // width // runs)
    for run in range(runs):
        start = (rows - length) * (2 * run + 1) // (2 * runs)
        yield start, start + length


def distance_table(found: Mapping[str, Mapping[int, float]]) -> Table:
    """Return the mean over the positions whose weights were replaced, and the worst, for each kind of tensor."""
    rows = []
    for kind, by_position in found.items():
        worst = max(by_position, key=lambda position: by_position[position])
        mean = sum(by_position.values()) / len(by_position)
        rows.append((kind, f"{mean:.3f}", f"{by_position[worst]:.3f}", str(worst)))
    return Table(("tensor", "distance (mean)", "worst", "at block"), tuple(rows))
