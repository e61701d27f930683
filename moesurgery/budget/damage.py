"""How much damage a shape is expected to do: a curve for each axis, from one pass over text, and their sum.

A curve gives the squared error of a layer's routed output over its square, at each number that the axis may take:

    experts  the mass of what goes missing: the sum of g_i g_j <f_i, f_j> over the pairs of dropped experts, over that
             of all pairs, the set being the greedy one of `gram` (`stats.criteria`)
    width    the least-squares loss of the neurons that go, down-projections solved for those that stay
    top-k    1 - <y_n, y_m>^2 / (|y_n|^2 |y_m|^2), what a factor per layer on the output at top-k m leaves
    form     the squared rounding error of the weights over their square, for each of the two products
    tie      1 where blocks are tied: what that costs is only known when it is measured

The error of a shape is their sum, mean over layers. What an error costs in loss is another number for each axis:
neurons that were solved for are repaired already, promoted experts make up for dropped ones. `DamagePrediction` fits
those numbers to what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from moesurgery.budget.shape import AS_STORED, FORMS, MixtureShape
from moesurgery.stats.statistics_file import BlockStats, Stats

if TYPE_CHECKING:
    import numpy as np

PRICED = ("experts", "width", "top-k", "form", "tie")  # the axes that errors are added over
Parts = tuple[float, float, float, float, float]  # by axis, in that order
_PULL = 0.1  # of every number towards their common value, in units of one measurement


@dataclass(frozen=True)
class DamageCurves:
    """Errors by layer. `experts` [layers, E + 1] and `width` [layers, I + 1] at each number that stays, 0 at the last.

    `width` is None where nothing is known of neurons. `top_k` has [layers] for each other number of active experts,
    `form` for each quantised form; that of another is known beforehand.
    """

    experts: np.ndarray
    width: np.ndarray | None = None
    top_k: Mapping[int, np.ndarray] = field(default_factory=dict)
    form: Mapping[str, np.ndarray] = field(default_factory=dict)

    def parts(self, shape: MixtureShape) -> Parts:
        """Return the error of a shape by axis, mean over layers."""
        experts = self.experts[:, shape.experts]
        width = 0.0 if self.width is None else float((self.width[:, shape.width] * (1 - experts)).mean())
        top_k = self.top_k[shape.top_k].mean() if shape.top_k in self.top_k else 0.0
        form = 0.0 if shape.form == AS_STORED else 2 * FORMS[shape.form].error
        if shape.form in self.form:
            form = float(self.form[shape.form].mean())
        return float(experts.mean()), width, float(top_k), form, float(shape.tied)


def damage_curves(stats: Stats, rounding: Mapping[str, np.ndarray] = MappingProxyType({})) -> DamageCurves:
    """Return the curves of a model from its statistics; that of its neurons where these were collected.

    `rounding` [layers] has the errors of quantised forms (`fitting.rounding_errors`).
    """
    import numpy as np

    blocks = list(stats.blocks.values())
    top_k = {}
    for k in stats.top_ks:
        left = []
        for block in blocks:
            ours, theirs = block.total("gram").sum(), block.total(f"gram@{k}").sum()
            both = block.total(f"cross@{k}").sum()
            left.append(max(0.0, 1 - both**2 / (ours * theirs)) if ours > 0 and theirs > 0 else 0.0)
        top_k[k] = np.array(left)
    experts = np.stack([missing_mass(block.total("gram")) for block in blocks])
    width = np.stack([neuron_loss(block) for block in blocks]) if stats.neurons else None
    return DamageCurves(experts, width, top_k, rounding)


def neuron_loss(block: BlockStats) -> np.ndarray:
    """Return the share [I + 1] of the routed output's square that is lost with w neurons kept, w from 0 to I."""
    import numpy as np

    lost = block.sums["neuron_error"].sum(axis=0, dtype=np.float64)  # after 1, 2, ... neurons of each expert
    whole = block.total("gram").sum()
    shares: np.ndarray = np.clip(np.append(lost[::-1] / whole if whole > 0 else 0 * lost, 0.0), 0, 1)
    return shares


def missing_mass(gram: np.ndarray) -> np.ndarray:
    """Return the share [E + 1] of the routed output's square that is lost with r experts kept, r from 0 to E.

    `gram` [E, E] has the sums of g_i g_j <f_i, f_j>. Experts go one by one, each time the one that adds least.
    """
    import numpy as np

    count = len(gram)
    lost = np.zeros(count + 1)
    cost = np.diag(gram).astype(np.float64)
    gone = np.zeros(count, bool)
    for kept in range(count - 1, -1, -1):
        chosen = int(np.argmin(np.where(gone, np.inf, cost)))
        lost[kept] = lost[kept + 1] + cost[chosen]
        gone[chosen] = True
        cost = cost + 2 * gram[chosen]
    whole = gram.sum()
    # Directions that cancel can make a larger set lose less: what is lost never falls as more goes.
    return np.clip(np.maximum.accumulate((lost / whole if whole > 0 else lost)[::-1])[::-1], 0, 1)


@dataclass(frozen=True)
class DamagePrediction:
    """Loss increase of a shape in nats: the sum over axes of a price and the error there."""

    curves: DamageCurves
    prices: Parts = (1.0, 1.0, 1.0, 1.0, 1.0)

    def of(self, shape: MixtureShape) -> float:
        return sum(price * error for price, error in zip(self.prices, self.curves.parts(shape), strict=True))

    def fitted(self, measured: Mapping[MixtureShape, float]) -> DamagePrediction:
        """Return a prediction whose prices fit increases in loss that were measured.

        Relative errors are squared and summed, so that small increases count as much as large ones. Prices are not
        negative, and are drawn to one value where nothing was measured of an axis.
        """
        import numpy as np

        known = {shape: increase for shape, increase in measured.items() if self.of(shape) > 0}
        if not known:
            return self
        errors = np.array([self.curves.parts(shape) for shape in known]) * self.prices
        floor = max(max(known.values()) / 100, 1e-6)
        increases = np.array([max(increase, floor) for increase in known.values()])
        common = float(np.median(increases / errors.sum(axis=1)))
        rows = np.concatenate([errors / increases[:, None], _PULL / common * np.eye(len(PRICED))])
        wanted = np.concatenate([np.ones(len(known)), np.full(len(PRICED), _PULL)])
        a, b, c, d, e = (float(price * x) for price, x in zip(self.prices, _least_squares(rows, wanted), strict=True))
        return DamagePrediction(self.curves, (a, b, c, d, e))


def _least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the x >= 0 with the least |rows x - wanted|^2, of all sets of entries that may be above zero."""
    import numpy as np

    best, least = np.zeros(rows.shape[1]), float("inf")
    for chosen in itertools.product((False, True), repeat=rows.shape[1]):
        x = np.zeros(rows.shape[1])
        if any(chosen):
            x[list(chosen)] = np.linalg.lstsq(rows[:, list(chosen)], wanted, rcond=None)[0]
        error = float(((rows @ x - wanted) ** 2).sum())
        if (x >= 0).all() and error < least:
            best, least = x, error
    return best
