"""What a method sees: the same tensor of all inputs, in chunks, and sums and ranks over the whole of it.

A unit is what norms, angles and densities are taken over: a tensor, or one projection of one expert. Its inputs are
never in memory together: every pass reads them again, which costs less than to hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.errors import RefusedError
from moesurgery.plan.arrays import encoded
from moesurgery.plan.expr import Expr, Reader, Stored, torch_dtype

if TYPE_CHECKING:
    import numpy as np

STEP = 1 << 18  # elements: threads that finish small parts too often wait for each other at the interpreter's lock
DEVICE_STEP = 1 << 22  # on an accelerator each operation must be worth its start
RANDOM_BLOCK = 1 << 15
SAMPLE_RUNS, SAMPLE_RUN = 128, 512  # what `Unit.cuts` looks at before it reads everything

Array = Any  # float32, of numpy or torch


def namespace(array: Array) -> Any:
    """Return the module of functions for an array: numpy or torch. They agree on what methods use."""
    import sys

    import numpy as np

    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


class Host:
    """Arrays are numpy's."""

    step = STEP

    def given(self, values: np.ndarray) -> Array:
        return values

    def read(self, expr: Expr, start: int, stop: int, reader: Reader) -> Array:
        """Return elements `start:stop` of an input, in float32 or float64."""
        return expr.array(start, stop, reader)

    def taken(self, values: Array) -> np.ndarray:
        import numpy as np

        return np.asarray(values)

    def encoded(self, values: Array, dtype: str) -> memoryview:
        """Return the bytes of `values` rounded to `dtype`; `values` are used up."""
        return encoded(values, dtype)


