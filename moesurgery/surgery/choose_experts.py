"""Which experts: by number, the same in all layers or per layer, or by a criterion.

A criterion gives every expert of a block a score; the lowest are given up first. Three need no data; the others are
computed from statistics of a run over text (`stats.criteria`), two of them for sets of experts (`stats.least_set`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.evaluate import finite_values
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.moe.neurons import tensors_by_expert
from moesurgery.plan.dequantise import plain_values
from moesurgery.plan.plan import Plan
from moesurgery.stats.criteria import MeasuredCriterion
from moesurgery.stats.imatrix_file import IMATRIX_CRITERIA, is_imatrix

if TYPE_CHECKING:
    import numpy as np

FreeCriterion = Literal["router-norm", "aimer", "random"]
Criterion = Literal["auto", FreeCriterion, MeasuredCriterion]
# What `auto` tries on held-out text, and what is taken where there is none: docs/measure-tables.md has them.
CANDIDATES: tuple[MeasuredCriterion, ...] = ("gram", "hope", "reap", "reap-sum")
FREE_DEFAULT: FreeCriterion = "router-norm"  # where there are no statistics
COARSE = 16  # experts: with at most so many `reap-sum` costs least, with more `hope`
LayerKey = int | str  # the number of a layer, or its full name where two have one number


def default_criterion(experts: int, stats: str) -> MeasuredCriterion:
    """Return the criterion for layers of so many experts where there are statistics and nothing to measure on."""
    if is_imatrix(stats):
        return IMATRIX_CRITERIA[0]
    return "reap-sum" if experts <= COARSE else "hope"


def per_block(anatomy: Anatomy, operation: str, value: Any) -> dict[str, Any]:
    """Return `value` for every block by name: itself, or where it is a mapping, the entry of the block's layer.

    Blocks that a mapping leaves out have no entry. Raises RefusedError for a layer that has no experts or is not there.
    """
    if not isinstance(value, Mapping):
        return {block.where: value for block in anatomy.blocks}
    keys: dict[str, str] = {}
    for block in reversed(anatomy.blocks):  # main layers come first, and so win a number
        keys[str(block.layer)] = keys[block.where] = block.where
    by_block = {}
    for key, entry in value.items():
        if str(key) not in keys:
            layers = ", ".join(str(b.layer) for b in anatomy.main_blocks)
            raise RefusedError(f"{operation}: there is no MoE layer {key!r}", f"the MoE layers are {layers}")
        by_block[keys[str(key)]] = entry
    return by_block


def share_of(text: str, total: int, name: str = "keep", what: str = "experts") -> int:
    """Return how many of `total` a percentage is, `25%`: rounded, at least one. Raises RecipeError.

    `name` is the parameter, `what` is counted.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    if matched is None or not 0 < float(matched[1]) <= 100:
        raise RecipeError(
            f"{name} is {text!r}, expected how many {what}, a share of them" + (", or which" if name == "keep" else ""),
            "as 6, as 25%, or as 0-6,9" if name == "keep" else "as 512, or as 75%",
        )
    return max(1, math.floor(total * float(matched[1]) / 100 + 0.5))


def check_indices(operation: str, block: MoeBlock, indices: Sequence[int]) -> None:
    """Raise RefusedError for an expert that is not there or is named twice."""
    for index in indices:
        if not 0 <= index < block.experts:
            raise RefusedError(
                f"{operation}: {block.where} has no expert {index}", f"its experts are 0 to {block.experts - 1}"
            )
    if len(set(indices)) != len(indices):
        raise RefusedError(f"{operation}: an expert of {block.where} is named twice: {sorted(indices)}")


def router_rows(plan: Plan, block: MoeBlock) -> np.ndarray:
    """Return the router's rows [E, H] of a block. Raises RefusedError where its router is no single matrix of finite
    numbers.
    """
    if block.router is None:
        raise RefusedError(f"{block.where}: its router is not one matrix", "name the experts by number")
    rows = finite_values(block.router.name, plain_values(plan, block.router.name))
    return (rows.T if block.router.axis == 1 else rows)[: block.experts]


def _router_norm(plan: Plan, block: MoeBlock, seed: int) -> np.ndarray:
    """The length of each expert's router row. A softmax ignores what all rows share, so their mean is left out."""
    import numpy as np

    rows = router_rows(plan, block)
    if plan.anatomy.settings.score in ("softmax", "top-softmax"):
        rows = rows - rows.mean(axis=0)
    return np.asarray(np.linalg.norm(rows, axis=1))


