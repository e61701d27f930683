"""From router logits to weights, for every kind of router in the table; and what that says of a change of top-k.

Notation: n is the trained top-k, m the new one, g_i the weight that multiplies expert i's output, and
A_k = (1 - rho) E[sum of g_i^2] + rho E[(sum of g_i)^2] over the top k. Expert outputs of equal norm r, of which any
two have the correlation rho, give a routed output of norm r * sqrt(A_k), so the factor that keeps it is
sqrt(A_n / A_m). (mergekit issue 294 derives the even-gates
case; `docs/rescale.md` tells what real gates do to it.) numpy only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moesurgery.errors import CheckpointError
from moesurgery.families.config_keys import Settings

if TYPE_CHECKING:
    import numpy as np


def routing_class(settings: Settings) -> str:
    """Return the class A-E of the router, as `docs/families.md` defines them."""
    routing = settings.family.routing
    if routing.after is not None:
        return "C" if routing.after == "routed" else "D"
    if routing.special is not None:
        return "E"
    return "A" if settings.renormalised else "B"


def even_gates_factor(settings: Settings, old: int, new: int) -> float:
    """Return sqrt(A_n / A_m) for gates that are all equal: sqrt(m/n) renormalised, sqrt(n/m) raw.

    Where the weights are divided by their L_p norm (DBRX), A_k = k / k^(2/p).
    """
    order = settings.renormalised
    if order is True:
        return math.sqrt(new / old)
    if not order:
        return math.sqrt(old / new)
    exponent = 1 - 2 / float(order)
    return math.sqrt((old / new) ** exponent)


def router_scores(logits: np.ndarray, score: str) -> np.ndarray:
    """Return the scores [tokens, E] of router logits [tokens, E]. Raises ValueError for an unknown function."""
    import numpy as np

    if score in ("softmax", "top-softmax"):
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
    if score == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))))
    if score == "sqrt-softplus":
        return np.asarray(np.sqrt(np.logaddexp(0, logits)))
    raise ValueError(f"no estimate for the scoring function {score!r}")


def selection_order(settings: Settings, logits: np.ndarray, scores: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Return the experts of each token, best first, as the router ranks them (bias and groups included)."""
    import numpy as np

    ranked = logits if settings.family.routing.bias_on == "logit" else scores
    ranked = ranked + bias.reshape(1, -1) if bias is not None else ranked
    if settings.groups is not None:
        count, kept = settings.groups
        if ranked.shape[1] % count:
            raise CheckpointError(f"config.json: {count} groups do not divide {ranked.shape[1]} experts", "correct it")
        grouped = ranked.reshape(len(ranked), count, ranked.shape[1] // count)
        if settings.family.routing.groups == "top2":
            group_score = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        else:
            group_score = grouped.max(axis=-1)
        dropped = np.argsort(-group_score, axis=-1, kind="stable")[:, kept:]
        grouped = grouped.copy()
        np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=1)
        ranked = grouped.reshape(ranked.shape)
    return np.argsort(-ranked, axis=-1, kind="stable")


def second_moments(
    settings: Settings, logits: np.ndarray, bias: np.ndarray | None = None, rho: float = 0.0
) -> np.ndarray:
    """Return A_k for k = 1..E from router logits [tokens, E] of a sample of tokens.

    `rho` is the correlation between the outputs of two experts that are chosen together. Constant factors on the
    weights are left out: they cancel in A_n / A_m.
    """
    import numpy as np

    logits = logits.astype(np.float64)
    if settings.softcap:
        logits = settings.softcap * np.tanh(logits / settings.softcap)
    scores = router_scores(logits, settings.score)
    order = selection_order(settings, logits, scores, bias)
    chosen = np.take_along_axis(scores, order, axis=-1)
    moments = (1 - rho) * np.cumsum(chosen**2, axis=-1) + rho * np.cumsum(chosen, axis=-1) ** 2
    norm = settings.renormalised
    if norm:
        power = 1.0 if norm is True else float(norm)
        moments = moments / np.maximum(np.cumsum(chosen**power, axis=-1), 1e-20) ** (2 / power)
    return np.asarray(moments.mean(axis=0))
