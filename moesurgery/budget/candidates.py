"""Which shapes to consider for a budget: those that fit and that no other fitting shape contains.

Numbers of experts are those that the router takes (`moe.expert_counts`), spread over what there is; for each, the
widest expert that fits, in steps that kernels like; top-k from half the trained one to as many as leave the active
parameters no more than they were.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from moesurgery.budget.costs import Cost, ShapeCosts
from moesurgery.budget.expert_matrices import takes_width
from moesurgery.budget.limits import Limits
from moesurgery.budget.shape import AS_STORED, FORMS, MixtureShape
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.client_limits import NUMBER_RULES, MoeShape, awkward_numbers
from moesurgery.moe.expert_counts import check_remaining

ShapeAxis = Literal["experts", "width", "top-k", "form", "merging", "tie"]
AXES: tuple[ShapeAxis, ...] = get_args(ShapeAxis)
USUAL_AXES = AXES[:-1]  # ties between blocks that were trained apart need training
MOST_COUNTS = 64  # numbers of experts that are looked at
SMALL_WIDTH = 256  # neurons: narrower experts go in steps of 8, wider ones of 16


@dataclass(frozen=True)
class Choices:
    """The numbers that each axis may take, each in ascending order."""

    experts: Sequence[int]
    width: Sequence[int]
    top_k: Sequence[int]
    form: Sequence[str] = (AS_STORED,)
    merging: bool = False  # whether experts may be merged instead of dropped
    tied: Sequence[bool] = (False,)
    for_client: tuple[str, MoeShape] | None = None  # a client, and what its kernels see of the model as it is

    def widths(self, form: str) -> list[int]:
        """Return the widths that experts may have in a form, and that a client's kernels take as well as their own."""
        quantised = None if form == AS_STORED else FORMS[form].quantised
        if quantised is None:
            return list(self.width)
        widths = [w for w in self.width if takes_width(quantised, w)]
        if self.for_client is None or quantised.form.tall == 1:
            return widths
        client, own = self.for_client
        own = replace(own, block=quantised.form.tall)
        before = set(awkward_numbers(client, own))
        return [w for w in widths if before.issuperset(awkward_numbers(client, replace(own, width=w)))]

    def smallest(self, costs: ShapeCosts) -> MixtureShape:
        """Return the shape with the least of everything."""
        least = [
            MixtureShape(self.experts[0], w[0], self.top_k[0], form, tied=tied)
            for form, tied in self.stored()
            if (w := self.widths(form))
        ]
        return min(least, key=costs.weight_bytes)

    def stored(self) -> Iterator[tuple[str, bool]]:
        """Yield forms, and whether blocks are tied: quantised ones are not, as their loading was not tried."""
        for form, tied in itertools.product(self.form, self.tied):
            if not tied or form == AS_STORED or FORMS[form].quantised is None:
                yield form, tied


def choices(
    anatomy: Anatomy, shape: MixtureShape, axes: Collection[str], forms: Sequence[str], together: int
) -> Choices:
    """Return what may be chosen on each of `axes`, from a model of `shape`; the others stay as they are.

    `together` neurons share a scale or a word, and so stay or go in whole blocks of as many.
    """
    top_ks = [shape.top_k]
    if "top-k" in axes and anatomy.settings.family.routing.fixed_top_k is None:
        top_ks = _top_ks(shape.top_k, shape.experts)
    experts = [shape.experts]
    if "experts" in axes:
        experts = [e for e in range(min(top_ks), shape.experts + 1) if _possible(anatomy, e)]
        step = -(-len(experts) // MOST_COUNTS)
        experts = sorted(experts[::-1][::step])
    width = [shape.width]
    if "width" in axes:
        step = math.lcm(8 if shape.width < SMALL_WIDTH else 16, together)
        least = -(-shape.width // (4 * step)) * step
        width = [*range(least, shape.width, step), shape.width]
    merging = "merging" in axes and "merge-experts" not in anatomy.settings.family.refuses
    form = (AS_STORED, *forms) if "form" in axes else (AS_STORED,)
    return Choices(experts, width, top_ks, form, merging, (False, True) if "tie" in axes else (False,))


def taken_well(choice: Choices, own: MoeShape, client: str) -> Choices:
    """Return the numbers of experts and widths that a client's kernels take as well as those of the model as it is.

    Raises RecipeError for a client of which nothing is known.
    """
    if client not in (known := {rule.client for rule in NUMBER_RULES}):
        raise RecipeError(f"--engine is {client!r}", f"known: {', '.join(sorted(known))}")
    before = set(awkward_numbers(client, own))
    experts = [e for e in choice.experts if before.issuperset(awkward_numbers(client, replace(own, experts=e)))]
    widths = [w for w in choice.width if before.issuperset(awkward_numbers(client, replace(own, width=w)))]
    return replace(choice, experts=experts, width=widths, for_client=(client, own))


def _top_ks(trained: int, experts: int) -> list[int]:
    """Return half the trained top-k to twice of it, in at most nine steps."""
    low, high = max(1, trained // 2), min(experts, 2 * trained)
    step = max(1, trained // 4)
    return sorted({trained, *range(trained, low - 1, -step), *range(trained, high + 1, step)})


def _possible(anatomy: Anatomy, experts: int) -> bool:
    """Whether the router's groups divide into so many experts; top-k is looked at apart."""
    groups = anatomy.settings.groups
    if groups is None:
        return True
    try:
        check_remaining(anatomy, "fit", experts)
    except RefusedError:
        return False
    return True


def fitting_shapes(
    costs: ShapeCosts, choice: Choices, limits: Limits, most_active: int
) -> list[tuple[MixtureShape, Cost]]:
    """Return the shapes within the limits that no other of them contains, the most experts first.

    None has more active parameters than `most_active`.
    """

    def allowed(shape: MixtureShape) -> bool:
        cost = costs.of(shape)
        return limits.allow(cost) and cost.active <= most_active

    found: list[MixtureShape] = []
    for form, tied in choice.stored():
        for top_k in choice.top_k:
            width = choice.widths(form)
            widest = len(width)
            for experts in (e for e in choice.experts if e >= top_k):
                # The more experts, the narrower: the widest that fits is never wider than with fewer experts.
                of = partial(MixtureShape, experts, top_k=top_k, form=form, tied=tied)
                widest = _largest(lambda i: allowed(of(width=width[i])), widest)  # noqa: B023
                if widest == 0:
                    break
                found.append(of(width=width[widest - 1]))
    maximal = [s for s in found if not any(s != other and s.within(other, costs.shape.top_k) for other in found)]
    return [(s, costs.of(s)) for s in sorted(maximal, key=lambda s: (-s.experts, -s.width, -s.top_k))]


def _largest(holds: Callable[[int], bool], end: int) -> int:
    """Return how many of the numbers from 0 to `end` hold, those that hold being the first ones."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(middle) else (low, middle)
    return low
