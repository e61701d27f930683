"""Which set of experts has the least sum of pairs: the binary quadratic program behind `gram` and `hope`.

There are too many sets to search. A greedy choice, then exchanges of one expert in the set for one outside it
while any makes the sum less: the result is never above the greedy choice, and no single exchange improves on it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_NO_GAIN = 1e-12  # of the whole matrix: less is rounding


def least_set(
    pairs: np.ndarray, count: int, parts: int = 1, guarded: Collection[int] = (), *, swaps: bool = True
) -> list[int]:
    """Return `count` of the E experts, in ascending order, with the least sum of `pairs` [E, E] over the set.

    `pairs` is symmetric. As many are taken in each of `parts` equal groups of neighbouring experts. Experts in
    `guarded` are taken only where the others are too few. Without `swaps` it is the greedy choice.
    """
    import numpy as np

    matrix = np.array(pairs, np.float64)
    whole = float(np.abs(matrix).sum()) or 1.0
    for expert in guarded:
        matrix[expert, expert] += 2 * whole  # no other expert can cost as much
    group = np.arange(len(matrix)) // (len(matrix) // parts)
    room = np.full(parts, count // parts)
    inside = np.zeros(len(matrix), bool)
    gain = np.diag(matrix).copy()  # what the sum over the set grows by
    for _ in range(int(room.sum())):
        open_ = ~inside & (room[group] > 0)
        chosen = int(np.argmin(np.where(open_, gain, np.inf)))
        inside[chosen] = True
        room[group[chosen]] -= 1
        gain += 2 * matrix[chosen]
    same = group[:, None] == group[None, :]
    while swaps and inside.any() and not inside.all():
        rows = matrix @ inside
        own = np.diag(matrix)
        change = (own - 2 * rows)[:, None] + (own + 2 * rows)[None, :] - 2 * matrix  # [out of the set, into it]
        change = np.where(inside[:, None] & ~inside[None, :] & same, change, np.inf)
        out, into = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[out, into] >= -_NO_GAIN * whole:
            break
        inside[out], inside[into] = False, True
    return [int(expert) for expert in np.flatnonzero(inside)]


def greedy_order(pairs: np.ndarray) -> np.ndarray:
    """Return the rank [E] of each expert in the order in which a greedy choice takes them."""
    import numpy as np

    order: list[int] = []
    cost = np.diag(pairs).copy()
    while len(order) < len(pairs):
        candidates = [e for e in range(len(pairs)) if e not in order]
        chosen = min(candidates, key=lambda e: (cost[e], e))
        order.append(chosen)
        cost = cost + 2 * pairs[chosen]
    return np.argsort(order).astype(float)
