"""All matrices of an expert at once: least squares for its linearised output, by conjugate gradients.

An expert's weighted output for a token, g D a(F x), with F its first projection and a its gate, is linear in small
changes of F and D. The change that fits the residual, with a ridge penalty on its norm, has no closed form that fits
into memory, but a step of conjugate gradients costs two passes over the expert's tokens, and the steps for one ridge
also give the solutions for all greater ones (multi-shift CG: Jegerlehner, hep-lat/9612014). So a path of ridges is
fitted on the even windows and evaluated on the odd ones, as many at once as fit into `PATH_BYTES`; then the best is
fitted on all.

Gate, up and down are each scaled by their own mean effect, so that one ridge suits all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.fitting.ridge import RidgeSolution
from moesurgery.forward.activations import before_gate, down, first, gated

if TYPE_CHECKING:
    import torch

STEPS = 12
GAUSS_NEWTON_PATH = (0.3, 1.0, 3.0, 10.0, 30.0)  # lambda over the mean effect of a weight
PATH_BYTES = 192 << 20  # bounds the changes and directions of the ridges that are fitted at once
_BLOCK = 1 << 20  # numbers that are added up in float64 at once
HALVINGS = 3  # tries, each with half the change of the one before

Arrange = Callable[["torch.Tensor"], "torch.Tensor"]  # [..., P] -> [..., 2, I] or [..., 1, I], a view


def arrangement(module: Any, expert: int) -> Arrange:
    """Return how the rows of an expert's first projection belong to neurons: gate and up, or up alone.

    Found from the module's gate itself: the second neuron depends on rows 1 and I + 1, or 2 and 3. The gate comes
    first in either.
    """
    import torch

    rows, width = first(module, expert).shape[0], down(module, expert).shape[1]
    if rows == width:
        return lambda values: values[..., None, :]
    with torch.enable_grad():
        projected = torch.ones(1, rows, device=down(module, expert).device, requires_grad=True)
        (slope,) = torch.autograd.grad(gated(module, projected)[0, 1], projected)
    if slope[0, width + 1] != 0 or width < 3:
        return lambda values: values.reshape(*values.shape[:-1], 2, width)
    return lambda values: values.reshape(*values.shape[:-1], width, 2).transpose(-1, -2)


@dataclass
class Linearised:
    """An expert linearised at its present weights, for t tokens: its input [t, H], its weight [t, 1], h [t, I], the
    slope of h in each row of the first projection, arranged [t, 2, I], and its down-projection [H, I].

    A change is (of the first projection [2, I, H], of the down-projection [H, I]), in units of `scale`.
    """

    read: torch.Tensor
    weight: torch.Tensor
    h: torch.Tensor
    slope: torch.Tensor
    down: torch.Tensor
    scale: tuple[torch.Tensor, float]  # [2, 1, 1] for gate and up, and for down

    def rows(self, start: int, stop: int) -> Linearised:
        at = slice(start, stop)
        return Linearised(self.read[at], self.weight[at], self.h[at], self.slope[at], self.down, self.scale)

    def adds(self, change: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return J change: the first-order change [t, H] of the weighted output."""
        ahead, below = change
        inner = sum((self.read @ part.T).mul_(self.slope[:, i]).mul_(self.scale[0][i]) for i, part in enumerate(ahead))
        projected: torch.Tensor = inner @ self.down.T
        projected += (self.h @ below.T).mul_(self.scale[1])
        return projected.mul_(self.weight)

    def pulls(self, missing: torch.Tensor) -> list[torch.Tensor]:
        """Return J^T missing, for the residual `missing` [t, H]."""
        import torch

        missing = missing * self.weight
        inner = missing @ self.down
        parts, width = self.slope.shape[1:]
        ahead = self.read.new_empty(parts, width, self.read.shape[1])
        for i in range(parts):
            torch.mm((inner * self.slope[:, i]).T, self.read, out=ahead[i])
        return [ahead.mul_(self.scale[0]), (missing.T @ self.h).mul_(self.scale[1])]

    def to_weights(self, change: Sequence[torch.Tensor]) -> None:
        """Turn a change, in place, into what is added to the weights."""
        change[0].mul_(self.scale[0])
        change[1].mul_(self.scale[1])

    @property
    def nbytes(self) -> int:
        """The bytes of one change."""
        return 4 * self.down.numel() * (1 + self.slope.shape[1])


