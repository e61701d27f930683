"""One model and the windows of calibration text that it is run over: what is collected, and what decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RecipeError
from moesurgery.fitting.reporter import Reporter
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan
from moesurgery.recipe.text_needs import NeededStatistics

if TYPE_CHECKING:
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import Tokens
    from moesurgery.stats.statistics_file import Stats


@dataclass(frozen=True)
class CalibrationRun:
    """A plan, calibration windows of some text files, and the windows of each file that were kept out of them."""

    settings: RunSettings
    plan: Plan
    texts: tuple[Path, ...]
    windows: Tokens
    held_out: list[Domain]

    @cached_property
    def about(self) -> dict[str, Any]:
        """All that decides what is measured on the windows, for provenance."""
        from moesurgery.stats.statistics_file import digest

        return {
            "model": self.plan.checkpoint.source.identity,
            "fingerprint": fingerprint(self.plan),
            "text": [{"file": path.name, "sha256": digest(path)} for path in self.texts],
            "tokens": self.windows.count,
            "window": self.settings.window,
            "seed": self.settings.seed,
            "dtype": self.settings.dtype,
            "token_ids": self.windows.digest,
        }

    def statistics(self, needed: NeededStatistics, reporter: Reporter) -> Stats:
        """Run the model once and return the statistics of its experts."""
        from moesurgery.fitting.collector import collect

        engine = self.settings.engine(self.plan)
        with reporter.progress("collecting", engine.work(self.windows)) as progress:
            stats = collect(engine, self.windows, needed.top_k, needed.keep, progress, every_expert=needed.every_expert)
        stats.about |= self.about
        return stats


def read_calibration(
    settings: RunSettings, plan: Plan, texts: Sequence[str | Path], tokens: int, hold_out: int = 0
) -> CalibrationRun:
    """Read `tokens` in windows of all files, drawn by the seed and mixed, so that every part of them is balanced.

    With `hold_out`, one window in so many of each file is kept out. Raises RecipeError where that leaves none.
    """
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import mixed

    limit = max(2 if hold_out else 1, tokens // settings.window // len(texts))
    domains = replace(settings, limit=limit).domains(plan.checkpoint, texts)
    held_out = []
    if hold_out:
        cuts = [len(d.windows) - max(1, len(d.windows) // hold_out) for d in domains]
        held_out = [Domain(d.name, d.windows[cut:]) for d, cut in zip(domains, cuts, strict=True)]
        domains = [Domain(d.name, d.windows[:cut]) for d, cut in zip(domains, cuts, strict=True) if cut]
    if not domains:
        raise RecipeError(
            f"{texts[0]} has one window of {settings.window} tokens, and one is kept out to measure the outcome on",
            "give more text, a smaller --window, or --no-heldout",
        )
    return CalibrationRun(settings, plan, tuple(map(Path, texts)), mixed([d.windows for d in domains]), held_out)
