"""Balanced clusters of an FFN's gate rows, the same on every machine and with any number of threads.

Neurons whose gate rows point the same way are active on the same tokens, so they belong into one expert (MoEfication,
Zhang et al., arXiv 2110.01786). Spherical k-means with equal cluster sizes. All sums are of whole numbers below 2^53,
held in float64: exact in any order, so that a model written by several machines has one clustering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

ROUNDS = 8
_BITS = 12  # a row's entries are whole numbers below 2^_BITS after normalisation
_BLOCK = 1024  # rows that are widened to float64 at a time


def shuffled(count: int, key: int) -> np.ndarray:
    """Return 0 … count-1 in an order that depends on `key` alone."""
    import numpy as np

    drawn = np.random.Philox(key=(key, 0)).random_raw(count)
    return np.argsort(drawn, kind="stable")


def balanced_clusters(gate: torch.Tensor, parts: int, key: int) -> np.ndarray:
    """Return the cluster of each row of `gate` [I, H]; all are of one size. `parts` divides the number of rows."""
    import numpy as np

    rows = np.empty(tuple(gate.shape), np.int16)
    for at in range(0, len(rows), _BLOCK):
        rows[at : at + _BLOCK] = _of_length(gate[at : at + _BLOCK].float().numpy(), _BITS)
    centres = rows[np.sort(shuffled(len(rows), key)[:parts])].astype(np.float64)
    labels = np.full(len(rows), -1)
    for _ in range(ROUNDS):
        likeness = np.empty((len(rows), parts))
        for at in range(0, len(rows), _BLOCK):
            likeness[at : at + _BLOCK] = rows[at : at + _BLOCK].astype(np.float64) @ centres.T
        new = _assigned(likeness)
        if np.array_equal(new, labels):
            break
        labels = new
        centres = _centres(rows, labels, parts)
    return labels


def _assigned(likeness: np.ndarray) -> np.ndarray:
    """Give each row the most alike centre that still has room, the most decided rows first."""
    import numpy as np

    count, parts = likeness.shape
    order = np.argsort(-likeness, axis=1, kind="stable")
    if parts == 1:
        return np.zeros(count, int)
    best = np.take_along_axis(likeness, order[:, :2], axis=1)
    room = [count // parts] * parts
    labels = np.empty(count, int)
    for row in np.argsort(best[:, 1] - best[:, 0], kind="stable"):
        for centre in order[row]:
            if room[centre]:
                room[centre] -= 1
                labels[row] = centre
                break
    return labels


def _centres(rows: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Return the direction of each cluster's sum, at a length of about 2^_BITS, in whole numbers."""
    import numpy as np

    centres = np.empty((parts, rows.shape[1]))
    for part in range(parts):
        total = np.zeros(rows.shape[1])
        members = rows[labels == part]
        for at in range(0, len(members), _BLOCK):
            total += members[at : at + _BLOCK].astype(np.float64).sum(axis=0)
        centres[part] = _of_length(total[None], _BITS + 6)[0]
    return centres


def _of_length(rows: np.ndarray, bits: int) -> np.ndarray:
    """Return rows at a length of about 2^_BITS in whole numbers, by way of whole numbers below 2^bits."""
    import numpy as np

    exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True, initial=1e-30))[1]
    whole = np.rint(np.ldexp(rows.astype(np.float64), bits - exponent))
    length = np.sqrt((whole * whole).sum(axis=1, keepdims=True))
    return np.asarray(np.rint(whole * (1 << _BITS) / np.maximum(length, 1.0)))
