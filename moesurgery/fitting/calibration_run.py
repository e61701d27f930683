"""One model and its windows of calibration text: collection of statistics, and their provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RecipeError
from moesurgery.fitting.reporter import Reporter
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward.text_documents import Text, text_of
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.scheduler import MakeExecutor

if TYPE_CHECKING:
    from moesurgery.fitting.imatrix_sums import ImatrixSums
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import Tokens
    from moesurgery.stats.statistics_file import Stats


@dataclass(frozen=True)
class CalibrationRun:
    """A plan, calibration windows of some text files, and the windows of each file that were kept out of them."""

    settings: RunSettings
    plan: Plan
    texts: tuple[Text, ...]
    windows: Tokens
    held_out: list[Domain]

    @cached_property
    def about(self) -> dict[str, Any]:
        """Everything that the measurements on the windows depend on, for provenance."""
        settings = self.settings
        return {
            "model": self.plan.checkpoint.source.identity,
            "fingerprint": fingerprint(self.plan),
            "text": [_described(text) for text in self.texts],
            "tokens": self.windows.count,
            "window": settings.window,
            "seed": settings.seed,
            "dtype": settings.computed_in,
            "token_ids": self.windows.digest,
            **({"apart": True} if settings.apart else {}),
            **({"assistant_only": True} if settings.assistant_only else {}),
        }

    def statistics_of_workers(self, needed: NeededStatistics, reporter: Reporter, make_executor: MakeExecutor) -> Stats:
        """Return the statistics of the model's experts, collected by the workers of an executor."""
        from moesurgery.fitting.collect_parts import collect_in_parts

        stats = collect_in_parts(make_executor, self.plan, self.settings, self.windows, needed, reporter)
        stats.about |= self.about
        return stats

    def statistics(
        self,
        needed: NeededStatistics,
        reporter: Reporter,
        scratch: Path | None = None,
        imatrix: ImatrixSums | None = None,
    ) -> Stats:
        """Run the model once, on all devices, and return the statistics of its experts.

        With `scratch`, state is saved in that folder between layers, and the same call resumes from it; not with
        `imatrix`, to which what llama-imatrix would see is added.
        """
        from moesurgery.fitting.collector import collect_over
        from moesurgery.forward.scratch import Scratch, each_part

        engines = self.settings.engines(self.plan, self.windows)
        kept: list[Scratch | None] = [None] * len(engines)
        if scratch is not None:
            about = self.about | {
                "top_k": list(needed.top_k),
                "recon": list(needed.keep),
                "every_expert": needed.every_expert,
                "neurons": needed.neurons,
                "devices": self.settings.devices,
            }
            kept = [Scratch(part, about, reporter.note) for part in each_part(scratch, len(engines))]
        with reporter.through_layers("collecting", self.windows.count, len(engines[0].layers)) as progress:
            stats = collect_over(
                engines,
                self.windows,
                needed.top_k,
                needed.keep,
                progress,
                every_expert=needed.every_expert,
                neurons=needed.neurons,
                scratch=kept,
                imatrix=imatrix,
            )
        stats.about |= self.about
        for part in kept:
            if part is not None:
                part.remove()
        if scratch is not None and scratch.is_dir() and not any(scratch.iterdir()):
            scratch.rmdir()
        return stats


def _described(text: Text) -> dict[str, Any]:
    """Return name and SHA-256 of a text file, and its weight where that is not 1."""
    return {"file": text.name, "sha256": text.digest, **({"weight": text.weight} if text.weight != 1 else {})}


def read_calibration(
    settings: RunSettings, plan: Plan, texts: Sequence[str | Path], tokens: int, hold_out: int = 0
) -> CalibrationRun:
    """Read `tokens` in windows of all files, sampled by the seed and mixed, so that every part of them is balanced.

    Of each file, FILE or FILE=WEIGHT, the number of windows is in proportion to its weight. With `hold_out`, one
    window in that many of each file is held out. Raises RecipeError where that leaves none.
    """
    from moesurgery.forward.tokens import mixed

    files, limits = _shares(settings, texts, tokens, 2 if hold_out else 1)
    domains = [
        replace(settings, limit=limit).domain(plan.checkpoint, file) for file, limit in zip(files, limits, strict=True)
    ]
    held_out = []
    if hold_out:
        parts = [domain.each(hold_out) for domain in domains]
        held_out = [out for _, out in parts]
        domains = [rest for rest, _ in parts if len(rest.windows)]
    if not domains:
        raise RecipeError(
            f"{texts[0]} has one window of {settings.window} tokens, and one is kept out to measure the outcome on",
            "give more text, a smaller --window, or --no-heldout",
        )
    return CalibrationRun(settings, plan, tuple(files), mixed([d.as_tokens for d in domains]), held_out)


def windows_left(settings: RunSettings, plan: Plan, texts: Sequence[str | Path], tokens: int) -> list[Domain]:
    """Return as many windows again of each file as `read_calibration` reads to hold some out, or what there is: others,
    and none of a file that has no more."""
    return [
        replace(settings, limit=limit, skip=limit).domain(plan.checkpoint, file)
        for file, limit in zip(*_shares(settings, texts, tokens, 2), strict=True)
    ]


def _shares(
    settings: RunSettings, texts: Sequence[str | Path], tokens: int, least: int
) -> tuple[list[Text], list[int]]:
    """Return the text files, and how many windows of each are read."""
    files = [text_of(str(text)) for text in texts]
    whole = sum(file.weight for file in files)
    return files, [max(least, int(tokens * file.weight / whole / settings.window)) for file in files]
