"""How many experts each layer keeps where the layers together keep a number: the allocation of least cost.

The cost of a layer is what it loses of its own score, as a share of the layer's sum: scores of layers are of different
size, since hidden states grow with depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Allocation(NamedTuple):
    """How many experts each layer drops, and what all layers lose: shares of their scores, added up."""

    dropped: dict[str, int]
    cost: float


def lost_shares(scores: Sequence[float]) -> list[float]:
    """Return for n = 0 … E the share of a layer's score (all not negative) that its n lowest experts have."""
    whole, lost, shares = sum(scores), 0.0, [0.0]
    for score in sorted(scores):
        lost += score
        shares.append(lost / whole if whole else 0.0)
    return shares


def uniform_allocation(costs: Mapping[str, Sequence[float]], count: int) -> Allocation:
    """Return the allocation that drops `count` experts in every layer."""
    return Allocation(dict.fromkeys(costs, count), sum(cost[count] for cost in costs.values()))


def best_allocation(costs: Mapping[str, Sequence[float]], total: int, most: int, step: int = 1) -> Allocation:
    """Return the allocation of `total` dropped experts with the least cost: exact, by dynamic programming.

    `costs[where][n]` is the cost of dropping n experts of a layer, in any shape. No layer drops more than `most`, and
    each a multiple of `step` (the number of a router's groups). Of equal allocations the one that drops more in later
    layers. Raises ValueError where `total` is no such sum.
    """
    import numpy as np

    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for cost in costs.values():
        grown, taken = np.full(total + 1, np.inf), np.zeros(total + 1, int)
        for count in range(0, min(most, total) + 1, step):
            candidate = best[: total + 1 - count] + cost[count]
            better = candidate < grown[count:]
            grown[count:][better], taken[count:][better] = candidate[better], count
        best = grown
        chosen.append(taken)
    if not np.isfinite(best[total]):
        raise ValueError(f"{total} is no sum of {len(costs)} multiples of {step} up to {most}")
    dropped: dict[str, int] = {}
    left = total
    for where, taken in zip(reversed(list(costs)), reversed(chosen), strict=True):
        dropped[where] = int(taken[left])
        left -= dropped[where]
    return Allocation({where: dropped[where] for where in costs}, float(best[total]))
