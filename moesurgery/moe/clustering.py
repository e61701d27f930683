"""Experts divided into groups: by the distance of their features, or around those with the highest scores.

Average linkage, as HC-SMoE (arXiv 2410.08589) uses it on outputs, has no initialisation, so it is
deterministic. Around centroids, as M-SMoE (arXiv 2310.01334) and REAM (arXiv 2604.04356) do it, the experts with the
highest scores are centroids, to which the others are assigned.

Both divide the experts of each of the router's `parts` alike, and leave the experts in `alone` by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def clusters(rows: np.ndarray, count: int, parts: int = 1, alone: Collection[int] = ()) -> list[list[int]]:
    """Divide experts into `count` clusters by the distance of their `rows` [E, F], `count / parts` in each part.

    Each cluster is ascending, and so are the clusters by their first member.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    grouped = [[expert] for expert in sorted(alone)]
    for members, wanted in _divided(len(rows), count, parts, alone):
        labels = cut_tree(linkage(rows[members], "average"), wanted)[:, 0] if len(members) > 1 else [0]
        by_label: dict[int, list[int]] = {}
        for expert, label in zip(members, labels, strict=True):
            by_label.setdefault(int(label), []).append(expert)
        grouped += by_label.values()
    return sorted(grouped)


def around_centroids(
    scores: Sequence[float],
    likeness: np.ndarray,
    count: int,
    parts: int = 1,
    alone: Collection[int] = (),
    largest: int | None = None,
) -> list[list[int]]:
    """Divide experts into `count` groups, each around one of those with the highest `scores` [E].

    Every other expert joins the centroid that it is most like (`likeness` [E, E]). With `largest`, groups are
    filled one by one: the centroid with the highest score gets the experts most like it until its group has that many
    members, then the next one. The centroid is the first of its group; groups are in the order of their least member.
    """
    all_groups = [[expert] for expert in sorted(alone)]
    for members, wanted in _divided(len(scores), count, parts, alone):
        order = sorted(members, key=lambda e: (-scores[e], e))
        groups, others = [[centroid] for centroid in order[:wanted]], order[wanted:]
        if largest is None:
            for other in others:
                max(groups, key=lambda group, o=other: likeness[group[0], o]).append(other)  # type: ignore[misc]
        else:
            for group in groups:
                others.sort(key=lambda e, c=group[0]: (-likeness[c, e], e))  # type: ignore[misc]
                group += others[: largest - 1]
                del others[: largest - 1]
        all_groups += groups
    return sorted(all_groups, key=min)


def _divided(experts: int, count: int, parts: int, alone: Collection[int]) -> Iterator[tuple[list[int], int]]:
    """Yield the experts of each part that are not alone, and into how many groups they are to be divided."""
    size = experts // parts
    for part in range(parts):
        everyone = range(part * size, (part + 1) * size)
        members = [expert for expert in everyone if expert not in alone]
        if members:
            yield members, count // parts - (size - len(members))
