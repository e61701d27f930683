"""Factors on the routed output that restore its size or values, from statistics: docs/measure.md has the formulas.

y_n is the output at the trained top-k n, y_m at the new one m on the same inputs; sums are over tokens.

    gate              sqrt(sum g^2 over the top n / sum g^2 over the top m): independent experts of equal norm
    norm-matched      sqrt(sum |y_n|^2 / sum |y_m|^2): keeps the size
    measured          sum <y_n, y_m> / sum |y_m|^2: least squares, = norm-matched times the cosine of y_n and y_m
    measured-expert   least squares with a factor per expert: A s = b with A_ij = sum g_i g_j <f_i, f_j> and
                      b_i = sum g_i <f_i, y_n>, with a small ridge towards 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from moesurgery.stats.statistics_file import BlockStats

if TYPE_CHECKING:
    import numpy as np

_RIDGE = 0.01


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    """Return the ratio of two sums; 1 where either is not positive, as with outputs that are all zero."""
    a, b = float(above.sum()), float(below.sum())
    return a / b if a > 0 and b > 0 else 1.0


def gate(block: BlockStats, top_k: int) -> float:
    return math.sqrt(_ratio(block.total("gate2"), block.total(f"gate2@{top_k}")))


def norm_matched(block: BlockStats, top_k: int) -> float:
    return math.sqrt(_ratio(block.total("gram"), block.total(f"gram@{top_k}")))


def measured(block: BlockStats, top_k: int) -> float:
    return _ratio(block.total(f"cross@{top_k}"), block.total(f"gram@{top_k}"))


def measured_expert(block: BlockStats, top_k: int) -> list[float]:
    return [float(s) for s in per_expert_factor(block.total(f"gram@{top_k}"), block.total(f"cross@{top_k}"))]


def per_expert_factor(gram: np.ndarray, cross: np.ndarray, ridge: float = _RIDGE) -> np.ndarray:
    """Solve A s = b with a ridge towards 1 of `ridge` times the mean diagonal; experts without output keep 1."""
    import numpy as np

    strength = ridge * float(np.diag(gram).mean())
    if strength <= 0:
        return np.ones(len(cross))
    system = gram + strength * np.eye(len(cross))
    return np.asarray(np.linalg.solve(system, cross + strength))


RULES: dict[str, Callable[[BlockStats, int], float | list[float]]] = {
    "gate": gate,
    "norm-matched": norm_matched,
    "measured": measured,
    "measured-expert": measured_expert,
}
