"""Fit a router's rows to a block's residual: damped Gauss-Newton in the logits of the chosen experts, by closed sums.

The routed output y = sum g_i f_i is linear in small changes u_i of the logits of the experts that a token chose:

    change of y = sum_i g_i (c_i u_i - sum_j q_j c_j u_j) f_i,    u_i = d_i x

with d_i [H] the change of row i and x the block's input. c is the slope of the logarithm of the score, and q how much
each score weighs in what the weights are divided by: g^p / sum g^p where they are normalised, and 0 where they are not.
A softmax over all experts that is not normalised again divides by the others' scores too: it has one more u, the mean
of all experts' by their probabilities, which moves y by -y. So what the change d [E, H] needs are, per token, the k x k
products <f_i, f_j> and the k products <f_i, r>, and a step of conjugate gradients for
|r - change of y|^2 + lambda |d|^2 costs one pass over those. The choice of experts, and with it a selection bias, is
taken as it is: what a change of the choice does shows in the true output, which is what decides (`fit_router`).
`bias_fit` comes after.

Memory: the inputs of the block, and k (k + 3) numbers for each token; E more for such a softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import BlockTensor
from moesurgery.families.config_keys import Settings
from moesurgery.families.routing import router_scores
from moesurgery.fitting.ridge import RidgeSolution, squared_norm
from moesurgery.forward.expert_outputs import expert_outputs
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import ExpertsCall
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

ROUTER_PATH = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambda over the mean effect of a weight
ROUTER_STEPS = 15
_HALVINGS = 3
_CLOSE = 0.02  # of the largest: rounding error of bfloat16
_HINT = "use another --refit"


@dataclass
class LinearisedRouting:
    """A block's output as a function of its router's rows, for t tokens: inputs x [t, H], the chosen experts [t, k],
    and for a change of their logits the normal matrix [t, k, k] and its product with the residual [t, k].

    `probabilities` [t, E] are those of a softmax that is not normalised again, else [t, 0]: the mean of all logits'
    changes by them is one more of k then.
    """

    read: torch.Tensor
    index: torch.Tensor
    normal: torch.Tensor
    pull: torch.Tensor
    probabilities: torch.Tensor
    experts: int

    def half(self, chosen: torch.Tensor) -> LinearisedRouting:
        values = (self.read, self.index, self.normal, self.pull, self.probabilities)
        read, index, normal, pull, probabilities = (v[chosen] for v in values)
        return LinearisedRouting(read, index, normal, pull, probabilities, self.experts)

    def logits(self, change: torch.Tensor) -> torch.Tensor:
        """Return the change of the chosen experts' logits [t, k] for one of the rows [E, H]."""
        import torch

        every = self.read @ change.T
        chosen = every.gather(1, self.index)
        if not self.probabilities.shape[1]:
            return chosen
        return torch.cat([chosen, (every * self.probabilities).sum(1, keepdim=True)], dim=1)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums [E, H] over tokens of values [t, k] times the inputs, by expert."""
        import torch

        dense = torch.zeros(len(values), self.experts, device=values.device)
        dense.scatter_(1, self.index, values[:, : self.index.shape[1]])
        if self.probabilities.shape[1]:
            dense += self.probabilities * values[:, -1:]
        return dense.T @ self.read

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        return (self.normal @ logits[..., None])[..., 0]

    def error(self, change: torch.Tensor) -> float:
        """Return by how much a change of the rows changes the squared error, to second order."""
        import torch

        logits = self.logits(change)
        return float(((self.applied(logits) - 2 * self.pull) * logits).sum(dtype=torch.float64))

    @property
    def scale(self) -> float:
        """The mean diagonal of the normal matrix of all rows."""
        effect = self.normal.diagonal(dim1=1, dim2=2).sum(1) * self.read.pow(2).mean(1)
        return float(effect.double().sum()) / self.experts

    def solve(self, strength: float, steps: int = ROUTER_STEPS) -> torch.Tensor:
        """Return the change of the rows [E, H] with the least error plus `strength` times its square, by conjugate
        gradients."""
        import torch

        left = self.to_rows(self.pull)
        change, way, size = torch.zeros_like(left), left.clone(), float(left.double().pow(2).sum())
        for _ in range(steps):
            if size <= 0:
                break
            applied = self.to_rows(self.applied(self.logits(way))) + strength * way
            length = size / max(float((way.double() * applied.double()).sum()), 1e-300)
            change += length * way
            left -= length * applied
            before, size = size, float(left.double().pow(2).sum())
            way = left + size / before * way
        return change


def linearised_routing(
    settings: Settings, rows: torch.Tensor, calls: Sequence[ExpertsCall], missing: Sequence[torch.Tensor]
) -> tuple[LinearisedRouting, torch.Tensor]:
    """Return a block linearised at the present rows [E, H] of its router, and which tokens [t] are of odd windows.

    `missing` is the residual [T, H] of each call. Raises RefusedError where the router reads something else than its
    experts do, or weighs them in a way that is not in the family table.
    """
    import torch

    experts = calls[0].block.block.experts
    parts: list[tuple[torch.Tensor, ...]] = []
    for call, left in zip(calls, missing, strict=True):
        _check_logits(call, rows)
        assert call.logits is not None
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1]).float()
        for part in expert_outputs(call, experts, {"": (call.index, call.weights)}):
            weights, index = part.weights[""], part.index.clamp(max=experts - 1)
            logits = call.logits[part.rows].float()
            slope, share, every = _derivative(settings, logits, index, weights, call.block.where)
            mixed = torch.diag_embed(weights * slope) - weights[..., None] * (share * slope)[:, None]
            if every.shape[1]:
                mixed = torch.cat([mixed, -weights[..., None]], dim=2)
            normal = mixed.transpose(1, 2) @ part.products.float() @ mixed
            pull = (mixed.transpose(1, 2) @ part.along(left[part.rows])[..., None])[..., 0]
            odd = torch.full_like(part.rows, part.half, dtype=torch.bool)
            parts.append((hidden[part.rows], index, normal, pull, every, odd))
    read, index, normal, pull, every, odd = (torch.cat(each) for each in zip(*parts, strict=True))
    return LinearisedRouting(read, index, normal, pull, every, experts), odd


def _derivative(
    settings: Settings, logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, where: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return c and q [t, k] of the chosen experts `index` [t, k], as the module's docstring has them, and the
    probabilities [t, E] or [t, 0]."""
    import torch

    scores = torch.from_numpy(router_scores(logits.double().cpu().numpy(), settings.score)).to(logits.device)
    chosen = scores.gather(1, index)
    shares = weights.double() / weights.double().sum(1, keepdim=True).clamp(min=1e-30)
    told = chosen / chosen.sum(1, keepdim=True).clamp(min=1e-30)
    if float((told - shares)[weights.any(1)].abs().max()) > _CLOSE or settings.softcap:
        raise RefusedError(f"refit: {where}: its weights are not the router's scores, so no row can be fitted", _HINT)
    raw = logits.gather(1, index).double()
    if settings.score == "sigmoid":
        slope = 1 - chosen
    elif settings.score == "sqrt-softplus":
        slope = 0.5 * torch.sigmoid(raw) / torch.nn.functional.softplus(raw).clamp(min=1e-30)
    else:
        slope = torch.ones_like(chosen)
    order = settings.renormalised
    if order or settings.score == "top-softmax":
        powers = shares ** (1.0 if order is True or not order else float(order))
        share = powers / powers.sum(1, keepdim=True).clamp(min=1e-30)
    else:
        share = torch.zeros_like(chosen)
    raw_softmax = not order and settings.score == "softmax"
    return slope.float(), share.float(), scores.float() if raw_softmax else scores[:, :0].float()


