"""Statistics collected by many processes, each of which runs the whole model on some of the windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.fitting.collector import added, collect
from moesurgery.fitting.reporter import Reporter
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.plan.plan import Plan
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.scheduler import MakeExecutor, results_of

if TYPE_CHECKING:
    from moesurgery.forward.tokens import Tokens
    from moesurgery.stats.statistics_file import Stats

_WINDOWS = 32  # of a part: the same parts whatever the number of workers, so that the sums are the same bits


def collect_in_parts(
    make_executor: MakeExecutor,
    plan: Plan,
    settings: RunSettings,
    windows: Tokens,
    needed: NeededStatistics,
    reporter: Reporter,
) -> Stats:
    """Return the statistics of all windows, collected in parts by the workers of an executor.

    The sums are the same bits for any number of workers, whichever of them die, and equal those of one process up to
    float32 rounding: other windows are in a batch. Raises OutputError where workers die and nothing gets done any more,
    RefusedError for `needed.neurons`, which need all tokens at once.
    """
    if needed.neurons:
        raise RefusedError("collect: --neurons needs all tokens of an expert in one process", "leave out --scheduler")
    from moesurgery.forward.tokens import shared_out

    parts = shared_out(windows, max(1, len(windows) // _WINDOWS))
    tasks = {number: (plan, settings, part, needed, number == 0) for number, part in enumerate(parts)}
    collected: dict[int, Stats] = {}
    with reporter.progress("collecting", windows.count) as progress:
        for number, stats in results_of(make_executor, _collect_part, tasks, "collecting statistics"):
            collected[number] = stats
            progress(parts[number].count)
    return added([collected[number] for number in range(len(parts))])


def _collect_part(plan: Plan, settings: RunSettings, windows: Tokens, needed: NeededStatistics, first: bool) -> Stats:
    keep = needed.keep if first else ()  # decided on the first batch, as in one process
    return collect(settings.engine(plan, windows), windows, needed.top_k, keep, every_expert=needed.every_expert)
