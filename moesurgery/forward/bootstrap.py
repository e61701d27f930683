"""Bootstrap confidence intervals of a mean over windows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_DRAWS = 2000
_LEVEL = 0.95


def interval(by_window: np.ndarray, tokens: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `by_window` [windows], the same each time.

    To compare two models pass the difference in each window: what makes a window hard for both then cancels.
    Where windows have different numbers of `tokens` [windows], the mean is over tokens; windows without are left out.
    Windows of one text are not independent, so with few texts the interval is a lower bound on the true width.
    """
    import numpy as np

    values = np.asarray(by_window, np.float64)
    weights = np.ones(len(values)) if tokens is None else np.asarray(tokens, np.float64)
    values, weights = values[weights > 0], weights[weights > 0]
    chosen = np.random.default_rng(0).integers(0, len(values), (_DRAWS, len(values)))
    means = (values * weights)[chosen].sum(axis=1) / weights[chosen].sum(axis=1)
    low, high = np.quantile(means, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high)
