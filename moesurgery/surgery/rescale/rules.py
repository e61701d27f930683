"""The rules for the factor on the routed output when top-k goes from n to m: docs/rescale.md has the theory.

Four need nothing but the model (`router`, `norm`, `published`, `none`), four come from statistics of a run over
text (`gate`, `norm-matched`, `measured`, `measured-expert`: see `stats.factors`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.components import SHARED
from moesurgery.families.routing import even_gates_factor
from moesurgery.plan.plan import Plan
from moesurgery.surgery.rescale.data_free_factor import RouterEstimate, router_factors

Rule = Literal["router", "norm", "published", "none", "gate", "norm-matched", "measured", "measured-expert"]
DATA_RULES = ("gate", "norm-matched", "measured", "measured-expert")
COARSE_TOP_K = 2  # routers that choose at most so many experts were measured apart from all others
Factor = float | Sequence[float]  # one for a block, or one for each of its experts

_REASONS = {
    "gate": "sqrt(A_n/A_m) per layer from the gates that were seen",
    "norm-matched": "the ratio of the routed output's size at the old and the new top-k, per layer",
    "measured": "least squares between the routed output at the old and the new top-k, per layer",
    "measured-expert": "least squares between the routed output at the old and the new top-k, per expert",
}


@dataclass(frozen=True)
class Factors:
    """What a rule gives for each block by name, and what the others would give.

    `router` is the data-free estimate, where there is one. `alternatives` has every rule that could be applied:
    one number, the range over layers as text, or None. `statistics` says where measured numbers come from, `rho` is
    the correlation of experts' outputs that the estimate assumes.
    """

    chosen: Mapping[str, Factor]
    router: Mapping[str, float]
    alternatives: Mapping[str, Any]
    reason: str
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    rho: float = 0.0


def usual_rho(anatomy: Anatomy, old: int, new: int) -> float:
    """Return the correlation of experts' outputs that the rule `router` assumes where none is given.

    It is what costs least on trained models, not the correlation that is measured: docs/rescale.md has both. More
    experts than the model was trained with want a larger one, since an expert below the trained top-k says less than
    its weight claims.
    """
    settings = anatomy.settings
    if settings.renormalised is not True:
        return 0.0
    if SHARED in anatomy.component.values() or settings.score == "sigmoid":
        return 0.0 if new < old else 0.5
    if old <= COARSE_TOP_K:
        return 0.3 if new < old else 0.0
    return 0.1 if new < old else 0.2


def choose_factors(
    plan: Plan,
    anatomy: Anatomy,
    old: int,
    new: int,
    scale: Rule | float,
    seed: int,
    stats: str | None = None,
    rho: float | None = None,
) -> Factors:
    """Return the factor of every block by the rule `scale`; `rho` is that of `router`, the usual one by default.

    Raises RefusedError where the rule means nothing for the router or the statistics are of another model,
    RecipeError where a rule needs statistics and has none.
    """
    settings = anatomy.settings
    blocks = [block.where for block in anatomy.blocks]
    published = math.sqrt(old / new)
    norm = even_gates_factor(settings, old, new)
    estimate = RouterEstimate({})
    rho = usual_rho(anatomy, old, new) if rho is None else rho
    why_not = settings.family.routing.special
    if why_not is not None:
        norm = 1.0
    else:
        try:
            estimate = router_factors(plan, anatomy, old, new, seed, rho)
        except RefusedError as error:
            why_not = error.message
    data, statistics = _from_statistics(anatomy, new, scale, stats)
    alternatives: dict[str, Any] = {
        "router": span(estimate.factors) if estimate.factors else None,
        "norm": norm,
        "published": published,
    }
    alternatives |= {"none": 1.0} | {rule: span(factors) for rule, factors in data.items()}
    notes: tuple[str, ...] = ()
    chosen: Mapping[str, Factor]
    if isinstance(scale, (int, float)):
        if scale <= 0:
            what = "silence the experts" if scale == 0 else "turn the experts' output around"
            raise RefusedError(f"rescale: a factor of {scale:g} would {what}", "choose a positive number")
        chosen, reason = dict.fromkeys(blocks, float(scale)), f"factor {scale:g}, as asked"
    elif scale == "none":
        chosen, reason = dict.fromkeys(blocks, 1.0), "no factor, as asked"
    elif scale == "published":
        if settings.renormalised and old != new:
            notes = (
                f"this router renormalises, so the rule that keeps the norm is sqrt(m/n) = {norm:.6f};"
                f" sqrt(n/m) = {published:.6f} was asked for and used",
            )
        chosen, reason = dict.fromkeys(blocks, published), f"sqrt(n/m) = sqrt({old}/{new}), whatever the router does"
    elif scale == "norm":
        if settings.family.routing.special is not None:
            raise RefusedError(
                f"rescale: {settings.family.name}: even gates mean nothing here: {settings.family.routing.special}",
                "use --scale none or a number",
            )
        form = "sqrt(m/n)" if settings.renormalised else "sqrt(n/m)"
        chosen = dict.fromkeys(blocks, norm)
        reason = f"{form} with n={old}, m={new}: even gates, and this router {_gates(anatomy)}"
    elif scale == "router":
        if why_not is not None:
            raise RefusedError(
                f"rescale: the router estimate cannot be made: {why_not}",
                "choose --scale norm, --scale none or a number",
            )
        chosen, notes = estimate.factors, estimate.notes
        reason = (
            "sqrt(A_n/A_m) per layer, estimated from the token embeddings passed through each router, which"
            f" {_gates(anatomy)}; rho = {rho:g}"
        )
    else:
        chosen, reason = data[scale], _REASONS[scale]
        reason += f"; {statistics['tokens']:,} tokens of calibration text"
    return Factors(chosen, estimate.factors, alternatives, reason, notes, statistics, rho)


def _gates(anatomy: Anatomy) -> str:
    return "renormalises its weights" if anatomy.settings.renormalised else "uses raw weights, not renormalised"


def _from_statistics(
    anatomy: Anatomy, top_k: int, scale: Rule | float, path: str | None
) -> tuple[dict[str, dict[str, Factor]], dict[str, Any]]:
    """Return what each data rule gives for each block, and where that comes from; nothing without statistics."""
    if path is None:
        if scale in DATA_RULES:
            raise RecipeError(
                f"rescale: --scale {scale} needs statistics",
                "give --text FILE to collect them, or --stats FILE from `moesurgery collect --top-k K`",
            )
        return {}, {}
    import numpy as np

    from moesurgery.stats.factors import RULES
    from moesurgery.stats.statistics_file import stats_for

    stats = stats_for(path, anatomy, "rescale")
    routing = anatomy.settings.family.routing
    if stats.unread and scale in DATA_RULES:
        where, why = next(iter(stats.unread.items()))
        raise RefusedError(f"rescale: no factor can be measured for {where}: {why}", "use --scale router or a number")
    if routing.on_input and scale == "gate":
        raise RefusedError(
            f"rescale: gates say nothing about the size of {anatomy.settings.family.name}'s output: {routing.special}",
            "use --scale measured or --scale norm-matched",
        )
    statistics = {"sha256": stats.sha256, **stats.about}
    if top_k == stats.top_k:
        return {rule: {b.where: 1.0 for b in anatomy.blocks} for rule in DATA_RULES}, statistics
    if top_k not in stats.top_ks:
        seen = ", ".join(map(str, stats.top_ks)) or "no other top-k"
        raise RefusedError(
            f"rescale: {path} has sums for {seen}, not for top-k {top_k}",
            f"collect again with `moesurgery collect --top-k {top_k}`",
        )
    by_rule: dict[str, dict[str, Factor]] = {}
    for rule in DATA_RULES:
        if stats.unread or (routing.on_input and rule == "gate"):
            continue
        factors: dict[str, Factor] = {w: RULES[rule](block, top_k) for w, block in stats.blocks.items()}
        # Prediction layers are not run: they get the mean of what the others get.
        mean = float(np.mean([f for factor in factors.values() for f in spread(factor)]))
        by_rule[rule] = {block.where: factors.get(block.where, mean) for block in anatomy.blocks}
    return by_rule, statistics


def spread(factor: Factor) -> list[float]:
    """Return the numbers of a factor: one, or one per expert."""
    return [factor] if isinstance(factor, (int, float)) else list(factor)


def span(factors: Mapping[str, Factor], form: str = ".4f") -> str:
    """Show factors by their range."""
    flat = [f for factor in factors.values() for f in spread(factor)]
    low, high = min(flat), max(flat)
    if low == high:
        return f"{low:.6g}" if form == ".4f" else f"{low:{form}}"
    return f"{low:{form}} to {high:{form}}"
