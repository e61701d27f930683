"""A pass that is killed goes on where it was, and a forecast of what it takes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import open_checkpoint, plan_of
from moesurgery.cli._console import Console, duration
from moesurgery.errors import RecipeError
from moesurgery.fitting.collector import collect, collect_over
from moesurgery.fitting.kept_losses import KeptLosses
from moesurgery.forward import engine as engine_module
from moesurgery.forward import scratch as scratch_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.memory_budget import parse_bytes
from moesurgery.forward.scratch import Scratch
from moesurgery.forward.tokens import Tokens
from tests.conftest import Result
from tests.kill_calibration import JOBS, kill

Cli = Callable[..., Result]
LAYERS = 6
TOKENS = Tokens(torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(5)))


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def every_layer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", 48)


def run(path: Path, scratch: Scratch | None, die_after: int | None = None) -> Any:
    """Collect; stop like a killed process after so many batches times layers."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if die_after is not None and done >= die_after * 48:
            raise KilledError

    return collect(Engine(plan_of(open_checkpoint(path))), TOKENS, (3,), progress=progress, scratch=scratch)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_killed_at_any_layer_the_statistics_are_the_same_bytes(models: Any, tmp_path: Path, model_type: str) -> None:
    path = models(model_type, num_hidden_layers=LAYERS)
    expected = run(path, None).save(tmp_path / "whole").read_bytes()
    generator = random.Random(0)
    for attempt in range(10):
        folder = tmp_path / f"scratch{attempt}"
        first, second = sorted(generator.sample(range(1, 2 * LAYERS + 1), 2))
        for die in (first, second, None):  # the second time while going on
            if die is None:
                stats = run(path, Scratch(folder, {"of": "this"}))
            else:
                with pytest.raises(KilledError):
                    run(path, Scratch(folder, {"of": "this"}), die)
        assert stats.save(tmp_path / "again").read_bytes() == expected


def test_only_layers_that_are_not_done_are_run_again(models: Any, tmp_path: Path) -> None:
    path = models("mixtral", num_hidden_layers=LAYERS)
    with pytest.raises(KilledError):
        run(path, Scratch(tmp_path / "s", {}), 2 * 4 + 1)  # in the fifth layer
    assert json.loads((tmp_path / "s" / "state.json").read_text())["layer"] == 4
    assert len(list((tmp_path / "s").glob("layer-*"))) == 2  # a file for each batch, of one layer
    engine = Engine(plan_of(open_checkpoint(path)))
    loaded: list[str] = []
    load = engine.meta_model.load
    engine.meta_model.load = lambda unit: (loaded.append(unit.path), load(unit))[1]  # type: ignore[method-assign]
    collect(engine, TOKENS, (3,), scratch=Scratch(tmp_path / "s", {}))
    assert [name for name in loaded if "layers" in name] == ["model.layers.4", "model.layers.5"]


@pytest.mark.parametrize("damage", ["other", "torn", "gone"])
def test_a_state_of_something_else_is_not_gone_on_from(models: Any, tmp_path: Path, damage: str) -> None:
    path = models("mixtral", num_hidden_layers=LAYERS)
    expected = run(path, None).save(tmp_path / "whole").read_bytes()
    with pytest.raises(KilledError):
        run(path, Scratch(tmp_path / "s", {"tokens": 1}), 5)
    if damage == "torn":
        for file in (tmp_path / "s").glob("layer-*"):
            file.write_bytes(file.read_bytes()[:50])
    elif damage == "gone":
        next((tmp_path / "s").glob("sums-*")).unlink()
    about = {"tokens": 2 if damage == "other" else 1}
    assert run(path, Scratch(tmp_path / "s", about)).save(tmp_path / "again").read_bytes() == expected


