"""Change the number of active experts, and keep the norm of what they add.

n is the trained top-k, m the new one. The routed output is a sum of expert outputs weighted by gates g_i. With
A_k = (1 - rho) E[sum of g_i^2] + rho E[(sum of g_i)^2] over the top k, rho the correlation of two experts' outputs, its
norm grows as sqrt(A_k), so the factor that keeps it is sqrt(A_n / A_m): docs/rescale.md has the derivation, the
sources and what each rule costs on trained models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from moesurgery.checkpoint.block_values import FACTORS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import Anatomy, check_stated_top_k
from moesurgery.families.config_keys import EXPERTS_KEYS, TOP_K_KEYS, keys_present, with_top_k, with_value
from moesurgery.families.quantised import quantisation_config
from moesurgery.families.routing import routing_class
from moesurgery.moe.expert_table import remapped_table
from moesurgery.moe.scaling import by_scales_or_weights, check_factors, is_quantised, scaled_output
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.requantise import with_experts_opened
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.requantize import WrittenBack
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values, Variant
from moesurgery.stats.input_squares import Squares, collected_squares
from moesurgery.surgery.rescale.rules import DATA_RULES, Factors, Rule, choose_factors, span, spread

Where = Literal["auto", "config", "scales", "weights"]
_DEFAULT_RULE: Rule = "router"
_AUTO = "auto"  # the rule that costs least on held-out text
_MEASURED_DEFAULT: Rule = "measured-expert"  # of it, where there are statistics and nothing to measure on


def _needed_statistics(plan: Plan, values: Values) -> NeededStatistics | None:
    """Return what text is asked for: the new top-k, which is refused first where it is impossible."""
    if "stats" in values:
        return None
    rescale(plan, top_k=values["top_k"], scale="none")
    return NeededStatistics(top_k=[values["top_k"]])


def _every_rule(plan: Plan, values: Values) -> list[Variant]:
    """Return every rule that can be had, with statistics or without, and the factor that was asked for."""
    asked = values.get("scale", _DEFAULT_RULE)
    rules = [rule for rule in get_args(Rule) if rule not in DATA_RULES or values.get("stats")]
    return [
        Variant(str(rule), "rescale", values if rule == asked else {**values, "scale": rule}, f"--scale {rule}")
        for rule in dict.fromkeys((*rules, asked))
    ]


def _candidates(plan: Plan, values: Values) -> list[Variant]:
    """Return every rule but the published one, which is kept for comparison, where the choice is left open."""
    if values.get("scale") != _AUTO:
        return []
    rules = [rule for rule in get_args(Rule) if rule not in DATA_RULES or values.get("stats")]
    return [
        Variant(rule, "rescale", {**values, "scale": rule}, f"--scale {rule}") for rule in rules if rule != "published"
    ]


@operation(
    "rescale",
    text=TextNeeds(_needed_statistics, variants=_every_rule, candidates=_candidates, named_by="scale", heading="rule"),
)
def rescale(
    plan: Plan,
    *,
    top_k: Annotated[int, Param("the new number of experts per token", minimum=1, metavar="K")],
    scale: Annotated[
        Rule | Literal["auto"] | float,
        Param(
            "how to choose the factor on the routed output: router, norm, published, none, a number, or from"
            " statistics: measured, measured-expert, gate, norm-matched; or auto, the best of them on held-out text"
        ),
    ] = _DEFAULT_RULE,
    where: Annotated[
        Where, Param("what takes the factor: the config's own number, quantisation scales, weights")
    ] = "auto",
    rho: Annotated[
        float | None,
        Param(
            "correlation of experts' outputs that `router` assumes, 0 to 1; by the kind of router where it is left out",
            minimum=0,
            maximum=1,
        ),
    ] = None,
    seed: Annotated[int, Param("seed of the sample of embedding rows that `router` uses", minimum=0)] = 0,
    stats: Annotated[
        str | None,
        Param(
            "statistics from `moesurgery collect --top-k K`, for the rules that need data", metavar="FILE", reads="file"
        ),
    ] = None,
    requantize: WrittenBack = "as-source",
) -> Plan:
    """Route each token to another number of experts, and rescale their output.

    With n the trained and m the new top-k, `router` (the default) estimates sqrt(A_n / A_m) for each layer
    from the router itself, without data, with A_k = (1 - rho) E[sum g^2] + rho E[(sum g)^2]. `norm` is the case of
    even gates and rho = 0: sqrt(m/n) where the router renormalises its weights (Mixtral, Qwen3-MoE, DeepSeek-V3),
    sqrt(n/m) where it does not. `published` is sqrt(n/m) for every router, to the letter. `none` changes only the
    config.

    From statistics: `measured` is least squares between the outputs at the old and the new top-k, one factor per
    layer; `measured-expert` the same with a factor per expert; `norm-matched` keeps the size of the output;
    `gate` is the formula of `router` with gates that were seen.

    Of quantised weights the scales take the factor. Where they cannot (exponents, and a factor that is no power of
    two), or with `--where weights`, the weights are multiplied and quantised again.
    """

    def edit(plan: Plan) -> Plan:
        return _rescaled(plan, top_k, scale, where, rho, seed, stats)

    def squares(opened: Plan) -> Squares:
        return collected_squares(stats, opened, "rescale")

    if where == "auto":
        return by_scales_or_weights(plan, requantize, edit, squares)
    return with_experts_opened(plan, requantize, edit, squares) if where == "weights" else edit(plan)


def _rescaled(
    plan: Plan,
    top_k: int,
    scale: Rule | Literal["auto"] | float,
    where: Where,
    rho: float | None,
    seed: int,
    stats: str | None,
) -> Plan:
    anatomy = plan.anatomy
    family = anatomy.require_family("rescale")
    old = _trained_top_k(anatomy)
    _check_top_k(anatomy, top_k)
    rule: Rule | float
    rule = (_DEFAULT_RULE if stats is None else _MEASURED_DEFAULT) if scale == "auto" else scale
    config = with_top_k(anatomy.settings, top_k)
    parameters: dict[str, Any] = {"top_k": top_k, "scale": rule, "where": where, "seed": seed}
    if stats is not None:
        parameters["stats"] = stats
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

    tables = _expert_tables(plan, top_k)
    table = choose_factors(plan, anatomy, old, top_k, rule, seed, stats, rho)
    if rule == "router":
        parameters["rho"] = table.rho
    chosen = table.chosen
    for block_name, factor in chosen.items():
        check_factors(block_name, spread(factor))
    notes = list(table.notes)
    place: Where | None = _place(anatomy, plan, where, rule)
    tensors = plan.with_tensors(tables)
    flat = [f for factor in chosen.values() for f in spread(factor)]
    if kind == "D":
        notes.append(f"{family.name} normalises routed and shared experts together: the factor only moves their ratio")
    if all(f == 1.0 for f in flat):
        place = None
    elif place == "config":
        routed_scale_key = family.routing.routed_scale_key
        assert routed_scale_key is not None
        factor = math.exp(sum(map(math.log, flat)) / len(flat))
        before = 1.0 if anatomy.settings.routed_scale_key is None else anatomy.settings.routed_scale_key
        value = before * factor
        if not (math.isfinite(value) and value > 0):
            raise RefusedError(
                f"rescale: {routed_scale_key} {before:g} x {factor:.6g} is {value:g}, not a finite and positive number",
                f"put a positive {routed_scale_key} into config.json first, or use --where weights",
            )
        config = with_value(_settings_with(anatomy, config), (routed_scale_key,), value, routed_scale_key)
        mean = (
            "" if len(set(flat)) == 1 else " (geometric mean over layers; --where weights keeps one factor per layer)"
        )
        notes.append(f"{routed_scale_key} {before:g} -> {value:.6g}{mean}: no weight was touched")
    else:
        changed = {}
        for block in anatomy.blocks:
            changed.update(scaled_output(block, plan.tensors, chosen[block.where]))
        tensors = plan.with_tensors({**tables, **changed})
        notes.append(f"{len(changed)} tensors take the factor" + _rounding_note(changed))
        if place == "scales":
            notes += _scale_notes(plan.config, chosen.values())
    if tables and top_k != old:
        notes.append(_table_note(tables, old, top_k))
    report = {
        "old_top_k": old,
        "top_k": top_k,
        "class": kind,
        "rule": rule if isinstance(rule, str) else "fixed",
        "where": place,
        "layers": [
            {"layer": block.where, "factor": chosen[block.where], "router": table.router.get(block.where)}
            for block in anatomy.blocks
        ],
        "alternatives": table.alternatives,
        "rho": table.rho,
    }
    if table.statistics:
        report["statistics"] = table.statistics
    summary = f"top-k {old} -> {top_k}; routed output x {span(chosen)} by rule {_rule_name(rule)}"
    step = Step("rescale", parameters, summary, (table.reason,), report, tuple(notes), _tables(anatomy, table, rule))
    return plan.edited(step, tensors=tensors, config=config)


def _expert_tables(plan: Plan, top_k: int) -> dict[str, Expr]:
    """Return the tables of expert numbers, as wide as the new top-k."""
    tables: dict[str, Expr] = {}
    for block in plan.anatomy.blocks:
        for member in block.named("expert_table"):
            tables[member.name] = remapped_table(
                block, member, plan.tensors, lambda m: plan.tensors[m.name], range(block.experts), top_k
            )
    return tables


def _table_note(tables: Mapping[str, Expr], old: int, new: int) -> str:
    """Say what another top-k means in hash layers."""
    which = f"{len(tables)} layers take each token's experts from a table, by no score"
    if new < old:
        return f"{which}: there a token keeps the first {new} of the {old} that it lists"
    return (
        f"{which}: there a token keeps the {old} that it lists and takes {new - old} more, those whose router rows are"
        " nearest to these, which no training chose"
    )


def _tables(anatomy: Anatomy, table: Factors, scale: Rule | float) -> tuple[Table, ...]:
    """Return the factor of each layer, and what every rule gives."""
    blocks = [block.where for block in anatomy.blocks]
    rows = [(where, span({where: table.chosen[where]}, ".6f")) for where in blocks]
    if len(rows) > 24:
        rows[10:-10] = [(f"… {len(rows) - 20} more layers", "")]
    rules = []
    for rule, value in table.alternatives.items():
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
    check_stated_top_k(anatomy)
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


def _place(anatomy: Anatomy, plan: Plan, where: Where, scale: Rule | float) -> Where:
    routed_scale_key = anatomy.settings.family.routing.routed_scale_key
    quantised = any(is_quantised(block, plan.tensors) for block in anatomy.blocks)
    name = anatomy.settings.family.name
    if where == "auto":
        # One number for all layers would throw away what was measured of each: only when asked for.
        exact = routed_scale_key and scale not in DATA_RULES
        return "config" if exact else "scales" if quantised else "weights"
    if where == "config" and not routed_scale_key:
        raise RefusedError(
            f"rescale: {name} has no config number that multiplies exactly the routed output", "use --where auto"
        )
    if where == "config" and scale == "measured-expert":
        raise RefusedError("rescale: config.json has one number, not one per expert", "use --where auto")
    if where == "scales" and not quantised:
        raise RefusedError(
            "rescale: the down-projections are not quantised: there are no scales", "use --where weights"
        )
    return where


_ROUNDING = {"F64": "2^-53", "F32": "2^-24", "F16": "2^-11", "BF16": "2^-8"}  # of normal numbers, to nearest


def _rounding_note(changed: Mapping[str, Expr]) -> str:
    dtypes = sorted({expr.dtype for expr in changed.values()})
    rounding = {**_ROUNDING, **dict.fromkeys(FACTORS, f"{_ROUNDING['F16']}, in the scale of each block")}
    kinds = [f"{d} rounded once, by at most {rounding[d]}" if d in rounding else f"{d} exactly" for d in dtypes]
    return f" ({', '.join(kinds)})"


def _scale_notes(config: Mapping[str, Any], chosen: Iterable[float | Sequence[float]]) -> list[str]:
    """Say what engines may expect of scales that a factor changes."""
    factors = [f for of in chosen for f in (of if isinstance(of, Sequence) else (of,))]
    if quantisation_config(config).get("scale_fmt") != "ue8m0" or all(math.frexp(f)[0] == 0.5 for f in factors):
        return []
    return [
        "quantization_config says scale_fmt ue8m0, powers of two: they are so no longer, and an engine that relies"
        " on it will round them; a factor of a power of two keeps them"
    ]
