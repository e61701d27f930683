"""Kills what runs a model, by SIGKILL in a random layer: `python -m tests.kill_calibration FOLDER [KILLS]`.

Each of `collect`, a repair (`--refit expert` and `down`) and `probe` is run in a process that kills itself before a
random unit of the model, perhaps once more while it goes on, and is then run to its end. What it writes has the bytes
of a run that was never killed, fewer units are run again than there are, and no scratch is left.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from moesurgery import CalibrationOptions, calibrate, open_checkpoint, plan_of
from moesurgery.fitting.ablation import ablate
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.kept_losses import KeptLosses
from moesurgery.fitting.reporter import SILENT
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward import engine as engine_module
from moesurgery.forward import scratch as scratch_module
from moesurgery.forward.unit_runner import UnitRunner
from moesurgery.recipe.text_needs import NeededStatistics
from tests.tiny import save_tiny

LAYERS = 5
WINDOW = 24


def collect(model: Path, text: Path, out: Path) -> None:
    run = read_calibration(RunSettings(WINDOW, seed=0), plan_of(open_checkpoint(model)), [text], 240)
    run.statistics(NeededStatistics((3,)), SILENT, out / "scratch").save(out / "stats")


def refit(kind: str) -> Callable[[Path, Path, Path], None]:
    def job(model: Path, text: Path, out: Path) -> None:
        options = CalibrationOptions([text], refit=kind, no_heldout=True, window=WINDOW, tokens=240)
        calibrate(model, "drop-experts", {"experts": [1, 6]}, options, out / "m")

    return job


def probe(model: Path, text: Path, out: Path) -> None:
    plan = plan_of(open_checkpoint(model))
    settings = RunSettings(WINDOW, seed=0)
    windows = read_calibration(settings, plan, [text], 96).windows
    engine, kept = settings.engine(plan, windows), KeptLosses(out / "scratch" / "losses.json", {"of": "this"})
    found = ablate(engine, windows, {b.where: [0, 3] for b in engine.routed}, ["mask"], kept=kept)
    kept.remove()
    (out / "probe").write_text(repr((found.base, found.single, found.index)))


JOBS: dict[str, Callable[[Path, Path, Path], None]] = {
    "collect": collect,
    "refit expert": refit("expert"),
    "refit down": refit("down"),
    "probe": probe,
}


def in_a_process(job: Callable[[], None], die_before: int | None) -> int | None:
    """Run a job in a process that kills itself before it runs so many units; return how many it ran, None if killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count, run_unit = 0, UnitRunner.run_unit

        def counted(*args: object) -> object:
            nonlocal count
            if count == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return run_unit(*args)  # type: ignore[arg-type]

        UnitRunner.run_unit = counted  # type: ignore[assignment,method-assign]
        code = 1
        try:
            job()
            os.write(writer, str(count).encode())
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert os.WEXITSTATUS(status) == 0, status
    return int(said)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def kill(name: str, folder: Path, kills: int, generator: random.Random) -> None:
    """Kill one job so many times, each at another place, and compare what it writes at last."""
    scratch_module.SAVE_SECONDS = 0
    engine_module.BATCH_TOKENS = 4 * WINDOW
    model, text, out = folder / "model", folder / "text.jsonl", folder / "out"
    if not model.exists():
        save_tiny("mixtral", model, num_hidden_layers=LAYERS)
        ids = torch.randint(3, 60, (12, WINDOW), generator=torch.Generator().manual_seed(3))
        text.write_text("".join(json.dumps(row.tolist()) + "\n" for row in ids))

    def job() -> None:
        JOBS[name](model, text, out)

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    fresh()
    units = in_a_process(job, None)
    assert units is not None
    expected = contents(out)
    assert expected
    assert not any("scratch" in file for file in expected), sorted(expected)
    for _ in range(kills):
        fresh()
        first = generator.randrange(1, units)
        assert in_a_process(job, first) is None
        again = 0
        if generator.random() < 0.5 and in_a_process(job, generator.randrange(1, max(2, units // 2))) is not None:
            again = -1  # it had less left to do than that
        if again == 0:
            ran = in_a_process(job, None)
            assert ran is not None
            assert ran < units or first < units // 3, (name, first, ran, units)
        assert contents(out) == expected, (name, first)


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10
    generator = random.Random(0)
    for name in JOBS:
        kill(name, folder, kills, generator)
        print(f"{name}: killed {kills} times or more, the same bytes each time", flush=True)


if __name__ == "__main__":
    main()
