"""The threshold above which the n largest of many values are, found in passes over them in flat memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.errors import RefusedError
from moesurgery.merge.compute.backend import Array, NumpyBackend, TorchBackend, namespace

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Threshold:
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
        mask = (values > self.value).reshape(-1)
        rest = self.position - start
        mask[rest:] = values.reshape(-1)[rest:] >= self.value
        return mask.reshape(values.shape)


NO_THRESHOLD = Threshold(float("inf"), 0)


class ThresholdSearch:
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
        """Choose the values between which the threshold is expected."""
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

    def count_in(self, values: Array, backend: NumpyBackend | TorchBackend) -> None:
        """Count the values of one chunk."""
        low, high = float(self._low), float(self._high)
        xp = namespace(values)
        self._over += int(xp.count_nonzero(values > high))
        self._equal_high.append(int(xp.count_nonzero(values == high)))
        if low == high:
            return
        self._kept.append(backend.to_numpy(values[(values > low) & (values < high)]))
        self._equal_low.append(int(xp.count_nonzero(values == low)))

    def conclude(self) -> None:
        """Say where the threshold is, or look further away."""
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
