"""Least squares drawn to no change, how strongly being decided on tokens that were not fitted.

The change D [O, I] minimises sum |r - D h|^2 + lambda |D|^2, r [O] being what is missing and h [I] what it is made
of. The sums come apart for even and odd windows. With lambda left to be found, the change that one half gives is
judged on the other, both ways, for a path of lambdas, and the best is used on all tokens; where none makes anything
better, nothing is changed. (lambda is the same for a half and for all: it says how large a change is to be expected,
not how many tokens there are.)

Memory beside the sums: one square matrix, in which a Cholesky factor is made for every lambda, and a block of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RIDGE_PATH = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambda over the mean diagonal of the sum of h h^T
_ROWS = 256  # of a change that are solved for together


@dataclass(frozen=True)
class RidgeSolution:
    """`change` [O, I], or None where no change is best. `ridge` is lambda over the mean diagonal.

    `held_out` is what the squared error of a half changes by, under the change that the other half gives, summed
    over both; None where that was not looked at.
    """

    change: torch.Tensor | None
    ridge: float | None
    held_out: float | None = None


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float | None) -> RidgeSolution:
    """Return the change for sums h h^T [2, I, I] and r h^T [2, O, I] over even and odd windows, in float64.

    `ridge` is lambda over the mean diagonal of all tokens; None has it found.
    """
    import torch

    scale = float((gram[0].diagonal() + gram[1].diagonal()).mean())
    if scale <= 0:
        return RidgeSolution(None, None, None if ridge is not None else 0.0)
    room = torch.empty_like(gram[0])
    held_out = None
    if ridge is None:
        judged = [0.0] * len(RIDGE_PATH)
        for fitted, other in ((0, 1), (1, 0)):
            for i, tried in enumerate(RIDGE_PATH):
                solver = _solver(gram[fitted : fitted + 1], tried * scale, room)
                judged[i] += _judged(solver, cross[fitted], gram[other], cross[other])
        best = min(range(len(RIDGE_PATH)), key=judged.__getitem__)
        if judged[best] >= 0:
            return RidgeSolution(None, None, 0.0)
        ridge, held_out = RIDGE_PATH[best], judged[best]
    solver = _solver(gram, ridge * scale, room)
    blocks = zip(torch.split(cross[0], _ROWS), torch.split(cross[1], _ROWS), strict=True)
    return RidgeSolution(torch.cat([solver(even + odd) for even, odd in blocks]), ridge, held_out)


def _judged(
    solver: Callable[[torch.Tensor], torch.Tensor], cross: torch.Tensor, gram: torch.Tensor, wanted: torch.Tensor
) -> float:
    """Return what the squared error of the half with sums `gram` and `wanted` changes by, when the other half, with
    the sum `cross`, is solved for."""
    import torch

    total = cross.new_zeros(())
    for ours, theirs in zip(torch.split(cross, _ROWS), torch.split(wanted, _ROWS), strict=True):
        change = solver(ours)
        total += ((change @ gram - 2 * theirs) * change).sum()
    return float(total)


def _solver(grams: torch.Tensor, strength: float, room: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what solves x (sum of `grams` + strength) = rows for rows [b, I]. `room` [I, I] is overwritten."""
    import torch

    def fill() -> torch.Tensor:
        room.copy_(grams[0])
        for more in grams[1:]:
            room.add_(more)
        room.diagonal().add_(strength)
        return room.mT  # the same matrix, in the order of LAPACK, which then works in place

    info = torch.empty((), dtype=torch.int32, device=room.device)
    lower = fill()
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) == 0:

        def substitute(rows: torch.Tensor) -> torch.Tensor:
            half = torch.linalg.solve_triangular(lower, rows.mT, upper=False)
            solved: torch.Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True).mT
            return solved

        return substitute
    # Rounding has left the sums short of positive definite, which happens with a ridge next to nothing.
    factors, pivots = torch.linalg.lu_factor(fill())
    return lambda rows: torch.linalg.lu_solve(factors, pivots, rows.mT).mT
