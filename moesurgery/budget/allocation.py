"""What one number for all layers costs, against the best number for each layer with the same sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MOST_STEPS = 64  # of a curve


@dataclass(frozen=True)
class Allocation:
    """The number that stays in each layer, and the error summed over layers: of these, and of one number for all."""

    kept: tuple[int, ...]
    error: float
    uniform_error: float

    @property
    def saving(self) -> float:
        """The share of the error that different numbers would spare."""
        return 1 - self.error / self.uniform_error if self.uniform_error > 0 else 0.0


def best_allocation(curves: np.ndarray, kept: int, least: int) -> Allocation:
    """Return the numbers, `least` or more in each layer and `kept` on average, with the least error.

    `curves` [layers, N + 1] are errors at each number that stays. By dynamic programming over layers; where N is above
    `MOST_STEPS`, numbers go in steps.
    """
    import numpy as np

    layers, total = curves.shape[0], curves.shape[1] - 1
    step = max(1, -(-total // MOST_STEPS))
    # Numbers that one layer may have, as distances from `kept` in whole steps.
    low, high = -((kept - least) // step), (total - kept) // step
    numbers = kept + step * np.arange(low, high + 1)
    errors = curves[:, numbers]
    room = layers * max(-low, high)  # the running sum of distances lies within it
    best = np.full(2 * room + 1, np.inf)
    best[room] = 0.0
    chosen = np.zeros((layers, 2 * room + 1), np.int64)
    for layer in range(layers):
        nexts = np.full_like(best, np.inf)
        for place, distance in enumerate(range(low, high + 1)):
            moved = np.full_like(best, np.inf)
            if distance >= 0:
                moved[distance:] = best[: len(best) - distance]
            else:
                moved[:distance] = best[-distance:]
            moved += errors[layer, place]
            better = moved < nexts
            nexts[better], chosen[layer][better] = moved[better], place
        best = nexts
    at, picked = room, []
    for layer in reversed(range(layers)):
        place = int(chosen[layer, at])
        picked.append(int(numbers[place]))
        at -= low + place
    return Allocation(tuple(reversed(picked)), float(best[room]), float(curves[:, kept].sum()))