def linearised(module: Any, expert: int, read: torch.Tensor, weight: torch.Tensor, arrange: Arrange) -> Linearised:
    """Return an expert linearised at its present weights, for inputs [t, H] with weights [t, 1]."""
    import torch

    with torch.enable_grad():
        projected = before_gate(module, expert, read).float().detach().requires_grad_()
        h = gated(module, projected)
        (slope,) = torch.autograd.grad(h.sum(), projected)
    slope, h, below = arrange(slope), h.detach(), down(module, expert).float()
    read, weight = read.float(), weight.float()
    square = weight.pow(2)
    # The mean, over the entries of a matrix, of the sum of squares of what one entry adds.
    each = (square * read.pow(2).mean(-1, keepdim=True)).T  # [1, t]
    effect = [(each @ slope[:, i].pow(2) * below.pow(2).sum(0)).double().mean() for i in range(slope.shape[1])]
    ahead = torch.stack(effect).clamp(min=1e-30).rsqrt().float()[:, None, None]
    scale = float((square.T @ h.pow(2)).double().mean().clamp(min=1e-30).rsqrt())
    return Linearised(read, weight, h, slope, below, (ahead, scale))


def conjugate(
    problem: Linearised, missing: torch.Tensor, ridges: Sequence[float], steps: int = STEPS
) -> list[list[torch.Tensor]]:
    """Return for each ridge, the least first, the change that minimises |missing - J change|^2 + ridge |change|^2.

    Approximately, by `steps` steps of conjugate gradients; larger ridges converge faster than the least.
    """
    import torch

    base, shifts = ridges[0], [ridge - ridges[0] for ridge in ridges]
    left = missing.clone()
    pull = problem.pulls(left)
    changes = [[torch.zeros_like(p) for p in pull] for _ in ridges]
    ways = [pull, *([p.clone() for p in pull] for _ in ridges[1:])]
    # A residual of the system with a shift is `fade` times that of the first; before and now.
    fades = [(1.0, 1.0) for _ in ridges]
    size, length, kept = _dot(pull, pull), 1.0, 0.0
    del pull  # changes are the largest of all that is held
    for _ in range(steps):
        if size <= 0:
            break
        added = problem.adds(ways[0])
        before, length = length, size / (_dot([added], [added]) + base * _dot(ways[0], ways[0]))
        left -= length * added
        lengths = []
        for i, shift in enumerate(shifts):
            old, now = fades[i]
            bend = length * kept * (old - now) + old * before * (1 + shift * length)
            fades[i] = now, (now * old * before / bend if bend else 0.0)
            lengths.append(length * fades[i][1] / now if now else 0.0)
            for change, way in zip(changes[i], ways[i], strict=True):
                change.add_(way, alpha=lengths[i])
        pull = problem.pulls(left)
        for p, c in zip(pull, changes[0], strict=True):
            p.sub_(c, alpha=base)
        before_size, size = size, _dot(pull, pull)
        kept = size / before_size
        for i in range(len(ridges)):
            now, new = fades[i]
            keep = kept * new * lengths[i] / (now * length) if now else 0.0
            for way, p in zip(ways[i], pull, strict=True):
                way.mul_(keep).add_(p, alpha=new)
        del pull
    return changes


