"""How far a mean over windows of text may be off, by drawing the windows again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_DRAWS = 2000
_LEVEL = 0.95


def interval(by_window: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `by_window` [windows], the same each time.

    Of a difference of two models give the difference in each window: what makes a window hard for both then drops out.
    Windows of one text are not independent, so with few texts the interval is the narrowest that can be believed.
    """
    import numpy as np

    chosen = np.random.default_rng(0).integers(0, len(by_window), (_DRAWS, len(by_window)))
    means = np.asarray(by_window, np.float64)[chosen].mean(axis=1)
    low, high = np.quantile(means, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high)
