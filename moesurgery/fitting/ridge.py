"""Ridge regression for a change of weights, with lambda chosen on tokens that were not fitted.

The change D [O, I] minimises sum |r - D h|^2 + lambda |D|^2, r [O] being the residual and h [I] the features. The
sums are kept apart for even and odd windows. With lambda not given, it is chosen by two-fold cross-validation: the
change fitted on one half is evaluated on the other, both ways, for a path of lambdas, and the best is used on all
tokens; where none reduces the error, nothing is changed. (lambda is not rescaled from a half to all tokens: it is a
prior on the size of the change, independent of the number of tokens.)

Memory beside the sums: one square matrix, in which a Cholesky factor is made for every lambda, and a block of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RIDGE_PATH = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambda over the mean diagonal of the sum of h h^T
_ROWS = 256  # of a change that are solved for together


@dataclass(frozen=True)
class RidgeSolution:
    """`change` [O, I], or None where no change is best. `ridge` is lambda over the mean diagonal.

    `held_out` is the change in squared error of each half under the solution of the other half, summed over both;
    None where it was not computed.
    """

    change: torch.Tensor | None
    ridge: float | None
    held_out: float | None = None


def squared_norm(values: Sequence[torch.Tensor]) -> float:
    """Return the sum of the squares of all elements, summed in float64: of what a layer's outputs miss, its error."""
    import torch

    return float(sum(torch.linalg.vector_norm(value, dtype=torch.float64) ** 2 for value in values))


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float | None) -> RidgeSolution:
    """Return the change for sums h h^T [2, I, I] and r h^T [2, O, I] over even and odd windows, in float64.

    `ridge` is lambda over the mean diagonal of all tokens; None chooses it.
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
    """Return the change in squared error of the half with sums `gram` and `wanted`, under the solution of the other
    half, with the sum `cross`."""
    import torch

    total = cross.new_zeros(())
    for ours, theirs in zip(torch.split(cross, _ROWS), torch.split(wanted, _ROWS), strict=True):
        change = solver(ours)
        total += ((change @ gram - 2 * theirs) * change).sum()
    return float(total)


def _solver(grams: torch.Tensor, strength: float, room: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a solver of x (sum of `grams` + strength) = rows for rows [b, I]. `room` [I, I] is overwritten."""
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
    # Through rounding the sums are not positive definite, which happens with a very small ridge.
    factors, pivots = torch.linalg.lu_factor(fill())
    return lambda rows: torch.linalg.lu_solve(factors, pivots, rows.mT).mT
