"""Least squares drawn to no change, how strongly being decided on tokens that were not fitted.

The change D [O, I] minimises sum |r - D h|^2 + lambda |D|^2, r [O] being what is missing and h [I] what it is made
of. The sums come apart for even and odd windows. With lambda left to be found, the change that one half gives is
judged on the other, both ways, for a path of lambdas, and the best is used on all tokens; where none makes anything
better, nothing is changed. (lambda is the same for a half and for all: it says how large a change is to be expected,
not how many tokens there are.)

One eigendecomposition of each half's sum of h h^T serves the whole path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PATH = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambda over the mean diagonal of the sum of h h^T


@dataclass(frozen=True)
class Change:
    """`change` [O, I], or None where no change is best. `ridge` is lambda over the mean diagonal.

    `held_out` is what the squared error of a half changes by, under the change that the other half gives, summed
    over both; None where that was not looked at.
    """

    change: torch.Tensor | None
    ridge: float | None
    held_out: float | None = None


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float | None) -> Change:
    """Return the change for sums h h^T [2, I, I] and r h^T [2, O, I] over even and odd windows, in float64.

    `ridge` is lambda over the mean diagonal of all tokens; None has it found.
    """
    both, wanted = gram.sum(0), cross.sum(0)
    scale = float(both.diagonal().mean())
    if scale <= 0:
        return Change(None, None, None if ridge is not None else 0.0)
    if ridge is not None:
        return Change(_solved(both, wanted, ridge * scale), ridge)
    judged = [0.0] * len(PATH)
    for fitted, other in ((0, 1), (1, 0)):
        for i, error in enumerate(_path(gram, cross, fitted, other, scale)):
            judged[i] += error
    best = min(range(len(PATH)), key=judged.__getitem__)
    if judged[best] >= 0:
        return Change(None, None, 0.0)
    return Change(_solved(both, wanted, PATH[best] * scale), PATH[best], judged[best])


def _path(gram: torch.Tensor, cross: torch.Tensor, fitted: int, other: int, scale: float) -> list[float]:
    """Return what the squared error of half `other` changes by, for each lambda fitted on half `fitted`."""
    import torch

    values, vectors = torch.linalg.eigh(gram[fitted])
    turned = cross[fitted] @ vectors
    theirs, wanted = vectors.T @ gram[other] @ vectors, cross[other] @ vectors
    found = []
    for ridge in PATH:
        change = turned / (values.clamp(min=0) + ridge * scale)
        found.append(float(((change @ theirs - 2 * wanted) * change).sum()))
    return found


def _solved(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    system = gram.clone()
    system.diagonal().add_(strength)
    found: torch.Tensor = torch.linalg.solve(system, cross.T).T
    return found
