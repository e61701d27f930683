"""Change the number of active experts, and keep the norm of what they add.

n is the trained top-k, m the new one. The routed output is a sum of expert outputs weighted by gates g_i;
with A_k = E[sum of g_i^2 over the top k] its norm grows as sqrt(A_k), so the factor that keeps it is
sqrt(A_n / A_m): docs/rescale.md has the derivation, the sources and what each rule costs on trained models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.family import EXPERTS_KEYS, TOP_K_KEYS
from moesurgery.families.routing import even_gates_factor, routing_class
from moesurgery.families.settings import keys_present, with_top_k, with_value
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.surgery.operation import operation
from moesurgery.surgery.parameters import Param
from moesurgery.surgery.router_estimate import router_factors
from moesurgery.surgery.scaling import is_quantised, scaled_output

Rule = Literal["router", "norm", "published", "none"]
Where = Literal["auto", "config", "scales", "weights"]


@operation("rescale")
def rescale(
    plan: Plan,
    *,
    top_k: Annotated[int, Param("the new number of experts per token", minimum=1, metavar="K")],
    scale: Annotated[
        Rule | float,
        Param("how to choose the factor on the routed output: router, norm, published, none, or a number"),
    ] = "router",
    where: Annotated[
        Where, Param("what takes the factor: the config's own number, quantisation scales, weights")
    ] = "auto",
    seed: Annotated[int, Param("seed of the sample of embedding rows that `router` uses", minimum=0)] = 0,
) -> Plan:
    """Route each token to another number of experts, and rescale their output.

    With n the trained and m the new top-k, `router` (the default) estimates sqrt(A_n / A_m) for each layer
    from the router itself, without data. `norm` is the even-gates case of the same formula: sqrt(m/n) where
    the router renormalises its weights (Mixtral, Qwen3-MoE, DeepSeek-V3), sqrt(n/m) where it does not.
    `published` is sqrt(n/m) for every router, to the letter. `none` changes only the config.
    """
    anatomy = plan.anatomy
    family = anatomy.require_family("rescale")
    old = _trained_top_k(anatomy)
    _check_top_k(anatomy, top_k)
    config = with_top_k(anatomy.settings, top_k)
    parameters: dict[str, Any] = {"top_k": top_k, "scale": scale, "where": where, "seed": seed}
    kind = routing_class(anatomy.settings)
    if kind == "C":
        note = (
            f"{family.name} normalises the routed output before adding it, so a factor on it has no effect:"
            " only the top-k was changed"
        )
        report = {"old_top_k": old, "top_k": top_k, "class": kind, "rule": "none", "where": None, "layers": []}
        return plan.edited(
            Step("rescale", parameters, f"top-k {old} -> {top_k}", report=report, notes=(note,)), config=config
        )

    table = _factors(plan, anatomy, old, top_k, scale, seed)
    chosen = table.chosen
    notes = list(table.notes)
    place: Where | None = _place(anatomy, plan, where)
    tensors = plan.tensors
    uniform = len(set(chosen.values())) == 1
    if kind == "D":
        notes.append(f"{family.name} normalises routed and shared experts together: the factor only moves their ratio")
    if all(f == 1.0 for f in chosen.values()):
        place = None
    elif place == "config":
        knob = family.routing.knob
        assert knob is not None
        factor = math.exp(sum(map(math.log, chosen.values())) / len(chosen))
        value = (anatomy.settings.knob or 1.0) * factor
        config = with_value(_settings_with(anatomy, config), (knob,), value, knob)
        mean = "" if uniform else " (geometric mean over layers; --where weights keeps one factor per layer)"
        notes.append(f"{knob} {anatomy.settings.knob:g} -> {value:.6g}{mean}: no weight was touched")
    else:
        changed = {}
        for block in anatomy.blocks:
            changed.update(scaled_output(block, plan.tensors, chosen[block.where]))
        tensors = plan.with_tensors(changed)
        notes.append(f"{len(changed)} tensors take the factor" + _rounding_note(changed))
    report = {
        "old_top_k": old,
        "top_k": top_k,
        "class": kind,
        "rule": scale if isinstance(scale, str) else "fixed",
        "where": place,
        "layers": [
            {"layer": block.where, "factor": chosen[block.where], "router": table.router.get(block.where)}
            for block in anatomy.blocks
        ],
        "alternatives": table.alternatives,
    }
    summary = f"top-k {old} -> {top_k}; routed output x {_span(chosen)} by rule {_rule_name(scale)}"
    step = Step("rescale", parameters, summary, (table.reason,), report, tuple(notes), _tables(anatomy, table, scale))
    return plan.edited(step, tensors=tensors, config=config)


def _tables(anatomy: Anatomy, table: _Factors, scale: Rule | float) -> tuple[Table, ...]:
    """Return the factor of each layer, and what every rule gives."""
    blocks = [block.where for block in anatomy.blocks]
    rows = [(where, f"{table.chosen[where]:.6f}") for where in blocks]
    if len(rows) > 24:
        rows[10:-10] = [(f"… {len(rows) - 20} more layers", "")]
    rules = []
    for rule in ("router", "norm", "published", "none"):
        value = table.alternatives[rule]
        text = value if isinstance(value, str) else "not available" if value is None else f"{value:.6f}"
        rules.append((rule + (" (used)" if rule == scale else ""), text))
    return Table(("layer", "factor"), tuple(rows)), Table(("rule", "factor"), tuple(rules))


def _settings_with(anatomy: Anatomy, config: Mapping[str, Any]) -> Any:
    from dataclasses import replace

    return replace(anatomy.settings, config=config)


def _rule_name(scale: str | float) -> str:
    return f"`{scale}`" if isinstance(scale, str) else f"`--scale {scale:g}`"


def _trained_top_k(anatomy: Anatomy) -> int:
    settings = anatomy.settings
    if settings.family.routing.fixed_top_k is not None:
        raise RefusedError(
            f"rescale: {settings.family.name}: the model code always uses top-{settings.family.routing.fixed_top_k}"
            " and ignores the config key, so changing it would change nothing",
            "drop or merge experts instead, or change the model code",
        )
    old = settings.top_k
    if old is None:
        raise RefusedError(f"rescale: config.json has none of {', '.join(TOP_K_KEYS)}", "add the key and try again")
    return old


def _check_top_k(anatomy: Anatomy, top_k: int) -> None:
    experts = anatomy.experts
    if not 1 <= top_k <= experts:
        key = keys_present(anatomy.settings, EXPERTS_KEYS)
        raise RefusedError(
            f"rescale: top-k {top_k} is impossible: each layer has {experts} experts ({key})",
            f"choose --top-k between 1 and {experts}",
        )
    groups = anatomy.settings.groups
    if groups is not None:
        count, kept = groups
        reachable = kept * experts // count
        if top_k > reachable:
            raise RefusedError(
                f"rescale: top-k {top_k} is impossible: routing keeps {kept} of {count} groups, {reachable} experts",
                f"choose --top-k up to {reachable}, or raise topk_group in config.json first",
            )


def _place(anatomy: Anatomy, plan: Plan, where: Where) -> Where:
    knob = anatomy.settings.family.routing.knob
    quantised = any(is_quantised(block, plan.tensors) for block in anatomy.blocks)
    name = anatomy.settings.family.name
    if where == "auto":
        return "config" if knob else "scales" if quantised else "weights"
    if where == "config" and not knob:
        raise RefusedError(
            f"rescale: {name} has no config number that multiplies exactly the routed output", "use --where auto"
        )
    if where == "scales" and not quantised:
        raise RefusedError(
            "rescale: the down-projections are not quantised: there are no scales", "use --where weights"
        )
    if where == "weights" and quantised:
        raise RefusedError(
            "rescale: the down-projections are quantised: their weights cannot be multiplied exactly",
            "use --where scales, or dequantise first with `moesurgery convert --dequantize`",
        )
    return where


@dataclass(frozen=True)
class _Factors:
    chosen: dict[str, float]  # by block
    router: dict[str, float]  # the data-free estimate, where there is one
    alternatives: dict[str, Any]
    reason: str
    notes: tuple[str, ...] = ()


def _factors(plan: Plan, anatomy: Anatomy, old: int, new: int, scale: Rule | float, seed: int) -> _Factors:
    settings = anatomy.settings
    blocks = [block.where for block in anatomy.blocks]
    published = math.sqrt(old / new)
    norm = even_gates_factor(settings, old, new)
    router: dict[str, float] = {}
    why_not = None
    if settings.family.routing.special is not None:
        why_not = settings.family.routing.special
        norm = 1.0
    try:
        if why_not is None:
            router = router_factors(plan, anatomy, old, new, seed)
    except RefusedError as error:
        why_not = error.message
    alternatives: dict[str, Any] = {"none": 1.0, "norm": norm, "published": published}
    alternatives["router"] = _span(router) if router else None
    normalises = "renormalises its weights" if settings.renormalised else "uses raw weights, not renormalised"
    notes: tuple[str, ...] = ()
    if isinstance(scale, (int, float)):
        if scale <= 0:
            raise RefusedError(f"rescale: a factor of {scale:g} would silence the experts", "choose a positive number")
        return _Factors(dict.fromkeys(blocks, float(scale)), router, alternatives, f"factor {scale:g}, as asked")
    if scale == "none":
        return _Factors(dict.fromkeys(blocks, 1.0), router, alternatives, "no factor, as asked")
    if scale == "published":
        if settings.renormalised and old != new:
            notes = (
                f"this router renormalises, so the rule that keeps the norm is sqrt(m/n) = {norm:.6f};"
                f" sqrt(n/m) = {published:.6f} was asked for and used",
            )
        reason = f"sqrt(n/m) = sqrt({old}/{new}), whatever the router does"
        return _Factors(dict.fromkeys(blocks, published), router, alternatives, reason, notes)
    if scale == "norm":
        if settings.family.routing.special is not None:
            raise RefusedError(
                f"rescale: {settings.family.name}: even gates mean nothing here: {settings.family.routing.special}",
                "use --scale none or a number",
            )
        form = "sqrt(m/n)" if settings.renormalised else "sqrt(n/m)"
        reason = f"{form} with n={old}, m={new}: even gates, and this router {normalises}"
        return _Factors(dict.fromkeys(blocks, norm), router, alternatives, reason)
    if why_not is not None:
        raise RefusedError(
            f"rescale: the router estimate cannot be made: {why_not}", "choose --scale norm, --scale none or a number"
        )
    reason = (
        f"sqrt(A_n/A_m) per layer, estimated from the token embeddings passed through each router, which {normalises}"
    )
    return _Factors(router, router, alternatives, reason)


def _span(factors: Mapping[str, float]) -> str:
    """Show factors by their range."""
    low, high = min(factors.values()), max(factors.values())
    return f"{low:.6g}" if low == high else f"{low:.4f} to {high:.4f}"


def _rounding_note(changed: Mapping[str, Any]) -> str:
    dtypes = sorted({expr.dtype for expr in changed.values()})
    return f" ({', '.join(dtypes)}; one rounding each)"
