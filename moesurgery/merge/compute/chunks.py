"""What a method sees: the same tensor of all inputs, in chunks, and sums and ranks over the whole of it.

What norms, angles and densities are taken over is a tensor, or one projection of one expert. The inputs are
never in memory together: every pass reads them again, which costs less than to hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Reader
from moesurgery.merge.compute.backend import Array, NumpyBackend, TorchBackend
from moesurgery.merge.compute.random_bits import RandomBits
from moesurgery.merge.compute.threshold import NO_THRESHOLD, Threshold, ThresholdSearch

if TYPE_CHECKING:
    import numpy as np

_SAMPLE_RUNS, _SAMPLE_RUN = 128, 512  # what `MergeInputs.thresholds` looks at before it reads everything


class Chunk:
    """Elements `start:stop` of the inputs: flat arrays, or [rows, width] for methods that want rows."""

    def __init__(self, inputs: MergeInputs, start: int, stop: int, models: list[Array], base: Array | None) -> None:
        self._inputs = inputs
        self.start, self.stop = start, stop
        self.models, self._base = models, base

    @property
    def base(self) -> Array:
        assert self._base is not None
        return self._base

    @cached_property
    def deltas(self) -> list[Array]:
        """What each model adds to the base."""
        return [model - self.base for model in self.models]

    def random_mask(self, model: int, probability: Array | float) -> Array:
        """Return True with `probability` (to 1/65536) per element, by the merge's key and the position alone."""
        import numpy as np

        numbers = self._inputs.random.numbers(model, self.start, self.stop)
        backend = self._inputs.backend
        if isinstance(probability, float):
            threshold = round(probability * 65536)
            mask = np.ones(len(numbers), bool) if threshold > 65535 else numbers < np.uint16(threshold)
            return backend.from_numpy(mask).reshape(self.models[model].shape)
        scaled = backend.from_numpy(numbers.astype(np.float32)).reshape(probability.shape)
        return scaled < probability * 65536


def checked_sums(sums: np.ndarray) -> np.ndarray:
    """Return sums over a tensor from which its merge is decided. Raises RefusedError where one is not finite."""
    import numpy as np

    if not np.isfinite(sums).all():
        raise RefusedError(
            "a tensor to be merged holds NaN, infinity or numbers too large to square, and this method decides about"
            " all of it by sums",
            "`moesurgery validate --level values` finds it; linear and task_arithmetic take each element by itself",
        )
    return sums