class Device:
    """Arrays are torch's, on `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step = STEP if name == "cpu" else DEVICE_STEP

    def given(self, values: np.ndarray) -> Array:
        import torch

        return torch.from_numpy(values).to(self.name)

    def read(self, expr: Expr, start: int, stop: int, reader: Reader) -> Array:
        import torch

        if not (isinstance(expr, Stored) and expr.light):
            return self.given(expr.array(start, stop, reader))
        data = torch.frombuffer(expr.raw(start, stop, reader), dtype=torch_dtype(expr.dtype))
        # A copy always: the bytes are overwritten by the next read.
        return data.to(self.name, torch.float64 if expr.dtype == "F64" else torch.float32, copy=True)

    def taken(self, values: Array) -> np.ndarray:
        return values.cpu().numpy()  # type: ignore[no-any-return]

    def encoded(self, values: Array, dtype: str) -> memoryview:
        import torch

        return values.to(torch_dtype(dtype)).cpu().contiguous().view(torch.uint8).numpy().data  # type: ignore[no-any-return]


class RandomBits:
    """Random bits of one key at any place; not for several threads at once."""

    def __init__(self, key: int) -> None:
        import numpy as np

        self.key = key
        self._generator = np.random.Philox(key=(key, 0))
        self._state: Any = self._generator.state

    def at(self, model: int, block: int) -> np.random.Philox:
        """Return the generator of a block. Setting it costs a sixth of making one."""
        self._state["state"]["key"][:] = (self.key, model)
        self._state["state"]["counter"][:] = (0, 0, 0, block)
        self._generator.state = self._state
        return self._generator


class Chunk:
    """Elements `start:stop` of a unit: flat arrays, or [rows, width] for methods that want rows."""

    def __init__(self, unit: Unit, start: int, stop: int, models: list[Array], base: Array | None) -> None:
        self.unit = unit
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

    def drawn(self, model: int, probability: Array | float) -> Array:
        """Return True with `probability` (to 1/65536) per element, by the unit's key and the position alone."""
        import numpy as np

        found = []
        for block in range(self.start // RANDOM_BLOCK, -(-self.stop // RANDOM_BLOCK)):
            drawn = self.unit.random.at(model, block).random_raw(RANDOM_BLOCK // 4).view("<u2")
            at = block * RANDOM_BLOCK
            found.append(drawn[max(self.start - at, 0) : min(self.stop - at, RANDOM_BLOCK)])
        numbers = found[0] if len(found) == 1 else np.concatenate(found)
        if isinstance(probability, float):
            threshold = round(probability * 65536)
            mask = np.ones(len(numbers), bool) if threshold > 65535 else numbers < np.uint16(threshold)
            return self.unit.engine.given(mask).reshape(self.models[model].shape)
        scaled = self.unit.engine.given(numbers.astype(np.float32)).reshape(probability.shape)
        return scaled < probability * 65536


@dataclass(frozen=True)
class Cut:
    """The n largest of all values: those above `value`, and of those equal to it the ones from `position` on."""

    value: float
    position: int

    def mask(self, values: Array, start: int) -> Array:
        """Return which of `values`, that begin at `start`, are among the largest."""
        count = element_count(values.shape)
        if self.position <= start:
            return values >= self.value
        if self.position >= start + count:
            return values > self.value
        found = (values > self.value).reshape(-1)
        rest = self.position - start
        found[rest:] = values.reshape(-1)[rest:] >= self.value
        return found.reshape(values.shape)


NOTHING = Cut(float("inf"), 0)


class Unit:
    """The inputs of one merge. `key` is that of its random numbers."""

    def __init__(
        self,
        models: Sequence[Expr],
        base: Expr | None,
        shape: tuple[int, ...],
        reader: Reader,
        engine: Host | Device,
        *,
        rows: bool = False,
        key: int = 0,
    ) -> None:
        self.inputs, self.base_input = models, base
        self.shape, self.numel = shape, element_count(shape)
        self.width = shape[-1] if shape else 1
        self.reader, self.engine, self.rows, self.key = reader, engine, rows, key

    @cached_property
    def random(self) -> RandomBits:
        return RandomBits(self.key)

    @property
    def count(self) -> int:
        """The number of models, without the base."""
        return len(self.inputs)

    @cached_property
    def granule(self) -> int:
        from math import lcm

        own = self.width if self.rows else 1
        return lcm(own, *(e.granule for e in (*self.inputs, *((self.base_input,) if self.base_input else ()))))

    def chunk(self, start: int, stop: int) -> Chunk:
        """Read elements `start:stop` of all inputs."""
        shape = (-1, self.width) if self.rows else (-1,)

        def read(expr: Expr) -> Array:
            return self.engine.read(expr, start, stop, self.reader).reshape(shape)

        base = None if self.base_input is None else read(self.base_input)
        return Chunk(self, start, stop, [read(expr) for expr in self.inputs], base)

    def spans(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the parts in which elements `start:stop` are to be looked at."""
        stop = self.numel if stop is None else stop
        step = max(1, self.engine.step // self.granule) * self.granule
        while start < stop:
            last = min(stop, (start // step + 1) * step)
            yield start, last
            start = last

    def chunks(self) -> Iterator[Chunk]:
        for start, stop in self.spans():
            yield self.chunk(start, stop)

    def total(self, function: Callable[[Chunk], Any]) -> np.ndarray:
        """Return the sum over all chunks of the numbers that `function` gives, in float64."""
        import numpy as np

        total: np.ndarray | None = None
        for chunk in self.chunks():
            part = np.asarray(function(chunk), np.float64)
            total = part if total is None else total + part
        assert total is not None
        return total

    def cuts(self, function: Callable[[Chunk], Sequence[Array]], counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
        """Return the cuts above which the `counts` largest values of each array of `function` are.

        `function` gives arrays of non-negative numbers, each with its list of counts. Exact, in flat memory: a sample
        says between which values a cut lies, one pass counts what is above and keeps what is between. Of equal
        values the later ones are the larger.
        """
        searches = [
            [_Search(count, self.numel, sample) for count in wanted]
            for wanted, sample in zip(counts, self._sample(function), strict=True)
        ]
        while any(not search.done for row in searches for search in row):
            for chunk in self.chunks():
                for values, row in zip(function(chunk), searches, strict=True):
                    for search in row:
                        if not search.done:
                            search.see(values, self.engine)
            for row in searches:
                for search in row:
                    search.conclude()
        return [[self._cut(search, function, i) for search in row] for i, row in enumerate(searches)]

    def _sample(self, function: Callable[[Chunk], Sequence[Array]]) -> list[np.ndarray]:
        """Return some values of each array of `function`, sorted: from evenly spaced runs."""
        import numpy as np

        run = max(1, -(-SAMPLE_RUN // self.granule)) * self.granule
        runs = max(1, min(SAMPLE_RUNS, self.numel // run))
        if runs * run * 4 > self.numel:
            starts = [(0, self.numel)]
        else:
            gap = self.numel // runs // self.granule * self.granule
            starts = [(i * gap, i * gap + run) for i in range(runs)]
        found: list[list[np.ndarray]] = []
        for start, stop in starts:
            for first, last in self.spans(start, stop):
                for i, values in enumerate(function(self.chunk(first, last))):
                    if len(found) <= i:
                        found.append([])
                    found[i].append(self.engine.taken(values).reshape(-1))
        return [np.sort(np.concatenate(parts)) for parts in found]

    def _cut(self, search: _Search, function: Callable[[Chunk], Sequence[Array]], which: int) -> Cut:
        """Turn a finished search into a cut: find the position from which equal values count."""
        import numpy as np

        if search.count <= 0:
            return NOTHING
        needed = search.count - search.above
        for (start, stop), equal in zip(reversed(list(self.spans())), reversed(search.equal), strict=True):
            if equal < needed:
                needed -= equal
                continue
            if equal == needed:
                return Cut(search.value, start)
            values = self.engine.taken(function(self.chunk(start, stop))[which]).reshape(-1)
            return Cut(search.value, start + int(np.flatnonzero(values == search.value)[-needed]))
        raise AssertionError("the values changed between two passes")


class _Search:
    """The search for the `count`-th largest of `total` values, with a sorted sample of them to start from."""

    def __init__(self, count: int, total: int, sample: np.ndarray) -> None:
        self.count, self.total, self.sample = min(count, total), total, sample
        self.done = count <= 0
        self.value = 0.0
        self.above = 0  # how many values are larger than `value`
        self.equal: list[int] = []  # how many are equal to it, by chunk
        self._margin = 0.02 + 8 / len(sample) ** 0.5
        self._aim()

    def _aim(self) -> None:
        """Choose the values between which the cut is expected."""
        import numpy as np

        size = len(self.sample)
        if size == self.total:
            self._low = self._high = self.sample[size - max(self.count, 1)]
        else:
            expected = 1 - self.count / self.total
            first, last = (expected - self._margin) * size, (expected + self._margin) * size
            self._low = self.sample[int(first)] if first > 0 else np.float32(-1)
            self._high = self.sample[int(last)] if last < size - 1 else np.float32(np.inf)
        self._over, self._kept, self._equal_high, self._equal_low = 0, [], [], []  # type: ignore[var-annotated]

    def see(self, values: Array, engine: Host | Device) -> None:
        """Count the values of one chunk."""
        low, high = float(self._low), float(self._high)
        xp = namespace(values)
        self._over += int(xp.count_nonzero(values > high))
        self._equal_high.append(int(xp.count_nonzero(values == high)))
        if low == high:
            return
        self._kept.append(engine.taken(values[(values > low) & (values < high)]))
        self._equal_low.append(int(xp.count_nonzero(values == low)))

    def conclude(self) -> None:
        """Say where the cut is, or look further away."""
        import numpy as np

        if self.done:
            return
        rank = self.count - self._over  # among what is not above
        high, low = sum(self._equal_high), sum(self._equal_low)
        inside = sum(map(len, self._kept))
        self.done = 0 < rank <= high + inside + low
        if not self.done:
            if self._margin > 1 or len(self.sample) == self.total:  # nothing was left out, and yet it is not there
                raise RefusedError("a tensor to be merged holds NaN", "`moesurgery validate` finds it")
            self._margin *= 4
            self._aim()
        elif rank <= high:
            self.value, self.above, self.equal = float(self._high), self._over, self._equal_high
        elif rank > high + inside:
            self.value, self.above, self.equal = float(self._low), self._over + high + inside, self._equal_low
        else:
            kept = np.concatenate(self._kept)
            place = inside - (rank - high)
            self.value = float(np.partition(kept, place)[place])
            self.above = self._over + high + int(np.count_nonzero(kept > self.value))
            self.equal = [int(np.count_nonzero(part == self.value)) for part in self._kept]
        self._kept = []