def _dot(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return the scalar product, added up in float64."""
    import torch

    blocks = (
        x.double() @ y.double()
        for a, b in zip(first, second, strict=True)
        for x, y in zip(torch.split(a.reshape(-1), _BLOCK), torch.split(b.reshape(-1), _BLOCK), strict=True)
    )
    return float(sum(blocks))


def chosen(problem: Linearised, missing: torch.Tensor, even: int, ridge: float | None) -> tuple[Any, RidgeSolution]:
    """Return the change of an expert's weights, for tokens of which the first `even` are of even windows, and how it
    was found.

    With `ridge` None the ridge is taken that, fitted on the even windows, has the least error on the odd ones; the
    change is None where no change is best.
    """
    held_out = None
    if ridge is None:
        odd = problem.rows(even, len(missing))
        none = _dot([missing[even:]], [missing[even:]])
        errors: list[float] = []
        together = max(1, PATH_BYTES // (2 * problem.nbytes))
        for start in range(0, len(GAUSS_NEWTON_PATH), together):
            for step in conjugate(problem.rows(0, even), missing[:even], GAUSS_NEWTON_PATH[start : start + together]):
                left = missing[even:] - odd.adds(step)
                errors.append(_dot([left], [left]) - none)
        best = min(range(len(GAUSS_NEWTON_PATH)), key=errors.__getitem__)
        if not errors[best] < 0:
            return None, RidgeSolution(None, None, 0.0)
        ridge, held_out = GAUSS_NEWTON_PATH[best], errors[best] * len(missing) / max(1, len(missing) - even)
    (step,) = conjugate(problem, missing, [ridge])
    problem.to_weights(step)
    return step, RidgeSolution(None, ridge, held_out)


@dataclass
class Fit:
    """The fit of an expert: its new matrices, none where unchanged, and the change of its weighted output."""

    matrices: dict[str, torch.Tensor]
    added: torch.Tensor | None
    change: RidgeSolution


def fit(
    module: Any,
    expert: int,
    read: torch.Tensor,
    weight: torch.Tensor,
    missing: torch.Tensor,
    *,
    even: int,
    ridge: float | None,
    dtype: torch.dtype,
) -> Fit:
    """Fit an expert in place to the residual `missing` [t, H], each weight rounded to `dtype`.

    `read` [t, H], `weight` [t, 1] and `missing` are those of the tokens routed to it, even windows first. A change
    that does not reduce the error of the true (nonlinear) output is halved, a few times, then discarded.
    """
    arrange = arrangement(module, expert)
    problem = linearised(module, expert, read, weight, arrange)
    step, change = chosen(problem, missing, even, ridge)
    if step is None:
        return Fit({}, None, change)
    places = first(module, expert), down(module, expert)
    before = [place.float().clone() for place in places]
    for halvings in range(HALVINGS):
        for i, (place, old) in enumerate(zip(places, before, strict=True)):
            new = old.clone()
            if i == 0:
                arrange(new.T).add_(step[0].permute(2, 0, 1), alpha=0.5**halvings)
            else:
                new.add_(step[1], alpha=0.5**halvings)
            place.copy_(new.to(dtype))
            del new
        h = gated(module, before_gate(module, expert, read)).float()
        added = problem.weight * (h @ places[1].float().T - problem.h @ before[1].T)
        left = missing - added
        if _dot([left], [left]) < _dot([missing], [missing]):
            return Fit({role: m.to(dtype) for role, m in matrices(module, expert).items()}, added, change)
    for place, old in zip(places, before, strict=True):
        place.copy_(old)
    return Fit({}, None, RidgeSolution(None, None, None if ridge is not None else 0.0))


def matrices(module: Any, expert: int) -> dict[str, torch.Tensor]:
    """Return gate and up [I, H], where there is a gate, and down [H, I]: views."""
    parts = arrangement(module, expert)(first(module, expert).T)
    names = ("gate", "up") if parts.shape[1] == 2 else ("up",)
    return {name: parts[:, i].T for i, name in enumerate(names)} | {"down": down(module, expert)}
