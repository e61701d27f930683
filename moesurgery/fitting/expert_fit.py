"""Fit the matrices of a block's experts to the residual, in place, one expert after the other (Gauss-Seidel).

`residuals` are target minus output [T, H] of each of a block's calls, zero at padding; they are updated after every
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.fitting import gauss_newton
from moesurgery.fitting.ridge import RidgeSolution, solve
from moesurgery.forward.activations import activations, down, reads
from moesurgery.forward.hooks import ExpertsCall
from moesurgery.moe.layouts import matrices_of
from moesurgery.moe.neurons import expert_tensors
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import Matrices

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 512


def fit_expert(
    expert: int,
    module: Any,
    routed: RoutedTokens,
    residuals: Sequence[torch.Tensor],
    ridge: float | None,
    dtype: torch.dtype,
    *,
    whole: bool,
) -> tuple[Matrices, RidgeSolution]:
    """Fit an expert's down-projection, or with `whole` all its matrices, rounded to `dtype`.

    Returns the new matrices, none where the expert stays as it is, and how they were found.
    """
    fit = _fit_all if whole else _fit_down
    return fit(module, expert, routed.of(expert), residuals, ridge, dtype)


def check_names(plan: Plan, call: ExpertsCall) -> None:
    """Raise RefusedError unless gate, up and down of the plan are what a block's module computes with."""
    import torch

    block, module = plan.anatomy.block(call.block.where), call.module
    stored = matrices_of([(m, expr) for m, expr in expert_tensors(block, plan.tensors, 0) if not m.stem.bias])
    matrices = gauss_newton.matrices(module, 0)
    same = stored.keys() == matrices.keys() and all(
        torch.allclose(torch.from_numpy(values_of(expr)).to(matrices[role]), matrices[role], rtol=1e-2, atol=1e-6)
        for role, expr in stored.items()
    )
    if not same:
        raise RefusedError(
            f"refit: {block.where}: {type(module).__name__} has gate and up in a form of its own", "use --refit down"
        )


@dataclass
class _Routed:
    """The tokens of one call that are routed to an expert: their places [t], weights [t, 1], and inputs [t, H].

    `odd` [t] is whether they are of an odd window.
    """

    token: torch.Tensor
    weight: torch.Tensor
    hidden: torch.Tensor
    odd: torch.Tensor


class RoutedTokens:
    """The tokens of a block's calls by the expert that they are routed to: sorted once for all experts."""

    def __init__(self, calls: Sequence[ExpertsCall], experts: int) -> None:
        import torch

        self._calls: list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for call in calls:
            hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
            index, weights = (values.reshape(len(hidden), -1) for values in (call.index, call.weights))
            routed = index.clamp(max=experts)
            if call.real is not None:
                routed = torch.where(call.real[:, None], routed, experts)
            order = torch.argsort(routed.reshape(-1), stable=True)
            counts = torch.bincount(routed.reshape(-1), minlength=experts + 1).tolist()
            self._calls.append((list(torch.split(order, counts)), weights.reshape(-1), hidden, call.window % 2 == 1))
        self._slots = calls[0].index.shape[-1]

    def of(self, expert: int) -> list[_Routed]:
        routed = []
        for slots, weights, hidden, odd in self._calls:
            token = slots[expert] // self._slots
            routed.append(_Routed(token, weights[slots[expert]].float()[:, None], hidden[token], odd[token]))
        return routed


def _fit_down(
    module: Any,
    expert: int,
    mine: Sequence[_Routed],
    residuals: Sequence[torch.Tensor],
    ridge: float | None,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], RidgeSolution]:
    """Solve for one expert's down-projection, in place, and update the residuals.

    W = W_e + D, with D minimising sum |r - D g h|^2 + lambda |D|^2, r being the residual.
    """
    import torch

    weight = down(module, expert)
    width = weight.shape[1]
    gram = torch.zeros(2, width, width, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(2, weight.shape[0], width, dtype=torch.float64, device=weight.device)
    scaled = weighted_activations(module, expert, mine)
    for part, h, residual in zip(mine, scaled, residuals, strict=True):
        for half, rows in enumerate((~part.odd, part.odd)):
            add_products(gram[half], h[rows], h[rows])
            add_products(cross[half], residual[part.token[rows]], h[rows])
    solution = solve(gram, cross, ridge)
    del gram, cross
    if solution.change is None:
        return {}, solution
    stored: torch.Tensor = (weight.double() + solution.change).to(dtype)
    change = stored.to(weight.dtype) - weight  # the change after rounding
    weight += change
    for part, h, residual in zip(mine, scaled, residuals, strict=True):
        residual[part.token] -= h @ change.float().T
    return {"down": stored}, solution


def weighted_activations(module: Any, expert: int, mine: Sequence[_Routed]) -> list[torch.Tensor]:
    """Return g h [t, I] of an expert for the tokens of each call that are routed to it."""
    return [activations(module, expert, part.hidden).float() * part.weight for part in mine]


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right to `total` [m, n], some rows at a time, so that the float32 product is never held in full."""
    for start in range(0, len(total), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        total[rows] += (left[:, rows].T @ right).double()


def _fit_all(
    module: Any,
    expert: int,
    mine: Sequence[_Routed],
    residuals: Sequence[torch.Tensor],
    ridge: float | None,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], RidgeSolution]:
    """Fit all matrices of one expert, in place, and update the residuals."""
    import torch

    order = torch.argsort(torch.cat([part.odd for part in mine]).int(), stable=True)
    read, weight, missing = (
        torch.cat(parts)[order]
        for parts in (
            [reads(module, expert, part.hidden) for part in mine],
            [part.weight for part in mine],
            [residual[part.token] for part, residual in zip(mine, residuals, strict=True)],
        )
    )
    even = sum(int((~part.odd).sum()) for part in mine)
    fit = gauss_newton.fit(module, expert, read, weight, missing, even=even, ridge=ridge, dtype=dtype)
    if fit.added is not None:
        added = torch.empty_like(fit.added)
        added[order] = fit.added
        for part, residual, share in zip(
            mine, residuals, torch.split(added, [len(p.token) for p in mine]), strict=True
        ):
            residual[part.token] -= share
    return fit.matrices, fit.change