class MergeInputs:
    """The inputs of one merge. `key` is that of its random numbers."""

    def __init__(
        self,
        models: Sequence[Expr],
        base: Expr | None,
        shape: tuple[int, ...],
        reader: Reader,
        backend: NumpyBackend | TorchBackend,
        *,
        rows: bool = False,
        key: int = 0,
    ) -> None:
        self.models, self.base = models, base
        self.shape, self.numel = shape, element_count(shape)
        self.width = shape[-1] if shape else 1
        self.reader, self.backend, self.rows, self.key = reader, backend, rows, key

    @cached_property
    def random(self) -> RandomBits:
        return RandomBits(self.key)

    @property
    def count(self) -> int:
        """The number of models, without the base."""
        return len(self.models)

    @cached_property
    def chunk_multiple(self) -> int:
        from math import lcm

        own = self.width if self.rows else 1
        return lcm(own, *(e.chunk_multiple for e in (*self.models, *((self.base,) if self.base else ()))))

    @property
    def memory(self) -> int:
        """About how many bytes of arrays there are at once."""
        inputs = self.count + (self.base is not None)
        part = max(self.backend.step // self.chunk_multiple, 1) * self.chunk_multiple
        return 4 * min(part, self.numel) * (inputs + 3)

    def chunk(self, start: int, stop: int) -> Chunk:
        """Read elements `start:stop` of all inputs."""
        shape = (-1, self.width) if self.rows else (-1,)

        def read(expr: Expr) -> Array:
            return self.backend.read(expr, start, stop, self.reader).reshape(shape)

        base = None if self.base is None else read(self.base)
        return Chunk(self, start, stop, [read(expr) for expr in self.models], base)

    def spans(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the parts in which elements `start:stop` are to be looked at."""
        stop = self.numel if stop is None else stop
        step = max(1, self.backend.step // self.chunk_multiple) * self.chunk_multiple
        while start < stop:
            last = min(stop, (start // step + 1) * step)
            yield start, last
            start = last

    def chunks(self) -> Iterator[Chunk]:
        for start, stop in self.spans():
            yield self.chunk(start, stop)

    def total(self, function: Callable[[Chunk], Any]) -> np.ndarray:
        """Return the sum over all chunks of the numbers that `function` gives, in float64.

        Raises RefusedError where a sum is not finite: what one element is would decide about all.
        """
        import numpy as np

        total: np.ndarray | None = None
        for chunk in self.chunks():
            part = np.asarray(function(chunk), np.float64)
            total = part if total is None else total + part
        assert total is not None
        return checked_sums(total)

    def thresholds(
        self, function: Callable[[Chunk], Sequence[Array]], counts: Sequence[Sequence[int]]
    ) -> list[list[Threshold]]:
        """Return the thresholds above which the `counts` largest values of each array of `function` are.

        `function` gives arrays of non-negative numbers, each with its list of counts. Exact, in flat memory: a sample
        says between which values a threshold lies, one pass counts what is above and keeps what is between. Of equal
        values the later ones are the larger.
        """
        searches = [
            [ThresholdSearch(count, self.numel, sample) for count in wanted]
            for wanted, sample in zip(counts, self._sample(function), strict=True)
        ]
        while any(not search.done for row in searches for search in row):
            for chunk in self.chunks():
                for values, row in zip(function(chunk), searches, strict=True):
                    for search in row:
                        if not search.done:
                            search.count_in(values, self.backend)
            for row in searches:
                for search in row:
                    search.conclude()
        return [[self._threshold(search, function, i) for search in row] for i, row in enumerate(searches)]

    def _sample(self, function: Callable[[Chunk], Sequence[Array]]) -> list[np.ndarray]:
        """Return some values of each array of `function`, sorted: from evenly spaced runs."""
        import numpy as np

        run = max(1, -(-_SAMPLE_RUN // self.chunk_multiple)) * self.chunk_multiple
        runs = max(1, min(_SAMPLE_RUNS, self.numel // run))
        if runs * run * 4 > self.numel:
            starts = [(0, self.numel)]
        else:
            gap = self.numel // runs // self.chunk_multiple * self.chunk_multiple
            starts = [(i * gap, i * gap + run) for i in range(runs)]
        samples: list[list[np.ndarray]] = []
        for start, stop in starts:
            for first, last in self.spans(start, stop):
                for i, values in enumerate(function(self.chunk(first, last))):
                    if len(samples) <= i:
                        samples.append([])
                    samples[i].append(self.backend.to_numpy(values).reshape(-1))
        return [np.sort(np.concatenate(parts)) for parts in samples]

    def _threshold(
        self, search: ThresholdSearch, function: Callable[[Chunk], Sequence[Array]], which: int
    ) -> Threshold:
        """Turn a finished search into a threshold: find the position from which equal values count."""
        import numpy as np

        if search.count <= 0:
            return NO_THRESHOLD
        needed = search.count - search.above
        for (start, stop), equal in zip(reversed(list(self.spans())), reversed(search.equal), strict=True):
            if equal < needed:
                needed -= equal
                continue
            if equal == needed:
                return Threshold(search.value, start)
            values = self.backend.to_numpy(function(self.chunk(start, stop))[which]).reshape(-1)
            return Threshold(search.value, start + int(np.flatnonzero(values == search.value)[-needed]))
        raise AssertionError("the values changed between two passes")
