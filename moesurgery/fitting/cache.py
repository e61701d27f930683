"""Cache of calibrated edits, in files beside their output: statistics, a group fit, a repair.

`OUT.stats.safetensors`, `OUT.fit.safetensors` and `OUT.refit` record their inputs and settings. An edit with the same
ones reuses the files; where some differ, OutputError names them, and nothing is replaced without `force`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.errors import OutputError
from moesurgery.fitting.calibration_run import CalibrationRun
from moesurgery.fitting.reporter import Reporter
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan
from moesurgery.recipe.text_needs import NeededStatistics

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import RepairOptions
    from moesurgery.forward.engine import Engine
    from moesurgery.stats.repair_file import RepairWriter
    from moesurgery.surgery.choose_neurons import NeuronChoice
    from moesurgery.surgery.group_experts import Merger

_SHOWN = (
    *("apart", "assistant_only", "kind", "ridge", "sweeps", "width", "shared", "dense", "by"),
    *("text", "tokens", "window", "seed", "dtype"),
)
_DIGESTS = {
    "fingerprint": "another model",
    "edited": "another edit",
    "token_ids": "other windows of the text",
    "statistics": "other statistics",
    "plan": "another plan",
}


@dataclass(frozen=True)
class CalibrationCache:
    """The files beside one output. Each method returns the path of one, computed now or by an earlier run.

    They raise OutputError where a file was made from other inputs or settings.
    """

    output: Path
    run: CalibrationRun
    force: bool
    reporter: Reporter

    def statistics(self, needed: NeededStatistics) -> str:
        """Return the path of the statistics file, which has at least the sums that are needed."""
        from moesurgery.stats.statistics_file import SUFFIX, load_stats

        target, tokens = self._beside(f".stats{SUFFIX}"), f"statistics of {self.run.windows.count:,} tokens"
        if target.exists() and not self.force:
            stats = load_stats(target)
            differs = about_differences(stats.about, self.run.about)
            differs += [f"no sums for top-k {k}" for k in needed.top_k if k not in (stats.top_k, *stats.top_ks)]
            differs += [f"no choice of {r} experts by reconstruction" for r in needed.keep if r not in stats.recon]
            if needed.every_expert and not stats.every_expert:
                differs.append("nothing of experts that were not chosen")
            if needed.neurons and not stats.neurons:
                differs.append("nothing of the neurons of experts")
            _check_same(target, "statistics", differs, f"collect again, --stats {target} to take them as they are,")
            self.reporter.note(f"{tokens} in {target} are used again")
        else:
            self.run.statistics(needed, self.reporter, self._beside(".stats.scratch")).save(target)
            self.reporter.note(f"{tokens} are in {target}")
        return str(target)

    def group_fits(self, merger: Merger) -> str:
        """Return the path of the file with neuron orders and router rows for each group of experts."""
        from moesurgery.fitting.group_fit import fit_groups
        from moesurgery.stats.group_fit_file import open_group_fits, save_group_fits
        from moesurgery.stats.statistics_file import SUFFIX

        target, what = self._beside(f".fit{SUFFIX}"), "how the experts of each group go together"
        if target.exists() and not self.force:
            fits = open_group_fits(target)
            differs = about_differences(fits.about, self.run.about) or fits.differences(merger)
            _check_same(target, "a fit", differs, "fit again,")
            self.reporter.note(f"{what} is used again from {target}")
        else:
            engine = self.run.settings.engine(self.run.plan, self.run.windows)
            with self.reporter.progress("fitting groups", engine.work(self.run.windows)) as progress:
                fitted = fit_groups(engine, self.run.windows, merger, progress)
            save_group_fits(target, fitted, merger, self.run.about)
            self.reporter.note(f"{what} is in {target}")
        return str(target)

    def neuron_fit(self, choice: NeuronChoice, ridge: float | None) -> str:
        """Return the folder with the neurons that each FFN keeps, and their down-projections."""
        from moesurgery.fitting.neuron_fit import fit_neurons

        def fit(writer: RepairWriter) -> None:
            engine = self.run.settings.engine(self.run.plan, self.run.windows)
            with self.reporter.progress("fitting neurons", engine.work(self.run.windows)) as progress:
                fit_neurons(engine, self.run.windows, choice, ridge, writer.add, progress)

        about = self.run.about | {**choice.described, "ridge": "auto" if ridge is None else ridge}
        return self._fitted(".fit", "fit", about, fit)

    def repair(self, edited: Plan, options: RepairOptions) -> str:
        """Return the folder of the repair of `edited`."""
        from moesurgery.fitting.layer_fit import fit_layers
        from moesurgery.forward.scratch import Scratch

        about = self.run.about | {"edited": fingerprint(edited), **options.described()}
        windows, devices = self.run.windows, {"devices": self.run.settings.devices}
        scratch = Scratch(self._beside(".refit.scratch"), about | devices, self.reporter.note)
        pair: list[Engine] = []

        def fit(writer: RepairWriter) -> None:
            scratch.entries = writer.layers
            with self.reporter.progress("refitting", 2 * pair[0].work(windows)) as progress:
                original, other = pair
                fit_layers(
                    original, other, windows, options, writer.add, progress, scratch=scratch, state=scratch.state
                )
            scratch.remove()

        def kept() -> list[Any]:
            pair.extend(self.run.settings.pair(self.run.plan, edited, windows))
            state = scratch.load(pair)
            return state.entries if state else []

        return self._fitted(".refit", "repair", about, fit, kept)

    def _fitted(
        self,
        ending: str,
        what: str,
        about: Mapping[str, Any],
        fit: Callable[[RepairWriter], None],
        kept: Callable[[], list[Any]] = list,
    ) -> str:
        """Return the folder that `fit` writes, now or in an earlier run with the same provenance `about`.

        `kept` returns the entries of an unfinished one that `fit` goes on with.
        """
        from moesurgery.checkpoint.filenames import REPAIR_INDEX
        from moesurgery.stats.repair_file import RepairWriter, open_repair

        folder = self._beside(ending)
        if (folder / REPAIR_INDEX).exists() and not self.force:
            _check_same(folder, f"a {what}", about_differences(open_repair(folder).about, about), "fit again,")
            self.reporter.note(f"the {what} in {folder} is used again")
        else:
            writer = RepairWriter(folder, force=self.force, kept=kept())
            fit(writer)
            writer.close(about)
            self.reporter.note(f"the {what} is in {folder}")
        return str(folder)

    def of_candidate(self, name: str) -> CalibrationCache:
        """Return the cache of one of several outcomes, in files OUT.NAME.…, of which all but one are deleted: so no
        message names them."""
        reporter = replace(self.reporter, note=lambda text: None)
        return replace(self, output=self.output.with_name(f"{self.output.name}.{name}"), reporter=reporter)

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)


def _check_same(target: Path, what: str, differs: Sequence[str], force: str) -> None:
    """Raise OutputError where `target` holds `what` made from other inputs. `force` describes what --force would do."""
    if differs:
        raise OutputError(
            f"{target} holds {what} of something else: {'; '.join(differs)}", f"use --force to {force} or another -o"
        )


def about_differences(made_of: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in words how a file's provenance differs from `wanted`; empty where it does not.

    Both are provenance as `CalibrationRun.about` gives it. Keys that only `made_of` has do not count.
    """
    differs = []
    for key in _SHOWN:
        if key in wanted and made_of.get(key) != wanted[key]:
            old, new = _in_words(made_of.get(key)), _in_words(wanted[key])
            differs.append(f"{key} {old}, now {new}" if old != new else f"{key} {new}, which has changed since")
    for key, words in _DIGESTS.items():
        # Other text, another seed… give other windows too: listed once only.
        if key in wanted and made_of.get(key) != wanted[key] and not (differs and key == "token_ids"):
            differs.append(words)
    return differs


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(entry["file"] for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)
