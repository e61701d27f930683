"""How near `moesurgery fit` comes to the best of a grid of experts x width x top-k: the table of docs/fit.md.

    python benchmarks/fit_grid.py MODEL --text CALIBRATION… --heldout OTHER… [--share 0.75 0.5] [--jobs 4] [--folder F]

For each share of the model's bytes, `fit` searches on --text alone. Then every shape of a grid is edited, repaired on
the same text and measured on the first `--limit` windows of each held-out file, which the search has not seen: all
shapes that fit and that no other contains, and for each eighth of the experts and each top-k the widest experts that
fit. Prints the loss above the original's in nats per token, as edited and repaired, the best first, and where `fit`'s
choice stands.

With --folder, statistics, searches, repairs and outcomes are kept there, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from moesurgery import open_checkpoint, plan_of
from moesurgery.budget.budget import Budget, budget_of
from moesurgery.budget.damage import PRICED, DamagePrediction, damage_curves
from moesurgery.budget.limits import Limits
from moesurgery.budget.shape import MixtureShape
from moesurgery.fitting.cache import CalibrationCache
from moesurgery.fitting.calibrate import HELD_OUT_SHARE, CalibrationOptions
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.fit_search import SearchOptions, best_fit
from moesurgery.fitting.heldout import HeldOutLosses
from moesurgery.fitting.reporter import SILENT
from moesurgery.fitting.shape_steps import ShapeSteps
from moesurgery.plan.plan import Plan
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.stats.statistics_file import load_stats

_AXES = ("experts", "width", "top-k", "merging")  # forms stay: all numbers are compared in one


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--heldout", nargs="+", required=True)
    parser.add_argument("--share", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--refit", default="down")
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--by", default="gram", help="how experts of the grid are chosen; the search finds its own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search-device", help="another device for the searches")
    parser.add_argument("--folder", type=Path, help="where all that is measured is kept; nowhere by default")
    parser.add_argument("--results", type=Path, help="also write all figures as JSON")
    return parser.parse_args()


class Bench:
    """What every measurement shares. Each process makes its own."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.plan = plan_of(open_checkpoint(given.model))
        self.options = CalibrationOptions(
            given.text, given.refit, window=given.window, tokens=given.tokens, device=given.device, dtype="float32"
        )
        settings = self.options.run_settings(0, "down")
        self.run = read_calibration(settings, self.plan, given.text, given.tokens, HELD_OUT_SHARE)
        self.held_out = replace(settings, limit=given.limit, seed=None).domains(self.plan.checkpoint, given.heldout)
        self.folder = folder

    def budget(self, share: float) -> Budget:
        checkpoint = self.plan.checkpoint
        limits = Limits(int(share * checkpoint.stored_bytes))
        return budget_of(self.plan.anatomy, self.plan.tensors, limits, context=1, batch=1, axes=_AXES, header_bytes=0)

    def nats(self, plan: Plan) -> float:
        measured = HeldOutLosses(self.run.settings, self.held_out, SILENT)
        measured.add({"": plan})
        return measured.found[""].nats

    def outcome(self, shape: MixtureShape, by: str, stats: str, name: str) -> tuple[float, float]:
        """Return the held-out loss of a shape, as edited and repaired."""
        cache = CalibrationCache(self.folder / f"{name}.{shape.name}", self.run, False, SILENT)
        steps = ShapeSteps(self.plan, self.budget(1).original, stats, load_stats(stats), cache)
        edited = steps.planned(shape, by)
        folder = cache.repair(edited, self.options.repair("down"))
        found = self.nats(edited), self.nats(steps.planned(shape, by, folder))
        shutil.rmtree(folder)
        return found


