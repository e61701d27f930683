"""What an operation needs of calibration text. An operation declares it where it is registered:

    @operation("drop-experts", text=TextNeeds(statistics=needed_statistics))

Every operation with a parameter `stats` can be calibrated (`fitting.calibrate`). What is not declared has the
defaults below: the sums that are always collected, no second run, no repair, the edit alone measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesurgery.plan.plan import Plan

Values = Mapping[str, Any]  # the parameters of a step by name


@dataclass(frozen=True)
class NeededStatistics:
    """What to collect beyond the sums that are always there; the parameters of `fitting.collector.collect`.

    Sums for routing to each number of experts in `top_k`; for each number in `keep` which experts reproduce a block
    best; with `every_expert` the outputs of all experts for all tokens; with `neurons` which neurons of each matter.
    """

    top_k: Sequence[int] = ()
    keep: Sequence[int] = ()
    every_expert: bool = False
    neurons: bool = False


@dataclass(frozen=True)
class Variant:
    """An edit to measure on held-out text. `called` stands for it in the message that it cannot be planned."""

    name: str
    operation: str
    parameters: Values
    called: str = ""


def _usual_statistics(plan: Plan, values: Values) -> NeededStatistics:
    return NeededStatistics()


@dataclass(frozen=True)
class TextNeeds:
    """What is done with text for one operation. The functions take the plan before the edit and the parameters.

    `statistics` returns what to collect for the parameter `stats`, or None where the parameters need none. It raises
    what would be refused whatever the text says: it is called before the model runs.
    `groups` returns the groups of experts (`surgery.group_experts.Merger`) for whose fit, the parameter `fit`, the
    model runs once more; None where the parameters need none.
    `variants` returns what to measure on held-out text, the edit itself among it; the edit alone by default.
    `candidates` returns the edits of which the one with the least held-out loss is made, empty where the parameters
    leave no choice. They are measured as they are, before a fit; the `variants` of the same operation are not then,
    unless the choice is fitted.
    `neurons` returns the FFNs (`surgery.choose_neurons.NeuronChoice`) whose neurons are chosen and fitted in a run, for
    the parameter `fit`; None where the parameters need none.
    `repair` is the kind of repair that is made unless another is asked for; "none" for none.
    `own_text` names parameters that take statistics of a text of their own, and may name that text instead.
    `named_by` is the parameter whose value names the edit in the table, `heading` what the table calls its rows.
    """

    statistics: Callable[[Plan, Values], NeededStatistics | None] = _usual_statistics
    groups: Callable[[Plan, Values], Any] | None = None
    variants: Callable[[Plan, Values], Sequence[Variant]] | None = None
    candidates: Callable[[Plan, Values], Sequence[Variant]] | None = None
    neurons: Callable[[Plan, Values], Any] | None = None
    repair: str = "none"
    own_text: Sequence[str] = ()
    named_by: str = ""
    heading: str = ""


USUAL_NEEDS = TextNeeds()
