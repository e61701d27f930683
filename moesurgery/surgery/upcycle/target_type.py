"""Which mixture a dense model becomes: the first type that keeps all of its config, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgery.decoders.pairs import NO_PAIR, Conversion, Pair, pairs_from, source_types, target_types
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.clients import Client
from moesurgery.families.family import Flag
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import did_you_mean
from moesurgery.surgery.client_form import obstacles


def choose_pair(
    plan: Plan,
    to: str | list[str] | None,
    *,
    shared: bool,
    client: Client | None = None,
    routing: Mapping[str, Any] | None = None,
) -> tuple[Pair, Conversion]:
    """Return the pair for a dense plan: the first among those asked for that is exact for this very config.

    With a `client`, exact in that client too. `routing`: number of experts, top-k, whether gates are renormalised.
    Raises RefusedError with what would be lost, and the nearest pair that works.
    """
    if plan.anatomy.is_moe:
        raise RefusedError(
            f"upcycle: this is a mixture of experts already ({plan.anatomy.model_type})",
            "upcycling starts from a dense model",
        )
    model_type = model_type_of(plan.config)
    pairs = pairs_from(model_type)
    if not pairs:
        reason = NO_PAIR.get(model_type)
        raise RefusedError(
            f"upcycle: {model_type}: " + (f"no exact pair exists: {reason}" if reason else "this type is not known"),
            "known: " + ", ".join(source_types()),
        )
    wanted = [to] if isinstance(to, str) else to
    for name in wanted or ():
        if name not in target_types():
            hint = did_you_mean(name, target_types()) or f"known: {', '.join(target_types())}"
            raise RefusedError(f"upcycle: {name} is no type that a dense model becomes", hint)
    tried = {pair.target_type: (pair, *pair.conversion(plan.config)) for pair in pairs}
    for pair, _, reasons in tried.values():
        if shared and not reasons and (pair.target.moe is None or pair.target.moe.shared is None):
            reasons.append("it has no shared expert")
        if client is not None and not reasons:
            config = _mixture_config(pair, tried[pair.target_type][1].config, routing or {})
            reasons += [f"{client.name}: {reason}" for reason in obstacles(client, plan, config)]
    working = {name: (pair, conversion) for name, (pair, conversion, reasons) in tried.items() if not reasons}
    for name in wanted or working:
        if name in working:
            return working[name]
    lost = []
    for name in wanted or tried:
        reasons = tried[name][2] if name in tried else Pair(model_type, name).conversion(plan.config)[1]
        lost.append(f"{name}: {'; '.join(reasons) or 'this pair was never measured to be exact'}")
    nearest = next(iter(working), None)
    raise RefusedError(
        f"upcycle: this {model_type} would lose something as {', or '.join(lost)}",
        f"the nearest type that keeps everything: --to {nearest}"
        if nearest
        else f"no type keeps everything; the nearest is {pairs[0].target_type}",
    )


def _mixture_config(pair: Pair, config: Mapping[str, Any], routing: Mapping[str, Any]) -> dict[str, Any]:
    """Return as much of the mixture's config as clients are told apart by."""
    family, moe = pair.target.family, pair.target.moe
    assert moe is not None
    mixture_config = {**config, **moe.settings, "model_type": pair.target_type}
    mixture_config |= {family.experts_key: routing.get("experts"), family.top_k_key: routing.get("top_k")}
    if isinstance(family.routing.renormalised, Flag):
        mixture_config[family.routing.renormalised.keys[0]] = routing.get("renormalise")
    return mixture_config
