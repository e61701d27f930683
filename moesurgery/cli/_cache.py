"""What calibrated commands leave beside their output, statistics and a repair, and use again when asked the same.

`OUT.stats.safetensors` and `OUT.refit` say what they were made of. The same command, or one that shares the
statistics, takes them as they are; where something differs, that is said and nothing is replaced without --force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.cli import _run_options
from moesurgery.cli._console import console
from moesurgery.cli.collect import SUFFIX, collect_stats
from moesurgery.errors import OutputError
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.tokens import Tokens

_SHOWN = ("apart", "assistant_only", "kind", "ridge", "sweeps", "text", "tokens", "window", "seed", "dtype")
_DIGESTS = {"fingerprint": "another model", "edited": "another edit", "token_ids": "other windows of the text"}


@dataclass(frozen=True)
class CalibrationCache:
    """The files beside one output, and what they are made of: a model and calibration windows."""

    output: Path
    plan: Plan
    windows: Tokens
    run: _run_options.Run
    text: Sequence[str]
    force: bool

    def statistics(self, top_k: Sequence[int], recon: Sequence[int], every_expert: bool) -> Path:
        """Return the statistics file, collected now or by an earlier run of the same.

        Raises OutputError where the file there is of something else.
        """
        from moesurgery.stats.statistics_file import load_stats

        target = self.output.with_name(f"{self.output.name}.stats{SUFFIX}")
        if target.exists() and not self.force:
            stats = load_stats(target)
            differs = about_differences(stats.about, self.about)
            differs += [f"no sums for top-k {k}" for k in top_k if k not in (stats.top_k, *stats.top_ks)]
            differs += [f"no choice of {r} experts by reconstruction" for r in recon if r not in stats.recon]
            differs += ["nothing of experts that were not chosen"] if every_expert and not stats.every_expert else []
            check_same(target, "statistics", differs, f"collect again, --stats {target} to take them as they are,")
            console.note(f"statistics of {self.windows.count:,} tokens in {target} are used again")
            return target
        scratch = target.with_name(target.name.removesuffix(SUFFIX) + ".scratch")
        stats = collect_stats(
            self.plan, self.windows, self.run, self.text, list(top_k), list(recon), every_expert, scratch
        )
        stats.save(target)
        console.note(f"statistics of {self.windows.count:,} tokens are in {target}")
        return target

    def repair(self, edited: Plan, options: RepairOptions) -> Path:
        """Return the folder of the repair of `edited`, fitted now or by an earlier run of the same.

        Raises OutputError where the repair there is of something else.
        """
        from moesurgery.fitting.layer_fit import fit_layers
        from moesurgery.stats.repair_file import INDEX, RepairWriter, open_repair

        folder = self.output.with_name(f"{self.output.name}.refit")
        about = self.about | {"edited": fingerprint(edited), **options.described()}
        if (folder / INDEX).exists() and not self.force:
            check_same(folder, "a repair", about_differences(open_repair(folder).about, about), "fit again,")
            console.note(f"the repair in {folder} is used again")
            return folder
        original, other = self.run.engine(self.plan), self.run.engine(edited)
        writer = RepairWriter(folder, force=self.force)
        with console.progress("refitting", 2 * original.work(self.windows), of_bytes=False) as watch:
            fit_layers(original, other, self.windows, options, writer.add, watch.progress)
        writer.close(about)
        console.note(f"the repair is in {folder}")
        return folder

    @cached_property
    def about(self) -> dict[str, Any]:
        """What decides all that is measured on the calibration windows."""
        return _run_options.calibrated_on(self.plan, self.windows, self.run, self.text)


def check_same(target: Path, what: str, differs: Sequence[str], force: str) -> None:
    """Raise OutputError where `target` holds `what` of something else. `force` is what --force would do."""
    if differs:
        raise OutputError(
            f"{target} holds {what} of something else: {'; '.join(differs)}", f"use --force to {force} or another -o"
        )


def about_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what was otherwise when `found` was made, in words; nothing where it is what `wanted` describes.

    Both are provenance as `measuring.calibrated_on` gives it. Keys that only `found` has do not count.
    """
    said = []
    for key in _SHOWN:
        if key in wanted and found.get(key) != wanted[key]:
            old, new = _said(found.get(key)), _said(wanted[key])
            said.append(f"{key} {old}, now {new}" if old != new else f"{key} {new}, which has changed since")
    for key, words in _DIGESTS.items():
        # Other text, another seed… have other windows too: that need not be said twice.
        if key in wanted and found.get(key) != wanted[key] and not (said and key == "token_ids"):
            said.append(words)
    return said


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(entry["file"] for entry in value)
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)
