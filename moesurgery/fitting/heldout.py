"""The loss of models on held-out text, written or not: each measured once, with intervals against the original."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesurgery.fitting.reporter import Reporter
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    from moesurgery.forward.loss import Loss
    from moesurgery.forward.text_windows import Domain


ORIGINAL = "original"


@dataclass(frozen=True)
class HeldOut:
    """Nats per predicted token on held-out text, by name: "original", the edit, what it was compared with, repaired.

    `intervals` has for all but the original the 95 % bootstrap interval, over windows, of the increase in loss over
    the original. `domains` has the loss on each text by name of the edit, `chosen` the name of the edit with the least
    loss, where there was a choice.
    """

    tokens: int
    nats: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    domains: Mapping[str, Mapping[str, float]]
    chosen: str | None = None


@dataclass
class HeldOutLosses:
    """The held-out loss of plans by name, each measured once; none of them is written."""

    settings: RunSettings
    domains: list[Domain]
    reporter: Reporter
    found: dict[str, Loss] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    by_text: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, plans: Mapping[str, Plan]) -> None:
        """Measure the plans that were not measured yet, side by side. Criteria may choose the same experts: that is
        measured once."""
        from moesurgery.forward.loss import losses_of_several, mean_loss
        from moesurgery.forward.tokens import joined

        new: dict[str, Plan] = {}
        measured: dict[str, str] = {}  # for each name that of the plan that is measured for it
        for name, plan in plans.items():
            if name in self.found:
                continue
            same = next((n for n, p in self.plans.items() if _computes_the_same(p, plan)), None)
            self.plans[name] = plan
            measured[name] = same or name
            if same is None:
                new[name] = plan
        if new:
            windows = joined([domain.as_tokens for domain in self.domains])
            groups = self.settings.edits(list(new.values()), windows)
            with self.reporter.progress("measuring", sum(engine.work(windows) for engine in groups[0])) as progress:
                by_name = dict(zip(new, losses_of_several(groups, self.domains, progress), strict=True))
            del groups
            gc.collect()  # an engine and its hooks hold each other, and with them files and memory of devices
        for name, same in measured.items():
            if name in new:
                self.found[name] = mean_loss(by_name[name])
                self.by_text[name] = {loss.domain: loss.nats for loss in by_name[name]}
            else:  # of a plan that was measured before, or comes before
                self.found[name], self.by_text[name] = self.found[same], self.by_text[same]

    @property
    def tokens(self) -> int:
        return sum(domain.tokens for domain in self.domains)

    def increase(self, name: str) -> float:
        """Return by how much the loss is above the original's, in nats per token."""
        return self.found[name].nats - self.found[ORIGINAL].nats

    def cheapest(self, names: Iterable[str]) -> str:
        return min(names, key=lambda name: self.found[name].nats)

    def near(self, names: Iterable[str], best: str) -> list[str]:
        """Return the names whose loss cannot be told from that of `best`, by the interval of their difference."""
        from moesurgery.forward.bootstrap import interval

        least, tokens = self.found[best].by_window, self.found[best].window_tokens
        return [name for name in names if name == best or interval(self.found[name].by_window - least, tokens)[0] <= 0]

    def outcome(self, chosen: str | None) -> HeldOut:
        from moesurgery.forward.bootstrap import interval

        by_window = {name: loss.by_window for name, loss in self.found.items()}
        base, tokens = by_window[ORIGINAL], self.found[ORIGINAL].window_tokens
        return HeldOut(
            self.found[ORIGINAL].tokens,
            {name: loss.nats for name, loss in self.found.items()},
            {name: interval(values - base, tokens) for name, values in by_window.items() if name != ORIGINAL},
            dict(self.by_text),
            chosen,
        )


def _computes_the_same(first: Plan, second: Plan) -> bool:
    """Whether two plans would write the same tensors and config."""
    return first.config == second.config and first.tensors == second.tensors
