"""Which experts are to become one, with what shares, and how: all of a merge that is decided before weights are read.

Groups are named, or made: by router rows without data, or from statistics of a run over text by the rules of three
papers. docs/surgery.md has figures for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.moe.clustering import around_centroids, clusters
from moesurgery.moe.expert_counts import check_blocks, check_groups, check_remaining, equal_count
from moesurgery.plan.plan import Plan
from moesurgery.stats.criteria import MeasuredCriterion
from moesurgery.stats.plan_file import LayerPlan, load_plan_file
from moesurgery.stats.statistics_file import BlockStats, Stats
from moesurgery.surgery.choose_experts import (
    LayerKey,
    check_indices,
    expert_scores,
    not_run_note,
    per_block,
    protected_note,
    router_rows,
)
from moesurgery.surgery.planned_experts import planned_layers

Groups = list[list[int]] | dict[LayerKey, list[list[int]]] | None
Grouping = Literal["auto", "router-rows", "msmoe", "reap-centroid", "hc"]
By = Literal["frequency", "soft-frequency", "ean", "reap", "reap-sum"]
MergeWeights = Literal["equal", "router-norm", "usage", "reap"]
Align = Literal["none", "weights", "activations"]
Router = Literal["dominant", "mean", "lse"]

NAME = "merge-experts"
DEFAULT_GROUP: Grouping = "reap-centroid"  # where every expert was run; docs/surgery.md has the table
DEFAULT_BY: By = "reap-sum"
MEASURED_GROUPINGS: tuple[Mapping[str, str], ...] = (  # what `auto` measures
    {"group": "reap-centroid", "by": "reap-sum"},
    {"group": "reap-centroid", "by": "reap"},
    {"group": "msmoe"},
    {"group": "hc"},
)
LARGEST = 16  # members of a group around a REAP centroid: C in arXiv 2604.04356
EVERY_EXPERT = ("reap-centroid", "hc")  # these compare what experts say to all tokens
_CENTROIDS: Mapping[str | None, By] = {"msmoe": "frequency", "reap-centroid": "reap"}  # as published
_MEASURED_WEIGHTS: Mapping[str, MeasuredCriterion] = {"usage": "frequency", "reap": "reap"}


@dataclass(frozen=True)
class Merger:
    """Groups of experts by block, in the order of the new experts; the share of each member; how they are joined.

    `group` and `by` say how the groups were made, where they were not named.
    """

    groups: Mapping[str, list[list[int]]]
    shares: Mapping[str, list[list[float]]]
    group: Grouping | None
    by: By | None
    weights: MergeWeights | list[float]
    align: Align
    router: Router
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def dominant(self) -> dict[str, list[int]]:
        """The member of each group with the largest share, the first in the group where shares are equal."""
        return {
            where: [group[share.index(max(share))] for group, share in zip(groups, self.shares[where], strict=True)]
            for where, groups in self.groups.items()
        }

    @property
    def needs_fit(self) -> bool:
        """Whether the model has to run to find the order of neurons or router rows (`fitting.group_fit`)."""
        merges = any(len(group) > 1 for groups in self.groups.values() for group in groups)
        return merges and (self.align == "activations" or self.router == "lse")


def merger(
    plan: Plan,
    *,
    groups: Groups = None,
    to: int | None = None,
    group: Grouping | None = None,
    by: By | None = None,
    weights: MergeWeights | list[float] | None = None,
    align: Align | None = None,
    router: Router | None = None,
    stats: str | None = None,
    protect_super: bool = True,
    plan_file: str | None = None,
    fitted: bool = False,
) -> Merger:
    """Decide on a merge. Parameters are those of `merge-experts`; `fitted` says that there is, or will be, a fit.

    Raises RecipeError for parameters that contradict each other or want statistics, RefusedError where the model
    does not allow the merge.
    """
    anatomy = plan.anatomy
    anatomy.require_family(NAME)
    total = check_blocks(anatomy, NAME)
    if sum(choice is not None for choice in (groups, to, plan_file)) != 1:
        raise RecipeError(
            f"{NAME} needs one of groups, to and plan_file", f"as in `moesurgery {NAME} MODEL --to {total // 2}`"
        )
    planned: Mapping[str, LayerPlan] = {}
    warnings: tuple[str, ...] = ()
    if plan_file is not None:
        planned, warnings = planned_layers(plan, NAME, load_plan_file(plan_file), "groups")
        groups = {where: entry.groups or [] for where, entry in planned.items()}
    seen = _statistics(anatomy, stats)
    group, by = _way(groups is not None, group, by, seen)
    weights = weights or ("equal" if seen is None else "usage")
    protected: Mapping[str, list[int]] = {}
    if to is not None:
        if to > total:
            raise RefusedError(
                f"{NAME}: there are {total} experts in each layer, fewer than {to}", "choose a lower --to"
            )
        check_remaining(anatomy, NAME, to)
    _check_statistics(group, weights, seen, stats)
    if to is not None and group is not None:
        protected = _protected(seen) if protect_super else {}
        chosen = {
            b.where: _groups_of(plan, b, group, by, to, _seen(seen, b), protected.get(b.where, []))
            for b in anatomy.blocks
        }
    else:
        chosen = _named(anatomy, groups)
    check_remaining(anatomy, NAME, equal_count(NAME, chosen))
    check_groups(anatomy, NAME, {where: [min(group) for group in of_block] for where, of_block in chosen.items()})
    if router == "lse":
        _check_softmax(anatomy)
    shares = {}
    for block in anatomy.blocks:
        if block.where in planned and (of_plan := planned[block.where].shares) is not None:
            chosen[block.where], shares[block.where] = planned[block.where].groups or [], of_plan
            continue
        numbers = _numbers(plan, block, weights, _seen(seen, block))
        shares[block.where] = [_shares(block, members, numbers) for members in chosen[block.where]]
    return Merger(
        chosen,
        shares,
        group,
        by,
        weights,
        align or ("activations" if fitted else "none"),
        router or "dominant",
        _notes(anatomy, by, to, seen, protected),
        {} if seen is None else seen.about,
        warnings,
    )


def _way(named: bool, group: Grouping | None, by: By | None, seen: Stats | None) -> tuple[Grouping | None, By | None]:
    """Return how groups are made, and by what the experts are ranked that others join."""
    group = None if group == "auto" else group
    if named:
        if group is not None or by is not None:
            asked = f"--group {group}" if group else f"--by {by}"
            raise RecipeError(f"{NAME}: {asked} says how to make groups, and --groups names them", "leave it out")
        return None, None
    if group is None:
        group = "router-rows" if seen is None else "msmoe"
        if seen is not None and seen.every_expert:
            group, by = DEFAULT_GROUP, by or DEFAULT_BY
    if by is not None and group not in _CENTROIDS:
        raise RecipeError(
            f"{NAME}: --by {by} ranks experts that others join, which only {' and '.join(map(str, _CENTROIDS))} have",
            "add --group msmoe",
        )
    return group, by or _CENTROIDS.get(group)


def _statistics(anatomy: Anatomy, stats: str | None) -> Stats | None:
    if stats is None:
        return None
    from moesurgery.stats.statistics_file import stats_for

    statistics = stats_for(stats, anatomy, NAME)
    statistics.about = {"sha256": statistics.sha256, **statistics.about}
    return statistics


def _seen(seen: Stats | None, block: MoeBlock) -> BlockStats | None:
    """Return the statistics of a block; None without any, and for blocks that are not run."""
    return seen.with_prediction.get(block.where) if seen is not None else None


def _check_statistics(
    group: Grouping | None, weights: MergeWeights | list[float], seen: Stats | None, stats: str | None
) -> None:
    """Raise RecipeError where statistics are needed and missing, RefusedError where some of their sums are."""
    wanted = [f"--group {group}"] if group not in (None, "router-rows") else []
    wanted += [f"--weights {weights}"] if isinstance(weights, str) and weights in _MEASURED_WEIGHTS else []
    if wanted and seen is None:
        raise RecipeError(
            f"{NAME}: {wanted[0]} needs statistics",
            "give --text FILE to collect them, or --stats FILE from `moesurgery collect`",
        )
    if group in EVERY_EXPERT and seen is not None and not seen.every_expert:
        raise RefusedError(
            f"{NAME}: --group {group} compares what experts say to all tokens, which {stats} does not have",
            "collect again with `moesurgery collect --every-expert`, or use --group msmoe",
        )


def _check_softmax(anatomy: Anatomy) -> None:
    settings = anatomy.settings
    if settings.score not in ("softmax", "top-softmax") or settings.softcap:
        what = "caps its logits" if settings.softcap else f"scores experts by {settings.score}"
        raise RefusedError(
            f"{NAME}: the router of {settings.family.name} {what}, so the score of a group is no log-sum-exp of logits",
            "use --router dominant",
        )


def _protected(seen: Stats | None) -> Mapping[str, list[int]]:
    if seen is None:
        return {}
    from moesurgery.stats.criteria import super_experts

    return super_experts(seen)


def _named(anatomy: Anatomy, groups: Any) -> dict[str, list[list[int]]]:
    """Return the groups of each block, experts that no group names alone, in the order of their first members."""
    given = per_block(anatomy, NAME, groups)
    by_block = {}
    for block in anatomy.blocks:
        named = [group for group in given.get(block.where, []) if group]
        flat = [expert for group in named for expert in group]
        check_indices(NAME, block, flat)
        if anatomy.settings.groups is not None:
            size = block.experts // anatomy.settings.groups[0]
            for group in named:
                if len({expert // size for expert in group}) > 1:
                    raise RefusedError(
                        f"{NAME}: {block.where} is routed in groups of {size} experts, and {group} are of several",
                        "merge experts of one group",
                    )
        alone = [[expert] for expert in range(block.experts) if expert not in flat]
        by_block[block.where] = sorted([*named, *alone], key=min)
    return by_block


def _groups_of(
    plan: Plan,
    block: MoeBlock,
    group: Grouping,
    by: By | None,
    count: int,
    seen: BlockStats | None,
    alone: Sequence[int],
) -> list[list[int]]:
    """Divide the experts of a block into `count` groups, the one that stands for the others first in each.

    Blocks that were not run are divided by their router rows.
    """
    groups = plan.anatomy.settings.groups
    parts = groups[0] if groups else 1
    _check_room(block, group, count, parts, alone)
    if seen is None or group == "router-rows":
        standing = expert_scores(plan, block, "router-norm", 0)
        grouped = clusters(router_rows(plan, block), count, parts, alone)
        return [sorted(members, key=lambda e: (-standing[e], e)) for members in grouped]
    from moesurgery.stats import similarity
    from moesurgery.stats.criteria import scores

    standing = scores(seen, by or "frequency").tolist()
    if group == "hc":
        grouped = clusters(similarity.mean_outputs(seen), count, parts, alone)
        return [sorted(members, key=lambda e: (-standing[e], e)) for members in grouped]
    if group == "msmoe":
        return around_centroids(standing, similarity.router_cosine(seen), count, parts, alone)
    return around_centroids(standing, similarity.ream_likeness(seen), count, parts, alone, LARGEST)


def _check_room(block: MoeBlock, group: Grouping, count: int, parts: int, alone: Sequence[int]) -> None:
    """Refuse where experts that stay alone, or groups of a largest size, leave no room for the others."""
    size, wanted = block.experts // parts, count // parts
    for part in range(parts):
        kept = sum(e // size == part for e in alone)
        if kept < size and wanted <= kept:
            raise RefusedError(
                f"{NAME}: {block.where} leaves {kept} of {size} experts alone, for outputs far above all others',"
                f" and only {wanted} are to remain",
                "choose a higher --to, or let them be merged with --no-protect-super",
            )
        if group == "reap-centroid" and (wanted - kept) * LARGEST < size - kept:
            raise RefusedError(
                f"{NAME}: {wanted - kept} groups of at most {LARGEST} do not hold the {size - kept} experts of"
                f" {block.where}",
                "choose a higher --to, or --group msmoe",
            )


def _numbers(plan: Plan, block: MoeBlock, weights: MergeWeights | list[float], seen: BlockStats | None) -> list[float]:
    """Return a number for each expert, to which its share in a mean is proportional."""
    if weights == "equal":
        return [1.0] * block.experts
    if isinstance(weights, str):
        if weights not in _MEASURED_WEIGHTS or seen is None:
            return expert_scores(plan, block, "router-norm", 0)
        from moesurgery.stats.criteria import scores

        numbers: list[float] = scores(seen, _MEASURED_WEIGHTS[weights]).tolist()
        # Nothing is known of an expert that no token came to: it counts less than any other, but not nothing.
        least = min((number for number in numbers if number > 0), default=2.0) / 2
        return [number if number > 0 else least for number in numbers]
    if len(weights) != block.experts or min(weights) < 0:
        raise RefusedError(
            f"{NAME}: weights has {len(weights)} numbers, the least {min(weights, default=0):g};"
            f" {block.where} has {block.experts} experts",
            "give one number, not negative, for each expert",
        )
    return [float(weight) for weight in weights]


def _shares(block: MoeBlock, group: Sequence[int], numbers: Sequence[float]) -> list[float]:
    """Return the share of each member of a group; they add up to one."""
    if len(group) == 1:
        return [1.0]
    total = sum(numbers[expert] for expert in group)
    if total <= 0:
        raise RefusedError(
            f"{NAME}: the weights of experts {list(group)} of {block.where} are all zero", "use --weights equal"
        )
    return [numbers[expert] / total for expert in group]


def _notes(
    anatomy: Anatomy, by: By | None, to: int | None, seen: Stats | None, protected: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
    if seen is None:
        return ()
    notes = []
    if by is not None and to is not None and to < anatomy.experts:
        from moesurgery.stats.criteria import agreement

        share = agreement(seen, by, 1 - to / anatomy.experts)["overlap"]
        notes.append(f"two halves of the text agree on {100 * share:.0f} % of the experts that join others")
    if protected:
        notes.append(protected_note(protected))
    if others := [block.where for block in anatomy.blocks if block.where not in seen.with_prediction]:
        notes.append(not_run_note(others))
    return tuple(notes)