def test_no_room_for_a_state_stops_nothing(models: Any, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file, where a folder should be")
    said: list[str] = []
    run(models("mixtral", num_hidden_layers=LAYERS), Scratch(tmp_path / "s", {}, said.append))
    assert len(said) == 1
    assert "could not be resumed" in said[0]


def test_the_command_leaves_no_scratch_behind(demo: Path, tmp_path: Path, ok: Cli) -> None:
    text = demo.parent / "heldout-code.txt"
    options = ["--text", text, "--window", 64, "--tokens", 512, "--json"]
    found = ok("collect", demo, *options, "-o", tmp_path / "s").json
    assert found["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.safetensors"]


def test_files_of_others_in_the_scratch_folder_stay(demo: Path, tmp_path: Path, ok: Cli) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    text = demo.parent / "heldout-code.txt"
    options = ["--text", text, "--window", 64, "--tokens", 512, "--scratch", tmp_path / "mine"]
    ok("collect", demo, *options, "-o", tmp_path / "s")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(demo: Path, tmp_path: Path, ok: Cli) -> None:
    text = demo.parent / "heldout-code.txt"
    options = ["--text", text, "--window", 64, "--tokens", 512, "-o", tmp_path / "s", "--dry-run"]
    found = ok("collect", demo, *options, "--json").json
    stored = sum(f.stat().st_size for f in demo.glob("*.safetensors"))
    assert 0.5 * stored < found["read_bytes"] <= stored
    assert found["seconds"] >= found["layers"] * found["layer_seconds"] > 0
    assert (
        found["scratch_bytes"]
        == 2 * found["tokens"] * 4 * json.loads((demo / "config.json").read_text())["hidden_size"]
    )
    assert "weights read" in ok("collect", demo, *options).out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [2, 3])
def test_windows_shared_out_give_the_same_sums(models: Any, count: int) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    tokens = Tokens(torch.randint(3, 60, (10, 24), generator=torch.Generator().manual_seed(2)))
    one = collect(Engine(plan), tokens, (3,), (6,))
    engines = [Engine(plan) for _ in range(count)]
    found = collect_over(engines, tokens, (3,), (6,), scratch=[None] * count)
    assert found.about == one.about
    for where, block in one.blocks.items():
        for name, values in block.sums.items():
            assert np.allclose(found.blocks[where].sums[name], values, rtol=1e-6, atol=1e-6), name


def test_amounts_of_memory() -> None:
    assert [parse_bytes(t) for t in ("40GB", "1.5 GB", "512MiB", "1000")] == [40 * 10**9, 15 * 10**8, 512 << 20, 1000]
    for wrong in ("much", "0", "-1GB", "4 cores"):
        with pytest.raises(RecipeError, match="no amount of memory"):
            parse_bytes(wrong)


def test_memory_bounds_what_stays_loaded(models: Any) -> None:
    plan = plan_of(open_checkpoint(models("mixtral", num_hidden_layers=LAYERS)))
    whole = Engine(plan, memory=1 << 30)
    whole.run(TOKENS)
    assert len(whole.weights.resident) == LAYERS + 1  # the embedding too; the head was never asked for
    largest = max(unit.nbytes for unit in whole.meta_model.units.values())
    small = Engine(plan, memory=3 * largest + whole.hidden_bytes(TOKENS))
    small.run(TOKENS)
    assert sum(unit.nbytes for unit in small.weights.resident.values()) <= 2 * largest


def test_progress_says_layer_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moesurgery.cli import _console as console_module

    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with Console().layer_progress("collecting", 100, 8) as watch:
        watch.progress(200)  # what an earlier run has done
        now[0] = 40.0
        watch.progress(100)
    assert capsys.readouterr().err == "collecting: layer 4 of 8, 0 tokens/s, 3 min 20 s left\n"
    assert [duration(s) for s in (2.34, 45, 200, 7500)] == ["2.3 s", "45 s", "3 min 20 s", "2 h 05 min"]


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    kill(name, tmp_path, 2, random.Random(1))


def test_losses_of_another_probe_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "scratch" / "losses.json"
    kept = KeptLosses(path, {"tokens": 1})
    kept.add({"mask None 1": 0.1 + 0.2})
    assert KeptLosses(path, {"tokens": 1}).losses == {"mask None 1": 0.1 + 0.2}
    assert KeptLosses(path, {"tokens": 2}).losses == {}
    path.write_text('{"about": {"tokens": 1}, "losses": [')
    assert KeptLosses(path, {"tokens": 1}).losses == {}
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_repair_is_begun_again(models: Any, tmp_path: Path) -> None:
    """Its files would otherwise be taken for those of this one."""
    path = models("mixtral", num_hidden_layers=LAYERS)
    with pytest.raises(KilledError):
        run(path, Scratch(tmp_path / "s", {"tokens": 1}), 5)
    assert Scratch(tmp_path / "s", {"tokens": 2}).load([Engine(plan_of(open_checkpoint(path)))]) is None
    assert not (tmp_path / "s").exists()