def _random(plan: Plan, block: MoeBlock, seed: int) -> np.ndarray:
    import numpy as np

    digest = hashlib.sha256(f"{seed}/{block.where}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(block.experts)


def _aimer(plan: Plan, block: MoeBlock, seed: int) -> np.ndarray:
    """The mean absolute weight of each expert over the root mean square of its weights, negated (arXiv 2603.18492).

    It is lowest where few weights are large: such experts are the more distinct, and worth keeping.
    """
    import numpy as np

    by_expert = []
    for tensors in tensors_by_expert(block, plan.tensors):
        absolute = squares = count = 0.0
        for member, expr in tensors:
            if member.stem.main and not member.stem.bias:
                values = finite_values(member.name, expr)
                absolute += float(np.abs(values).sum(dtype=np.float64))
                squares += float(np.square(values).sum(dtype=np.float64))
                count += values.size
        by_expert.append(-absolute / math.sqrt(count * squares) if squares else 0.0)
    return np.array(by_expert)


_FREE: Mapping[FreeCriterion, Callable[[Plan, MoeBlock, int], np.ndarray]] = {
    "router-norm": _router_norm,
    "aimer": _aimer,
    "random": _random,
}


def expert_scores(plan: Plan, block: MoeBlock, by: FreeCriterion, seed: int) -> list[float]:
    """Return a score for each expert of `block` by a criterion that needs no data; higher is more worth keeping."""
    return [float(score) for score in _FREE[by](plan, block, seed)]


@dataclass(frozen=True)
class Ranking:
    """The score of every expert, by block, and what is to be known about it. Protected experts are never given up.

    Where `pairs` has a matrix for a block, the set with the least sum over pairs is given up, not the lowest scores.
    """

    scores: Mapping[str, list[float]]
    pairs: Mapping[str, np.ndarray] = field(default_factory=dict)
    protected: Mapping[str, list[int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)

    def lowest(self, anatomy: Anatomy, where: str, count: int) -> list[int]:
        guarded = self.protected.get(where, [])
        if where in self.pairs:
            from moesurgery.stats.least_set import least_set

            groups = anatomy.settings.groups
            return least_set(self.pairs[where], count, groups[0] if groups else 1, guarded)
        return lowest(
            anatomy, [math.inf if e in guarded else score for e, score in enumerate(self.scores[where])], count
        )


def ranking(
    plan: Plan,
    operation: str,
    by: FreeCriterion | MeasuredCriterion,
    seed: int,
    stats: str | None,
    count: int,
    protect_super: bool,
) -> Ranking:
    """Rank the experts of every block by `by`, of which `count` are to be given up.

    Blocks that were not run, as prediction layers of other forms, are ranked by their routers. Raises RecipeError where
    statistics are needed and missing, RefusedError where they are of another model.
    """
    blocks = plan.anatomy.blocks
    if by == "router-norm" or by == "aimer" or by == "random":
        return Ranking({b.where: expert_scores(plan, b, by, seed) for b in blocks})
    if stats is None:
        raise RecipeError(
            f"{operation}: --by {by} needs statistics",
            "give --text FILE to collect them, or --stats FILE from `moesurgery collect`",
        )
    if is_imatrix(stats):
        return _ranking_by_imatrix(plan, by, stats)
    from moesurgery.stats.criteria import PAIR_SUMS, agreement, pairs, scores, super_experts
    from moesurgery.stats.statistics_file import stats_for

    statistics = stats_for(stats, plan.anatomy, operation)
    kept = plan.anatomy.experts - count
    if by == "recon" and kept not in statistics.recon:
        raise RefusedError(
            f"{operation}: {stats} has no choice of {kept} experts by reconstruction",
            f"collect again with `moesurgery collect --recon {kept}`",
        )
    seen = statistics.with_prediction
    ranked = {
        b.where: scores(seen[b.where], by, kept).tolist()
        if b.where in seen
        else expert_scores(plan, b, "router-norm", seed)
        for b in blocks
    }
    notes = []
    if by != "recon" and count:
        share = agreement(statistics, by, count / plan.anatomy.experts)["overlap"]
        notes.append(f"two halves of the text agree on {100 * share:.0f} % of what is given up by {by}")
    protected = super_experts(statistics) if protect_super else {}
    if protected:
        notes.append(protected_note(protected))
    if others := [where for where in ranked if where not in seen]:
        notes.append(not_run_note(others))
    matrices = {where: pairs(block, by) for where, block in seen.items()} if by in PAIR_SUMS else {}
    return Ranking(ranked, matrices, protected, tuple(notes), {"sha256": statistics.sha256, **statistics.about})


def _ranking_by_imatrix(plan: Plan, by: MeasuredCriterion, path: str) -> Ranking:
    """Rank the experts of every block by what llama-imatrix has seen of them."""
    from moesurgery.stats.imatrix_file import imatrix_scores, load_imatrix, weight_name
    from moesurgery.stats.statistics_file import digest

    imatrix = load_imatrix(path)
    not_run = [b for b in plan.anatomy.blocks if b.mtp and weight_name(b) not in imatrix.sums]
    ranked = {
        block.where: expert_scores(plan, block, "router-norm", 0)
        if block in not_run
        else imatrix_scores(imatrix, plan, block, by)
        for block in plan.anatomy.blocks
    }
    seen = ", ".join(imatrix.datasets[:3]) or "a text that it does not name"
    note = f"by an imatrix of {seen}: the sizes of experts' outputs are estimates, without the router's weights"
    notes = (note, not_run_note([block.where for block in not_run])) if not_run else (note,)
    return Ranking(ranked, notes=notes, statistics={"sha256": digest(path), "imatrix": list(imatrix.datasets)})


def with_protection(ranked: Ranking, anatomy: Anatomy, operation: str, stats: str, share: float, count: int) -> Ranking:
    """Return a ranking that also protects the experts that matter most on a text of its own.

    Those are in each block, and in each of its router's groups, the `share` with the most reap-sum by the statistics
    `stats` of that text, at least one. Raises RefusedError where they are more than remain when `count` go.
    """
    from moesurgery.stats.criteria import scores
    from moesurgery.stats.statistics_file import stats_for

    statistics = stats_for(stats, anatomy, operation)
    groups = anatomy.settings.groups
    parts = groups[0] if groups else 1
    size = anatomy.experts // parts
    least = max(1, round(share * size))
    if least > size - count // parts:
        raise RefusedError(
            f"{operation}: {least} of {size} experts are protected by {stats}, and only {size - count // parts} remain",
            "choose a smaller --protect-share, or keep more experts",
        )
    protected = {where: list(experts) for where, experts in ranked.protected.items()}
    for where, block in statistics.with_prediction.items():
        standing = scores(block, "reap-sum")
        for part in range(parts):
            members = range(part * size, (part + 1) * size)
            best = sorted(members, key=lambda e: (-standing[e], e))[:least]
            protected[where] = sorted({*protected.get(where, []), *best})
    note = f"the {parts * least} experts of each layer that say most on the text of {stats} stay"
    return replace(ranked, protected=protected, notes=(*ranked.notes, note))


def protected_note(protected: Mapping[str, Sequence[int]]) -> str:
    """Return the note on experts, by block, that no choice may drop."""
    named = ", ".join(f"{where}: {', '.join(map(str, e))}" for where, e in protected.items())
    return f"protected, for outputs far above all others' ({named}); --no-protect-super lets them go"


def not_run_note(blocks: Sequence[str]) -> str:
    """Return the note on blocks that the statistics did not see."""
    return f"{', '.join(blocks)}: not run, so experts were chosen by their router rows"


def lowest(anatomy: Anatomy, scores: Sequence[float], count: int) -> list[int]:
    """Return the `count` experts of the lowest score, as many from each of the router's groups, in ascending order."""
    groups = anatomy.settings.groups
    parts = groups[0] if groups else 1
    size = len(scores) // parts
    experts: list[int] = []
    for part in range(parts):
        members = range(part * size, (part + 1) * size)
        experts += sorted(members, key=lambda e: (scores[e], e))[: count // parts]
    return sorted(experts)


def kept_by_router_rows(plan: Plan, block: MoeBlock, count: int) -> list[int]:
    """Return the experts of a block that stay, ascending, where `count` go by the norms of their router rows."""
    gone = lowest(plan.anatomy, expert_scores(plan, block, "router-norm", 0), count)
    return [expert for expert in range(block.experts) if expert not in gone]
