"""What differs between two checkpoints, tensor by tensor and in the config. Streamed: no tensor is ever loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moesurgery.checkpoint.arrays import numbers
from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.dtypes import BITS, BLOCKS
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.checkpoint.read_ahead import read_remote
from moesurgery.write.card import json_differences
from moesurgery.write.job_control import ByteProgress

PART = 1 << 20  # elements compared at a time

DifferenceKind = Literal["added", "removed", "shape", "dtype", "values"]


@dataclass(frozen=True)
class Distance:
    """How far two tensors of one shape are apart, over what is finite in both.

    `largest` is max |a - b|, `relative` is |a - b| / |a| in the 2-norm, `cosine` that of the angle between them.
    `not_finite` counts positions where only one of them is finite.
    """

    largest: float
    relative: float
    cosine: float
    not_finite: int = 0


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both. `distance` is None where values cannot be compared."""

    name: str
    kind: DifferenceKind
    before: tuple[str, tuple[int, ...]] | None
    after: tuple[str, tuple[int, ...]] | None
    distance: Distance | None = None


@dataclass(frozen=True)
class Difference:
    """All that differs. `config` has (key, before, after); `equal` counts tensors with the same bytes."""

    tensors: tuple[TensorDifference, ...]
    config: tuple[tuple[str, Any, Any], ...]
    equal: int

    @property
    def same(self) -> bool:
        return not self.tensors and not self.config


def diff_checkpoints(a: Checkpoint, b: Checkpoint, progress: ByteProgress = lambda count: None) -> Difference:
    """Compare two checkpoints; `progress` is told the bytes that were compared. Raises CheckpointError."""
    differing = list(_differing(a, b, progress))
    equal = len(a.tensors.keys() | b.tensors.keys()) - len(differing)
    return Difference(tuple(differing), tuple(json_differences(a.config, b.config)), equal)


def _differing(a: Checkpoint, b: Checkpoint, progress: ByteProgress) -> Iterator[TensorDifference]:
    for name, mine in a.tensors.items():
        theirs = b.tensors.get(name)
        before = (mine.dtype, mine.shape)
        if theirs is None:
            yield TensorDifference(name, "removed", before, None)
            continue
        after = (theirs.dtype, theirs.shape)
        if mine.shape != theirs.shape:
            yield TensorDifference(name, "shape", before, after)
        elif mine.dtype != theirs.dtype:
            yield TensorDifference(name, "dtype", before, after, distance(a, mine, b, theirs))
        elif not _same_bytes(a, mine, b, theirs):
            yield TensorDifference(name, "values", before, after, distance(a, mine, b, theirs))
        progress(mine.nbytes)
    for name, theirs in b.tensors.items():
        if name not in a.tensors:
            yield TensorDifference(name, "added", None, (theirs.dtype, theirs.shape))


def _same_bytes(a: Checkpoint, mine: TensorInfo, b: Checkpoint, theirs: TensorInfo) -> bool:
    step = 8 << 20
    return all(
        read_remote(a.source, mine.file, mine.start + at, min(step, mine.nbytes - at))
        == read_remote(b.source, theirs.file, theirs.start + at, min(step, theirs.nbytes - at))
        for at in range(0, mine.nbytes, step)
    )


def distance(a: Checkpoint, mine: TensorInfo, b: Checkpoint, theirs: TensorInfo) -> Distance | None:
    """Return how far two tensors of one shape are apart; None for packed types, which are numbers only together."""
    import numpy as np

    largest, not_finite = 0.0, 0
    apart = size_a = size_b = product = 0.0
    for x, y in zip(_parts(a, mine), _parts(b, theirs), strict=True):
        if x is None or y is None:
            return None
        finite = np.isfinite(x) & np.isfinite(y)
        not_finite += int(np.count_nonzero(np.isfinite(x) != np.isfinite(y)))
        x, y = x[finite].astype(np.float64), y[finite].astype(np.float64)
        gap = x - y
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
        apart += float(np.square(gap).sum())  # a dot product would wake BLAS's threads
        size_a, size_b = size_a + float(np.square(x).sum()), size_b + float(np.square(y).sum())
        product += float((x * y).sum())
    relative = math.sqrt(apart / size_a) if size_a else (0.0 if not apart else math.inf)
    cosine = product / math.sqrt(size_a * size_b) if size_a and size_b else (1.0 if size_a == size_b else 0.0)
    return Distance(largest, relative, min(1.0, max(-1.0, cosine)), not_finite)


def _parts(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[Any]:
    """Yield a tensor's numbers, `PART` elements at a time."""
    if BITS[info.dtype] % 8 and info.dtype not in BLOCKS:
        yield None
        return
    step = int(PART * BITS[info.dtype] // 8)
    for at in range(0, info.nbytes, step):
        data = read_remote(checkpoint.source, info.file, info.start + at, min(step, info.nbytes - at))
        try:
            yield numbers(data, info.dtype)
        except ValueError:  # a block type that is not dequantised
            yield None