def _check_logits(call: ExpertsCall, rows: torch.Tensor) -> None:
    """Raise RefusedError unless the router's logits are its rows times the experts' inputs, plus a constant for each.

    Identity experts are in neither."""
    if call.logits is not None and call.logits.shape[1] == len(rows):
        logits = call.rows(call.logits).float()
        rest = logits - call.rows(call.hidden).float() @ rows.T
        if float((rest - rest[:1]).abs().max()) <= _CLOSE * float(logits.abs().max()):
            return
    raise RefusedError(
        f"refit: {call.block.where}: its router reads something else than its experts do, so no row can be fitted",
        _HINT,
    )


def router_of(plan: Plan, block: ExpertsModule) -> BlockTensor:
    """Return a block's router. Raises RefusedError unless it is one matrix of plain numbers."""
    router = block.block.router
    if router is None or block.router is None or plan.tensors[router.name].dtype not in PLAIN_FLOATS:
        raise RefusedError(f"refit: {block.where}: its router is not one matrix of plain numbers", _HINT)
    return router


def fit_router(
    settings: Settings,
    weight: torch.Tensor,
    axis: int,
    calls: Sequence[ExpertsCall],
    missing: Sequence[torch.Tensor],
    ridge: float | None,
    dtype: torch.dtype,
    again: Callable[[], tuple[list[ExpertsCall], list[torch.Tensor]]],
) -> tuple[torch.Tensor | None, RidgeSolution, list[ExpertsCall], list[torch.Tensor]]:
    """Fit a router's `weight` in place, rounded to `dtype`; its experts are along `axis`. Returns the new weight, None
    where it stays, how it was found, and the calls and residuals with it, which `again` computes.

    The ridge is the one that, fitted on even windows, has the least error on odd ones, unless it is given. A change
    that does not lessen the true error, in which other experts may be chosen, is halved, a few times, then discarded.
    """
    import torch

    rows = weight.float().T if axis == 1 else weight.float()
    problem, odd = linearised_routing(settings, rows, calls, missing)
    held_out = None
    scale = problem.scale
    if ridge is None:
        held_out = 0.0
        if bool(odd.any()) and not bool(odd.all()) and scale > 0:
            even, other = problem.half(~odd), problem.half(odd)
            errors = [other.error(even.solve(tried * scale)) for tried in ROUTER_PATH]
            best = min(range(len(errors)), key=errors.__getitem__)
            if errors[best] < 0:
                ridge, held_out = ROUTER_PATH[best], errors[best] * len(odd) / float(odd.sum())
    if ridge is None or scale <= 0:
        return None, RidgeSolution(None, None, held_out), list(calls), list(missing)
    change = problem.solve(ridge * scale)
    change = change.T if axis == 1 else change
    before, error = weight.clone(), squared_norm(missing)
    for halvings in range(_HALVINGS):
        weight.copy_((before.float() + 0.5**halvings * change).to(dtype))
        if torch.equal(weight, before):
            break
        new_calls, new_missing = again()
        if squared_norm(new_missing) < error:
            return weight.to(dtype).clone(), RidgeSolution(None, ridge, held_out), new_calls, new_missing
    weight.copy_(before)
    return None, RidgeSolution(None, None, None if held_out is None else 0.0), list(calls), list(missing)
