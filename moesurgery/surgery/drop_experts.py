"""Leave experts out: their weights, their router rows, and everything else that follows them.

Removing router rows is the same as masking those logits with minus infinity before scoring, exactly: the next
best expert is promoted. What that costs, and which choices the literature has found to matter, is in
docs/surgery.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.client_limits import awkward_numbers, moe_shape
from moesurgery.families.clients import CLIENTS
from moesurgery.moe.expert_axis import renamed_modules, selected
from moesurgery.moe.expert_counts import (
    check_blocks,
    check_groups,
    check_remaining,
    equal_count,
    with_expert_count,
)
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.side_files import renamed_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values, Variant
from moesurgery.stats.expert_budget import best_allocation, lost_shares, uniform_allocation
from moesurgery.stats.plan_file import load_plan_file
from moesurgery.surgery.choose_experts import (
    CANDIDATES,
    FREE_DEFAULT,
    Criterion,
    LayerKey,
    Ranking,
    check_indices,
    default_criterion,
    per_block,
    ranking,
    share_of,
    with_protection,
)
from moesurgery.surgery.planned_experts import PlanOption, planned_experts

ExpertsByLayer = list[int] | dict[LayerKey, list[int]] | None
_NAME = "drop-experts"
PROTECTED_SHARE = 0.1


def _needed_statistics(plan: Plan, values: Values) -> NeededStatistics | None:
    """Return what text is asked for, unless experts are named. What is impossible whichever go is refused first."""
    if {"stats", "experts", "plan_file"} & values.keys() or not isinstance(values.get("keep", 0), int | str):
        return None
    drop_experts(plan, **{name: values[name] for name in ("keep", "count") if name in values}, by="random")
    kept = values.get("keep", plan.anatomy.experts - values.get("count", 0))
    kept = share_of(kept, plan.anatomy.experts) if isinstance(kept, str) else kept
    return NeededStatistics(keep=[kept] if values.get("by") == "recon" else [])


def _candidates(plan: Plan, values: Values) -> list[Variant]:
    """Return the criteria that are worth trying, where none is asked for and statistics are there."""
    number = values.get("keep", values.get("count"))
    if values.get("by", "auto") != "auto" or "stats" not in values or not isinstance(number, int):
        return []
    return [Variant(by, _NAME, {**values, "by": by}, f"--by {by}") for by in CANDIDATES]


@operation(
    _NAME,
    text=TextNeeds(_needed_statistics, candidates=_candidates, own_text=("protect",)),
    chooses=("experts", "keep", "count"),
)
def drop_experts(
    plan: Plan,
    *,
    experts: Annotated[
        ExpertsByLayer,
        Param("experts to drop in every MoE layer, as 0-6,9; or an entry for each, as '{0: [3], 1: [6]}'"),
    ] = None,
    keep: Annotated[
        int | ExpertsByLayer | str,
        Param(
            "how many experts per layer to keep, as 6 or 25%, chosen by --by; or which, as 0-6,9 or an entry for each"
            " layer, as '{0: [3], 1: [6]}'"
        ),
    ] = None,
    count: Annotated[int | None, Param("drop this many experts per layer, chosen by --by", minimum=0)] = None,
    by: Annotated[
        Criterion | None,
        Param(
            "how --count or --keep NUMBER choose: auto (the default with text: the best of several on held-out text),"
            " router-norm (the default without statistics), aimer or random; or by statistics: reap-sum (the default"
            " with them alone, up to 16 experts), hope (with more), gram, reap, frequency, soft-frequency, ean, man,"
            " msan, recon"
        ),
    ] = None,
    seed: Annotated[int, Param("seed of --by random", minimum=0)] = 0,
    stats: Annotated[
        str | None,
        Param(
            "statistics from `moesurgery collect`, or an imatrix of llama.cpp, for criteria that need data",
            metavar="FILE",
            reads="file",
        ),
    ] = None,
    protect_super: Annotated[
        bool, Param("never drop an expert whose output is far above all others' (needs statistics)")
    ] = True,
    protect: Annotated[
        str | None,
        Param(
            "text or JSONL, or its statistics from `moesurgery collect`: the experts that say most there are not"
            " dropped",
            metavar="FILE",
            reads="file",
        ),
    ] = None,
    protect_share: Annotated[
        float, Param("how many experts of each layer --protect keeps, as a share of all", minimum=0, maximum=1)
    ] = PROTECTED_SHARE,
    plan_file: PlanOption = None,
    per_layer: Annotated[
        bool, Param("say what as many experts in all would cost with a number for each layer; no stock loader has that")
    ] = False,
) -> Plan:
    """Leave experts out of every MoE layer, with their router rows.

    Give one of `experts`, `keep`, `count` and a plan. Every layer loses the same number, since config.json has one
    number for all, and group-limited routers lose as many in each group. Only byte ranges are copied.
    """
    anatomy = plan.anatomy
    family = anatomy.require_family(_NAME)
    total = check_blocks(anatomy, _NAME)
    given = {"experts": experts, "keep": keep, "count": count, "plan_file": plan_file}
    stated = [name for name, choice in given.items() if choice is not None]
    if len(stated) != 1:
        raise RecipeError(
            f"{_NAME} needs one of experts, keep, count and plan_file"
            + (f"; {' and '.join(stated)} are given" if stated else ": which experts, or how many"),
            f"as in `moesurgery {_NAME} MODEL --experts 3`, or `--count 2`, or `--keep 25%`",
        )
    if isinstance(keep, str):
        keep = share_of(keep, total)
    if isinstance(keep, int):
        if keep > total:
            raise RefusedError(
                f"{_NAME}: there are {total} experts in each layer, fewer than {keep}", "choose a lower --keep"
            )
        count, keep = total - keep, None
    ranked: Ranking | None = None
    warnings: tuple[str, ...] = ()
    if per_layer and count is None:
        raise RecipeError(f"{_NAME}: per_layer shares out a number of experts, and experts are named", "leave it out")
    if protect is not None and count is None:
        raise RecipeError(f"{_NAME}: protect is for a choice by a criterion, and experts are named", "leave it out")
    if count is not None:
        check_remaining(anatomy, _NAME, total - count)
        if by is None or by == "auto":
            by = FREE_DEFAULT if stats is None else default_criterion(total, stats)
        ranked = ranking(plan, _NAME, by, seed, stats, count, protect_super)
        if protect is not None:
            ranked = with_protection(ranked, anatomy, _NAME, protect, protect_share, count)
        if per_layer:
            _refuse_per_layer(anatomy, ranked, by, count)
        dropped = {where: ranked.lowest(anatomy, where, count) for where in ranked.scores}
    elif plan_file is not None:
        planned = planned_experts(plan, _NAME, load_plan_file(plan_file))
        dropped = {where: [e for e in range(total) if e not in stay] for where, stay in planned.kept.items()}
        warnings = planned.warnings
    else:
        dropped = _named(anatomy, experts, keep)
    kept = {where: [e for e in range(total) if e not in lost] for where, lost in dropped.items()}
    try:
        remaining = equal_count(_NAME, kept)
    except RefusedError as error:
        chosen = experts if experts is not None else keep
        named = {str(key) for key in chosen} if isinstance(chosen, Mapping) else set()
        left_out = [str(b.layer) for b in anatomy.blocks if named.isdisjoint((str(b.layer), b.where))]
        if named and left_out:
            error.hint = f"{error.hint}; nothing is said of the MoE layers {', '.join(left_out)}"
        raise
    check_remaining(anatomy, _NAME, remaining)
    check_groups(anatomy, _NAME, kept)

    entries = {}
    modules: dict[str, str | None] = {}
    for block in anatomy.blocks:
        entries.update(selected(block, plan.tensors, kept[block.where]))
        modules.update(renamed_modules(block, kept[block.where]))
    tensors, shard_of = plan.substituted(entries)
    config = plan.config if remaining == total else with_expert_count(anatomy, remaining, modules)

    parameters: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if count is not None:
        parameters["by"] = by
        if by == "random":
            parameters["seed"] = seed
        if stats is not None:
            parameters |= {"stats": stats, "protect_super": protect_super}
        if protect is not None:
            parameters |= {"protect": protect, "protect_share": protect_share}
    layers = []
    for block in anatomy.blocks:
        entry: dict[str, Any] = {"layer": block.where, "dropped": dropped[block.where], "kept": kept[block.where]}
        if ranked:
            entry["scores"] = ranked.scores[block.where]
        layers.append(entry)
    notes = list(ranked.notes) if ranked else list(planned.notes) if plan_file is not None else []
    if total - remaining > total / 4:
        notes.append(
            "more than a quarter of the experts: published results collapse from here on, the more so the fewer"
            " experts there are (Moonlight-16B, 64 experts: GSM8K .833, .664 at a quarter, .141 at a half)"
        )
    notes += _awkward_notes(anatomy, remaining)
    if total != remaining and not anatomy.settings.renormalised and anatomy.settings.score == "softmax":
        notes.append(
            f"{family.name} uses raw softmax weights: without the dropped experts those of the others grow, by"
            " 1/(1 - what the dropped ones had), and so does the routed output"
        )
    same = len({tuple(lost) for lost in dropped.values()}) == 1
    which = f": {_listed(next(iter(dropped.values())))}" if same else ""
    step = Step(
        _NAME,
        parameters,
        f"{total - remaining} of {total} experts dropped in each of {len(anatomy.blocks)} layers{which}",
        report={"experts": remaining, "old_experts": total, "layers": layers}
        | ({"statistics": ranked.statistics} if ranked and ranked.statistics else {})
        | ({"plan": planned.about} if plan_file is not None else {}),
        notes=tuple(notes),
        warnings=warnings,
        tables=() if same else (_table(dropped),),
    )
    files = renamed_files(plan.checkpoint, plan.files, modules if remaining != total else {})
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files)


def _refuse_per_layer(anatomy: Anatomy, ranked: Ranking, by: str, count: int) -> None:
    """Raise RefusedError with what a number for each layer would save, and why no checkpoint can have it."""
    reason = (
        f"no stock loader takes a number of experts for each layer of {anatomy.model_type}: transformers (5.23, 5.24)"
        " reads one number for all MoE layers, and refuses another in `per_layer_config` or a list"
    )
    groups, top_k = anatomy.settings.groups, anatomy.settings.top_k or 1
    if by in ("gram", "hope", "aimer", "random", "recon", "router-norm"):
        hint = "--by reap-sum, ean, frequency or soft-frequency with --text or --stats says what it would save"
        raise RefusedError(f"{_NAME}: {reason}", hint)
    costs = {where: lost_shares(scores) for where, scores in ranked.scores.items()}
    best = best_allocation(costs, count * len(costs), anatomy.experts - top_k, groups[0] if groups else 1)
    uniform, layers = uniform_allocation(costs, count), len(costs)
    kept = ", ".join(str(anatomy.experts - dropped) for dropped in best.dropped.values())
    raise RefusedError(
        f"{_NAME}: {reason}. As many experts in all, shared out by {by} ({kept}), would lose"
        f" {100 * best.cost / layers:.2f} % of {by} instead of {100 * uniform.cost / layers:.2f} %",
        "leave --per-layer out",
    )


def _awkward_notes(anatomy: Anatomy, remaining: int) -> list[str]:
    """Return what clients make of the number of experts that is left, where they made nothing of the number before."""
    before = moe_shape(anatomy)
    after = replace(before, experts=remaining)
    rules = [r for c in CLIENTS.values() if c.has_code(anatomy.model_type) for r in awkward_numbers(c.name, after)]
    # What a rule says begins with the number of experts, if it is about that.
    return [
        rule.warning_for(after)
        for rule in rules
        if rule.misses(after).removeprefix(f"{remaining} ") != rule.misses(before).removeprefix(f"{before.experts} ")
    ]


def _named(anatomy: Anatomy, experts: ExpertsByLayer, keep: ExpertsByLayer) -> dict[str, list[int]]:
    """Return the experts to drop in each block, from a choice by number."""
    chosen = per_block(anatomy, _NAME, experts if experts is not None else keep)
    dropped = {}
    for block in anatomy.blocks:
        indices = chosen.get(block.where, [] if experts is not None else list(range(block.experts)))
        check_indices(_NAME, block, indices)
        dropped[block.where] = [e for e in range(block.experts) if (e in indices) == (experts is not None)]
    return dropped


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts)) or "none"


def _table(dropped: Mapping[str, Sequence[int]]) -> Table:
    rows = [(where, _listed(lost)) for where, lost in dropped.items()]
    return Table(("layer", "dropped"), tuple(rows))
