"""Experts that their router can hardly tell apart, without data: clusters of router rows.

Two experts get logits that differ by (w_i - w_j) x, so the distance of their router rows says how differently
tokens are sent to them (STUN, arXiv 2409.06211, clusters by it). Average linkage, as HC-SMoE, arXiv 2410.08589,
uses on outputs: no starting point, so nothing is left to chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def clusters(rows: np.ndarray, count: int, parts: int = 1) -> list[list[int]]:
    """Divide experts into `count` clusters by their router rows [E, H], `count / parts` in each of `parts` groups.

    Each cluster is ascending, and so are the clusters by their first member.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    size, wanted = len(rows) // parts, count // parts
    found: list[list[int]] = []
    for part in range(parts):
        members = rows[part * size : (part + 1) * size]
        labels = cut_tree(linkage(members, "average"), wanted)[:, 0] if size > 1 else [0]
        by_label: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            by_label.setdefault(int(label), []).append(part * size + index)
        found += by_label.values()
    return sorted(found)
