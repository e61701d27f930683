"""Which experts matter: the criteria that need statistics, and their agreement between two halves of the tokens.

A criterion gives each expert of a block a score; the lowest are dropped first. N_e is the number of tokens
routed to e, p_e its share of the router's scores, g_e its weight, f_e its output.

    frequency       N_e                                  (arXiv 2404.05089)
    soft-frequency  sum of p_e over all tokens           (arXiv 2404.05089)
    ean             sum of |f_e|                         (expert activation norm, in arXiv 2510.13999)
    reap            sum of g_e |f_e| / N_e               (arXiv 2510.13999), with N_e at least 32
    reap-sum        sum of g_e |f_e|
    man             sum of |f_e| / N_e                   (arXiv 2606.15716), with N_e at least 32
    msan            sum of |f_e|^2 / N_e                 (arXiv 2606.15716), with N_e at least 32
    gram            the set D of dropped experts with the least sum |sum_D g_e f_e|^2: the part of the output that
                    is removed, without what the experts chosen instead add
    hope            the set D with the least sum (sum_D g_e |f_e|)^2: gates, norms and how often two are chosen
                    together, whatever their directions (HOPE, github.com/awslabs/HOPE)
    recon           for a number of experts to keep: the kept set with the least |y - y'|^2, y' the output with
                    the router choosing from that set alone (arXiv 2402.14800); see `fitting.keep_search`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from moesurgery.errors import RefusedError
from moesurgery.stats.least_set import greedy_order
from moesurgery.stats.statistics_file import BlockStats, Stats

if TYPE_CHECKING:
    import numpy as np

MeasuredCriterion = Literal[
    "reap", "reap-sum", "frequency", "soft-frequency", "ean", "man", "msan", "gram", "hope", "recon"
]
PAIR_SUMS: Mapping[str, str] = {
    "gram": "gram",
    "hope": "pair_norms",
}  # criteria of a set, and the sums that they add up
FLOOR = 32  # tokens: a mean over fewer is taken over this many
SUPER_PERCENTILE = 99.5
SUPER_SHARE = 0.1


def _mean(name: str) -> Callable[[BlockStats], np.ndarray]:
    def mean(block: BlockStats) -> np.ndarray:
        import numpy as np

        means: np.ndarray = block.total(name) / np.maximum(block.total("count"), FLOOR)
        return means

    return mean


_SCORES: Mapping[MeasuredCriterion, Callable[[BlockStats], np.ndarray]] = {
    "reap": _mean("gate_norm"),
    "reap-sum": lambda block: block.total("gate_norm"),
    "frequency": lambda block: block.total("count"),
    "soft-frequency": lambda block: block.total("probability"),
    "ean": lambda block: block.total("norm"),
    "man": _mean("norm"),
    "msan": _mean("norm2"),
    "gram": lambda block: greedy_order(pairs(block, "gram")),
    "hope": lambda block: greedy_order(pairs(block, "hope")),
}
CRITERIA: tuple[MeasuredCriterion, ...] = tuple(_SCORES)


def scores(block: BlockStats, by: MeasuredCriterion, keep: int = 0) -> np.ndarray:
    """Return a score [E] for each expert; higher is more worth keeping. `recon` needs the number to `keep`.

    For `gram` and `hope` it is the rank in the greedy order; the set to drop is given by `least_set`. Raises
    RefusedError where the statistics are older than the criterion.
    """
    try:
        return block.sums[f"recon@{keep}"] if by == "recon" else _SCORES[by](block)
    except KeyError as error:
        raise RefusedError(
            f"the statistics have no {error} of {block.where}, which {by} needs",
            "collect them again with `moesurgery collect`",
        ) from None


def pairs(block: BlockStats, by: str) -> np.ndarray:
    """Return the matrix [E, E] that a criterion of a set sums over all pairs of the set; see `PAIR_SUMS`."""
    return block.total(PAIR_SUMS[by])


def super_experts(stats: Stats) -> dict[str, list[int]]:
    """Return the experts whose outputs have values far above all others', by block (arXiv 2507.23279).

    Their largest |f| is above the 99.5th percentile of all experts' and above a tenth of the largest, and they
    are in the first three quarters of the layers. Pruning one of them can break a model.
    """
    import numpy as np

    peaks = np.concatenate([block.total("peak") for block in stats.blocks.values()])
    limit = max(np.percentile(peaks, SUPER_PERCENTILE), SUPER_SHARE * peaks.max())
    early = list(stats.blocks)[: -(-3 * len(stats.blocks) // 4)]
    above_limit = {w: [e for e, peak in enumerate(stats.blocks[w].total("peak")) if peak > limit] for w in early}
    return {where: experts for where, experts in above_limit.items() if experts}


def agreement(stats: Stats, by: MeasuredCriterion, share: float = 0.25) -> dict[str, float]:
    """Return how far the even and the odd windows agree on a ranking, on average over layers and at worst.

    `spearman`: rank correlation of the scores. `overlap`: how much of the lowest `share` is the same.
    """
    import numpy as np

    correlations, overlaps = [], []
    for block in stats.blocks.values():
        first, second = (scores(block.half(h), by) for h in (0, 1))
        correlations.append(spearman(first, second))
        count = max(1, round(share * len(first)))
        low = [set(np.argsort(s, kind="stable")[:count].tolist()) for s in (first, second)]
        overlaps.append(len(low[0] & low[1]) / count)
    return {
        "spearman": float(np.mean(correlations)),
        "spearman_worst": float(np.min(correlations)),
        "overlap": float(np.mean(overlaps)),
        "overlap_worst": float(np.min(overlaps)),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of two vectors, ties sharing their mean rank; 1 where either is constant."""
    import numpy as np

    a, b = _ranks(first), _ranks(second)
    if not a.std() or not b.std():
        return 1.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])