class Outcomes:
    """The losses that were measured, by share and shape, in a file that is written each time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "outcomes.json"
        self.known: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def submitted(self, pool: ProcessPoolExecutor, task: tuple[MixtureShape, str, str, str]) -> Future[list[float]]:
        """Return the outcome of a task: that of an earlier run, or one to come."""
        name = f"{task[3]} {task[0].name}"
        if name in self.known:
            known: Future[list[float]] = Future()
            known.set_result(self.known[name])
            return known
        start = time.perf_counter()

        def keep(done: Future[list[float]]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.known[name] = list(done.result())
                self.path.write_text(json.dumps(self.known, indent=1))
                print(f"{name} after {time.perf_counter() - start:.0f} s", flush=True)

        future = pool.submit(_outcome, task)
        future.add_done_callback(keep)
        return future


_bench: Bench


def _begin(given: argparse.Namespace, folder: Path) -> None:
    global _bench
    import torch

    torch.set_num_threads(1)
    _bench = Bench(given, folder)


def _outcome(task: tuple[MixtureShape, str, str, str]) -> list[float]:
    return list(_bench.outcome(*task))


def grid(budget: Budget) -> list[MixtureShape]:
    """Return all shapes that fit and that no other contains, and for each eighth of the experts and each top-k the
    widest experts that fit."""
    own = budget.original
    experts = sorted({max(1, own.experts * i // 8) for i in range(2, 9)})
    choice = replace(budget.choices, experts=[e for e in experts if e >= own.top_k])
    return list(dict(budget.shapes()) | dict(replace(budget, choices=choice).shapes()))


def _search(given: argparse.Namespace, folder: Path, share: float) -> tuple[MixtureShape, dict[str, float]]:
    """Return the shape that `fit` takes, and its price of each axis."""
    given.device = given.search_device or given.device
    bench = Bench(given, folder)
    start = time.perf_counter()
    found = best_fit(bench.plan, bench.budget(share), SearchOptions(), bench.options, folder / f"fit-{share}")
    measured = {c.shape.name: (c.predicted, c.measured, c.repaired) for c in found.candidates if c.measured is not None}
    took = time.perf_counter() - start
    print(f"share {share}: fit takes {found.winner.shape.name} after {took:.0f} s, experts by {found.by}", flush=True)
    print(
        {name: [None if x is None else round(x, 4) for x in figures] for name, figures in measured.items()}, flush=True
    )
    return found.winner.shape, dict(zip(PRICED, found.prediction.prices, strict=True))


def main() -> None:
    given = arguments()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder: Path = given.folder or Path(name)
        folder.mkdir(exist_ok=True)
        measured = Outcomes(folder)
        bench = Bench(given, folder)
        base = bench.nats(bench.plan)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.jobs, context, _begin, (given, folder)) as pool:
            top_ks = sorted({s.top_k for share in given.share for s, _ in bench.budget(share).shapes()})
            shared = CalibrationCache(folder / "grid", bench.run, False, SILENT)
            stats = shared.statistics(
                NeededStatistics([k for k in top_ks if k != bench.budget(1).original.top_k], neurons=True)
            )
            start = time.perf_counter()
            searches = [pool.submit(_search, given, folder, share) for share in given.share]
            shapes = {share: grid(bench.budget(share)) for share in given.share}
            tasks = {share: [(s, given.by, stats, str(share)) for s in shapes[share]] for share in given.share}
            outcomes = {share: [measured.submitted(pool, task) for task in tasks[share]] for share in given.share}
            for share, search in zip(given.share, searches, strict=True):
                taken, prices = search.result()
                if taken not in shapes[share]:
                    shapes[share].append(taken)
                    outcomes[share].append(measured.submitted(pool, (taken, given.by, stats, str(share))))
                found = {s: outcome.result() for s, outcome in zip(shapes[share], outcomes[share], strict=True)}
                predicted = DamagePrediction(damage_curves(load_stats(stats)), tuple(prices.values()))
                results[share] = _show(found, base, taken, predicted)
                took = time.perf_counter() - start
                print(f"share {share}: {len(found)} shapes after {took:.0f} s; original {base:.4f}", flush=True)
    if given.results is not None:
        given.results.write_text(json.dumps(results, indent=1))


def _show(
    found: dict[MixtureShape, list[float]], base: float, taken: MixtureShape, predicted: DamagePrediction
) -> list[object]:
    print("shape                 predicted  edited  repaired")
    rows: list[object] = []
    for shape, (edited, repaired) in sorted(found.items(), key=lambda item: item[1][1]):
        mark = " <- fit" if shape == taken else ""
        row = (shape.name, round(predicted.of(shape), 4), round(edited - base, 4), round(repaired - base, 4))
        rows.append((*row, shape == taken, predicted.curves.parts(shape)))
        print(f"{row[0]:<20} {row[1]:>10.4f} {row[2]:>7.4f} {row[3]:>9.4f}{mark}", flush=True)
    best = min(repaired for _, repaired in found.values())
    ours = found[taken][1]
    over = (ours - best) / max(best - base, 1e-9)
    print(f"fit: loss {ours:.4f}, the best {best:.4f}: {100 * (ours / best - 1):.2f} % of the loss,", end=" ")
    print(f"{100 * over:.1f} % of the increase above it")
    return rows


if __name__ == "__main__":
    main()
