"""Make one expert of several: the mean of their weights, with their neurons matched first if asked.

Weights are averaged, not functions, and published comparisons find merging behind dropping on generation (REAP, arXiv
2510.13999). docs/surgery.md has figures. What a merge keeps exactly: experts that are copies of each other, and,
aligned, copies with their neurons in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from moesurgery.errors import RecipeError
from moesurgery.families.anatomy import Anatomy
from moesurgery.moe.expert_axis import Entries, renamed_modules
from moesurgery.moe.expert_counts import equal_count, with_expert_count
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.requantise import with_experts_opened
from moesurgery.plan.side_files import renamed_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.requantize import WrittenBack
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values, Variant
from moesurgery.stats.group_fit_file import GroupFitFile, open_group_fits
from moesurgery.stats.input_squares import collected_squares
from moesurgery.surgery.group_experts import (
    EVERY_EXPERT,
    MEASURED_GROUPINGS,
    NAME,
    Align,
    By,
    Grouping,
    Groups,
    Merger,
    MergeWeights,
    Router,
    merger,
)
from moesurgery.surgery.merged_block import MergedBlock
from moesurgery.surgery.planned_experts import PlanOption


def _needed_statistics(plan: Plan, values: Values) -> NeededStatistics:
    """Return what text is asked for. What is refused whatever the text says is refused first."""
    given = {name: value for name, value in values.items() if name in ("groups", "to", "router", "plan_file")}
    merge_experts(plan, **{name: value for name, value in given.items() if name != "router"})
    merger(plan, **given)
    return NeededStatistics(every_expert="to" in values and values.get("group", "auto") in ("auto", *EVERY_EXPERT))


def _groups_to_fit(plan: Plan, values: Values) -> Merger | None:
    """Return the groups that need a fit, by the statistics in `values`; None where there is a fit or none is needed."""
    if "fit" in values:
        return None
    merge = merger(plan, **{name: value for name, value in values.items() if name != "requantize"}, fitted=True)
    return merge if merge.needs_fit else None


def _candidates(plan: Plan, values: Values) -> list[Variant]:
    """Return the ways to make groups that are worth trying, where none is asked for and statistics are there.

    They are measured before the neurons of their groups are matched: that takes a run for each, and did not change
    which way is the best (docs/surgery.md).
    """
    asked = {"by", "groups", "plan_file", "fit"} & values.keys() or values.get("group", "auto") != "auto"
    if asked or not {"to", "stats"} <= values.keys() or values.get("router") == "lse":
        return []
    given = {name: value for name, value in values.items() if (name, value) != ("align", "activations")}
    return [
        Variant(f"{way['group']} by {way['by']}" if "by" in way else way["group"], NAME, {**given, **way})
        for way in MEASURED_GROUPINGS
    ]


def _merge_and_drop(plan: Plan, values: Values) -> list[Variant]:
    """Return the merge and, by the same statistics, the drop of as many experts as it takes away."""
    variants = [Variant(NAME, NAME, values)]
    if "to" in values and "stats" in values:
        drop = {"count": plan.anatomy.experts - values["to"], "stats": values["stats"]}
        variants.append(Variant("drop-experts", "drop-experts", drop, f"dropping {drop['count']} experts"))
    return variants


# A merge costs more than a drop: it is repaired unless told not to be.
@operation(
    NAME,
    text=TextNeeds(_needed_statistics, _groups_to_fit, _merge_and_drop, _candidates, repair="down"),
    chooses=("groups", "to"),
)
def merge_experts(
    plan: Plan,
    *,
    groups: Annotated[
        Groups,
        Param("experts to merge, as '[[0, 5], [2, 3, 7]]', in every layer or per layer; others stay as they are"),
    ] = None,
    to: Annotated[int | None, Param("merge down to this many experts per layer, grouped by --group", minimum=1)] = None,
    group: Annotated[
        Grouping | None,
        Param(
            "how --to groups: auto (the default with text: the best of several on held-out text), router-rows (the"
            " default without statistics); or by statistics: reap-centroid (the default where every expert was run),"
            " msmoe (else), hc"
        ),
    ] = None,
    by: Annotated[
        By | None,
        Param(
            "which experts the others join in reap-centroid and msmoe: the highest by reap-sum, reap, frequency,"
            " soft-frequency or ean"
        ),
    ] = None,
    weights: Annotated[
        MergeWeights | list[float] | None,
        Param(
            "share of each expert in the mean: equal (the default without statistics), router-norm, a list with a"
            " number for each expert; or by statistics: usage (the default with them), reap"
        ),
    ] = None,
    align: Annotated[
        Align | None,
        Param(
            "match the neurons of merged experts first: none (the default without text), by their weights, or by their"
            " activations on text (the default with it)"
        ),
    ] = None,
    router: Annotated[
        Router | None,
        Param(
            "router row of a merged expert: that of its dominant member (the default), the mean of all, or lse, fitted"
            " on text to the log-sum-exp of all"
        ),
    ] = None,
    stats: Annotated[
        str | None, Param("statistics from `moesurgery collect`, for what needs data", metavar="FILE", reads="file")
    ] = None,
    fit: Annotated[
        str | None,
        Param(
            "neuron orders and router rows that --text made, for --align activations and --router lse",
            metavar="FILE",
            reads="file",
        ),
    ] = None,
    protect_super: Annotated[
        bool, Param("leave an expert alone whose output is far above all others' (needs statistics)")
    ] = True,
    requantize: WrittenBack = "as-source",
    plan_file: PlanOption = None,
) -> Plan:
    """Merge experts into fewer: the mean of their weights, one router row for each group.

    Give `groups`, `to` or a plan. The dominant member of a group is the one with the largest share, the first named
    where shares are equal; where groups are made, the one that they are made around, or else the one with the longest
    router row, or the most tokens. With text, experts are grouped and their neurons matched by what they do. Either way
    measure what it costs before you use the result.
    """
    choice: dict[str, Any] = {"groups": groups, "to": to, "group": group, "by": by, "weights": weights, "align": align}
    choice |= {"router": router, "stats": stats, "fit": fit, "protect_super": protect_super}
    choice |= {"plan_file": plan_file}
    return with_experts_opened(
        plan,
        requantize,
        lambda opened: _merged(opened, **choice),
        lambda opened: collected_squares(stats, opened, NAME),
    )


def _merged(plan: Plan, *, fit: str | None = None, **chosen: Any) -> Plan:
    """Return the plan with experts merged; `chosen` are parameters of `merger`."""
    choice = merger(plan, **chosen, fitted=fit is not None)
    groups, to, stats, plan_file = (chosen.get(name) for name in ("groups", "to", "stats", "plan_file"))
    fits = _fits(choice, fit)
    anatomy = plan.anatomy
    total, remaining = anatomy.experts, equal_count(NAME, choice.groups)
    entries: Entries = {}
    modules: dict[str, str | None] = {}
    for block in anatomy.blocks:
        merge = MergedBlock(block, plan.tensors, choice, fits)
        entries.update(merge.entries())
        modules.update(renamed_modules(block, merge.dominant))
    tensors, shard_of = plan.substituted(entries)
    config = plan.config if remaining == total else with_expert_count(anatomy, remaining, modules)
    given = {"groups": groups, "to": to, "plan_file": plan_file, "stats": stats, "fit": fit}
    parameters: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    how: dict[str, Any] = {"group": choice.group} if choice.group else {}
    how |= {"by": choice.by} if choice.by else {}
    how |= {"weights": choice.weights, "align": choice.align, "router": choice.router}
    parameters |= how
    if stats is not None:
        parameters["protect_super"] = chosen["protect_super"]
    layers = [
        {"layer": where, "groups": groups, "shares": choice.shares[where]} for where, groups in choice.groups.items()
    ]
    step = Step(
        NAME,
        parameters,
        f"{total} experts merged into {remaining} in each of {len(anatomy.blocks)} layers",
        report={"experts": remaining, "old_experts": total, "layers": layers, **how}
        | ({"statistics": dict(choice.statistics)} if choice.statistics else {})
        | ({"fit": dict(fits.about)} if fits else {}),
        notes=(*choice.notes, *_notes(anatomy, remaining)),
        warnings=choice.warnings,
        tables=(_table(choice.groups),),
    )
    files = renamed_files(plan.checkpoint, plan.files, modules if remaining != total else {})
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files)


def _fits(found: Merger, fit: str | None) -> GroupFitFile | None:
    """Return the fit that a merge needs. Raises RecipeError without one, RefusedError for one of other groups."""
    if not found.needs_fit:
        return None
    if fit is None:
        asked = "--align activations" if found.align == "activations" else "--router lse"
        raise RecipeError(
            f"{NAME}: {asked} needs to see the model run on text",
            "give --text FILE, or use --align weights and --router dominant",
        )
    fits = open_group_fits(fit)
    fits.check(found, fit)
    return fits


def _notes(anatomy: Anatomy, remaining: int) -> tuple[str, ...]:
    total = anatomy.experts
    if remaining == total:
        return ()
    notes = [
        "weights are averaged, not functions: unless the experts are near copies, dropping usually costs less; compare"
        " `moesurgery perplexity` of both"
    ]
    if total - remaining > total / 4:
        notes.append(
            "more than a quarter of the experts: published merges collapse from here on, on generation first"
            " (HC-SMoE on Qwen3-30B-A3B: perplexity 15.8 at a quarter, 174.7 at a half; GSM8K .008 at a half)"
        )
    top_k = anatomy.settings.top_k
    if top_k is not None and top_k > 1:
        notes.append(
            f"a token still goes to {top_k} experts, now of different groups; where members of one group used to be"
            " chosen together, a lower top-k may be nearer to the original"
        )
    return tuple(notes)


def _table(chosen: Mapping[str, Sequence[Sequence[int]]]) -> Table:
    rows = []
    for where, groups in chosen.items():
        merged = [group for group in groups if len(group) > 1]
        shown = "  ".join("+".join(map(str, group)) for group in merged)
        rows.append((where, shown or "none", str(len(groups) - len(merged))))
    return Table(("layer", "merged", "alone"), tuple(rows))
