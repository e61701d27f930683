"""Fit a selection bias to a block's residual: the bias by which experts are chosen, and not weighed.

The routed output is no smooth function of it: a token's experts stay what they are until a margin is passed. So for
each token one exchange is looked at, the one that comes first: the chosen expert with the least score and bias goes,
and the best of the others comes. One more run of the block says by how much that changes the squared error of every
token. A change d [E] of the biases exchanges the experts of the tokens whose margin is below d_comes - d_goes, so the
error is a sum of steps; it is lessened expert by expert, each moved to the best of all intervals between steps, no
further than the middle margin. Then margins are taken again, for a few rounds.

In each round what even windows give must lessen the true error of odd ones, whole, halved or quartered, and what all
give then the true error of all; else the bias stays. Memory: what the calls hold, and five numbers for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.families.config_keys import Settings
from moesurgery.families.routing import router_scores
from moesurgery.fitting.ridge import squared_norm
from moesurgery.forward.hooks import ExpertsCall

if TYPE_CHECKING:
    import numpy as np
    import torch

_ROUNDS = 4
_SWEEPS = 8
_SHARES = (1.0, 0.5, 0.25)  # of a change
_CLOSE = 0.02  # of the largest: rounding error of bfloat16


@dataclass(frozen=True)
class Exchanges:
    """The first exchange of experts of each token, [T] each: which goes and which comes, by how much what goes is ahead
    in score and bias, by how much the exchange changes the squared error, and whether the token is of an odd window."""

    goes: np.ndarray
    comes: np.ndarray
    margin: np.ndarray
    cost: np.ndarray
    odd: np.ndarray

    def of(self, tokens: np.ndarray) -> Exchanges:
        values = (self.goes, self.comes, self.margin, self.cost, self.odd)
        return Exchanges(*(value[tokens] for value in values))

    def error(self, change: np.ndarray) -> float:
        """Return by how much a change [E] of the biases changes the squared error, of these exchanges alone."""
        return float(self.cost[change[self.comes] - change[self.goes] > self.margin].sum())

    def solve(self, experts: int) -> np.ndarray:
        """Return a change [E] of the biases that lessens the error, by no more than the middle margin each."""
        import numpy as np

        change, most = np.zeros(experts), float(np.median(self.margin)) if len(self.margin) else 0.0
        touched = [(np.flatnonzero(self.comes == e), np.flatnonzero(self.goes == e)) for e in range(experts)]
        for _ in range(_SWEEPS):
            before = change.copy()
            for expert, (comes, goes) in enumerate(touched):
                # Above a limit of the first kind an exchange happens, above one of the second it no longer does.
                limits = np.concatenate(
                    [self.margin[comes] + change[self.goes[comes]], change[self.comes[goes]] - self.margin[goes]]
                )
                steps = np.concatenate([self.cost[comes], -self.cost[goes]])
                order = np.argsort(limits, kind="stable")
                edges = np.concatenate([[-np.inf], limits[order], [np.inf]])
                error = np.concatenate([[0.0], np.cumsum(steps[order])])
                low, high = np.maximum(edges[:-1], -most), np.minimum(edges[1:], most)
                here = int(np.searchsorted(edges[1:-1], change[expert]))
                error = np.where(low < high, error, np.inf)
                best = int(np.argmin(error))
                if error[best] < error[here]:
                    change[expert] = (low[best] + high[best]) / 2
            if np.array_equal(change, before):
                break
        return change


def exchanges(
    settings: Settings, bias: torch.Tensor, calls: Sequence[ExpertsCall], missing: Sequence[torch.Tensor]
) -> Exchanges | None:
    """Return the exchanges of a block with the selection bias [E], `missing` [T, H] being the residual of each call.

    None where its experts are not simply those with the highest score and bias, as where groups of them are chosen
    first, and where they are weighed by anything else than their scores.
    """
    import numpy as np
    import torch

    experts, parts = calls[0].block.block.experts, []
    if settings.groups or settings.softcap or bias.numel() != experts:
        return None
    for call, left in zip(calls, missing, strict=True):
        if call.logits is None or call.logits.shape[-1] != experts:
            return None
        raw = call.logits.reshape(-1, experts)
        scores = torch.from_numpy(router_scores(raw.double().cpu().numpy(), settings.score)).to(raw.device)
        index, weights = call.index.reshape(len(scores), -1), call.weights.reshape(len(scores), -1)
        order = scores + bias.double().view(1, -1)
        if experts == index.shape[1] or int(index.max()) >= experts:
            return None
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, index, True)
        least, slot = order.gather(1, index).min(1)
        most, comes = order.masked_fill(chosen, -torch.inf).max(1)
        taken = scores.gather(1, index)
        scale = weights.double().sum(1, keepdim=True)
        if not settings.renormalised:
            scale = scale / taken.sum(1, keepdim=True).clamp(min=1e-30)
        if not _are(weights, _weighed(settings, taken) * scale) or float((least < most).double().mean()) > _CLOSE:
            return None
        goes = index.gather(1, slot[:, None])[:, 0]
        taken = taken.scatter(1, slot[:, None], scores.gather(1, comes[:, None]))
        changed = (_weighed(settings, taken) * scale).to(weights.dtype).view_as(call.weights)
        other = call.run(call.hidden, index.scatter(1, slot[:, None], comes[:, None]).view_as(call.index), changed)
        step = (other - call.run(call.hidden, call.index, call.weights)).reshape(left.shape).float()
        cost = (step.square() - 2 * step * left).sum(1, dtype=torch.float64)
        if call.real is not None:
            cost[~call.real.reshape(-1).to(cost.device)] = 0
        length = len(cost) // len(call.tokens)
        odd = (np.arange(len(cost)) // length + call.first) % 2 == 1
        parts.append((*(v.cpu().numpy() for v in (goes, comes, least - most, cost)), odd))
    return Exchanges(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _weighed(settings: Settings, scores: torch.Tensor) -> torch.Tensor:
    return scores / scores.sum(1, keepdim=True).clamp(min=1e-30) if settings.renormalised else scores


def _are(weights: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((weights - expected).abs().max()) <= _CLOSE * float(expected.abs().max())


def fit_bias(
    settings: Settings,
    bias: torch.Tensor,
    dtype: torch.dtype,
    calls: Sequence[ExpertsCall],
    missing: Sequence[torch.Tensor],
    again: Callable[[], tuple[list[ExpertsCall], list[torch.Tensor]]],
) -> tuple[torch.Tensor | None, float, list[ExpertsCall], list[torch.Tensor]]:
    """Fit a selection `bias` [E] in place, rounded to `dtype`. Returns the new bias, None where it stays; by how much
    the squared error changed on the windows that it was not fitted on, in proportion to all; and the calls and
    residuals with it, which `again` computes."""
    import torch

    calls, missing = list(calls), list(missing)
    fitted, held_out = None, 0.0
    for _ in range(_ROUNDS):
        found = exchanges(settings, bias, calls, missing)
        if found is None or found.odd.all() or not found.odd.any():
            break
        odd, before = torch.from_numpy(found.odd), bias.clone()

        def moved(change: np.ndarray, before: torch.Tensor = before) -> tuple[list[ExpertsCall], list[torch.Tensor]]:
            """Change the bias, and return the calls and residuals with it."""
            step = torch.from_numpy(change).to(bias.device).view_as(bias)
            bias.copy_((before.double() + step).to(dtype))
            return again()

        tried, error = found.of(~found.odd).solve(bias.numel()), _error_of(missing, odd)
        judged = ((share, _error_of(moved(share * tried)[1], odd) - error) for share in _SHARES)
        share, change = next(((s, c) for s, c in judged if c < 0), (0.0, 0.0))
        new_calls, new_missing = moved(share * found.solve(bias.numel()))
        if squared_norm(new_missing) >= squared_norm(missing):
            bias.copy_(before)
            break
        fitted, calls, missing = bias.to(dtype).clone(), new_calls, new_missing
        held_out += change * len(odd) / float(odd.sum())
    return fitted, held_out, calls, missing


def _error_of(missing: Sequence[torch.Tensor], tokens: torch.Tensor) -> float:
    """Return the squared error of some tokens."""
    import torch

    return squared_norm([torch.cat(list(missing))[tokens.to(missing[0].device)]])
