"""What calibrated commands leave beside their output: used again for the same, never replaced unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.plan.fingerprint import fingerprint
from tests.conftest import DEMO, Result
from tests.quantise import rewrite
from tests.tiny import read_tensors

Cli = Callable[..., Result]
CODE, MANUAL = DEMO.parent / "calibration-code.txt", DEMO.parent / "calibration-manual.txt"
TEXT = ["--text", CODE, "--window", 32, "--tokens", 256, "--no-heldout"]
RESCALE = ["--top-k", 3, "--scale", "measured"]


def test_statistics_are_used_again(demo: Path, tmp_path: Path, ok: Cli) -> None:
    out = tmp_path / "out"
    stats = tmp_path / "out.stats.safetensors"
    first = ok("rescale", demo, *RESCALE, *TEXT, "-o", out, "--dry-run")
    assert "statistics of 256 tokens are in" in first.err
    written = stats.stat().st_mtime_ns
    again = ok("rescale", demo, *RESCALE, *TEXT, "-o", out)
    assert f"statistics of 256 tokens in {stats} are used again" in again.err.replace("\n", "")
    shutil.rmtree(out)
    other = ok("drop-experts", demo, "--count", 2, *TEXT, "-o", out, "--dry-run")  # needs less than is there
    assert "are used again" in " ".join(other.err.split())
    assert stats.stat().st_mtime_ns == written


def test_a_repair_is_used_again(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.refit"
    drop = ["drop-experts", demo, "--experts", "0,5", *TEXT, "-o", out, "--dry-run"]
    ok(*drop, "--refit", "scalar")
    written = (folder / "refit.json").stat().st_mtime_ns
    again = ok(*drop, "--refit", "scalar", "--json")
    assert (folder / "refit.json").stat().st_mtime_ns == written
    assert "is used again" in " ".join(again.err.split())
    for changes, said in (
        (["--refit", "expert"], "kind scalar, now expert"),
        (["--refit", "scalar", "--experts", "0,4"], "another edit"),
    ):
        result = cli(*drop, *changes)
        assert result.code == 2
        assert said in " ".join(result.err.split())
        assert "--force to fit again" in " ".join(result.err.split())
    ok(*drop, "--refit", "expert", "--force")
    assert json.loads((folder / "refit.json").read_text())["kind"] == "expert"


def test_half_a_repair_is_begun_again(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.refit"
    command = ["drop-experts", demo, "--experts", "0,5", "--refit", "scalar", *TEXT, "-o", out, "--dry-run"]
    folder.mkdir()
    (folder / "layer-000.safetensors").write_bytes(b"cut off")
    ok(*command)
    assert [f.name for f in folder.iterdir()] == ["refit.json"]
    (folder / "refit.json").unlink()
    (folder / "notes.txt").write_text("mine")
    result = cli(*command, "--force")
    assert result.code == 2
    assert "is no repair" in " ".join(result.err.split())
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_fingerprint_is_that_of_the_content(models: Callable[..., Path], tmp_path: Path) -> None:
    path = models("mixtral")
    plan = plan_of(open_checkpoint(path))
    shutil.copytree(path, tmp_path / "copy")
    assert fingerprint(plan_of(open_checkpoint(tmp_path / "copy"))) == fingerprint(plan)
    tensors = read_tensors(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    rewrite(path, tmp_path / "other", tensors, {})
    edits = [plan, *(apply(plan, "drop-experts", experts=[e]) for e in (1, 2)), apply(plan, "rescale", top_k=3)]
    prints = [fingerprint(p) for p in (*edits, plan_of(open_checkpoint(tmp_path / "other")))]
    assert len(set(prints)) == len(prints)
    assert fingerprint(apply(plan, "drop-experts", experts=[1])) == prints[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--seed", 1], "seed 0, now 1"),
        (["--tokens", 512], "tokens 256, now 512"),
        (["--window", 64], "window 32, now 64"),
        (["--text", MANUAL], "text calibration-code.txt, now calibration-code.txt and calibration-manual.txt"),
        (["--top-k", 1], "no sums for top-k 1"),
        (["--dtype", "bfloat16"], "dtype float32, now bfloat16"),
    ],
)
def test_other_statistics_stay(demo: Path, tmp_path: Path, ok: Cli, cli: Cli, changes: list[object], said: str) -> None:
    out, stats = tmp_path / "out", tmp_path / "out.stats.safetensors"
    ok("rescale", demo, *RESCALE, *TEXT, "-o", out, "--dry-run")
    before = stats.read_bytes()
    result = cli("rescale", demo, *RESCALE, *TEXT, *changes, "-o", out, "--dry-run")
    assert result.code == 2
    said_of = " ".join(result.err.split())
    assert said in said_of
    assert "use --force to collect again, --stats" in said_of
    assert stats.read_bytes() == before
    ok("rescale", demo, *RESCALE, *TEXT, *changes, "-o", out, "--dry-run", "--force")
    assert stats.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drop-experts", "--count", 8], "0 experts would be left"),
        (["drop-experts"], "needs one of experts, keep, count and plan_file"),
        (["rescale", "--top-k", 9, "--scale", "measured"], "top-k 9 is impossible"),
    ],
)
def test_what_no_statistics_make_possible_is_refused_before_the_model_runs(
    arguments: list[object], message: str, demo: Path, tmp_path: Path, cli: Cli
) -> None:
    command, *options = arguments
    result = cli(command, demo, *options, *TEXT, "-o", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.glob("out*"))


def test_statistics_are_named_with_their_ending(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    ok("collect", demo, *TEXT[:-1], "-o", tmp_path / "s")
    result = cli("drop-experts", demo, "--count", 1, "--stats", tmp_path / "s", "--dry-run")
    assert result.code == 2
    assert f"hint:  name {tmp_path / 's'}.safetensors" in result.err.replace("\n       ", " ")


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link_beside_an_output(demo: Path, tmp_path: Path, ok: Cli, there: bool) -> None:
    """Planted in a shared folder: to a file of the user, or to where one would be made."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    if there:
        victim.write_text("precious")
    for name in ("out.stats.safetensors", "out.stats.safetensors.partial"):
        (tmp_path / name).symlink_to(victim)
    ok("rescale", demo, *RESCALE, *TEXT, "-o", out, "--dry-run", "--force")
    stats = tmp_path / "out.stats.safetensors"
    assert stats.is_file()
    assert not stats.is_symlink()
    for name in ("s.json", "s.safetensors.partial"):
        (tmp_path / name).symlink_to(victim)
    ok("collect", demo, *TEXT[:6], "-o", tmp_path / "s")
    assert (victim.read_text() if victim.exists() else None) == ("precious" if there else None)
    names = {"out.stats.safetensors", "s.safetensors", "s.json", *(["victim"] if there else [])}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_no_repair_is_written_through_a_link(demo: Path, tmp_path: Path, cli: Cli, ok: Cli) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out.refit"
    victim.mkdir()
    folder.symlink_to(victim)
    drop = ["drop-experts", demo, "--experts", "0,5", *TEXT, "-o", tmp_path / "out", "--dry-run", "--refit", "scalar"]
    result = cli(*drop, "--force")
    assert result.code == 2
    assert f"{folder} is a symbolic link, and no repair" in result.err.replace("\n", " ")
    assert "move it away, or use another -o" in result.err
    assert list(victim.iterdir()) == []
    folder.unlink()
    folder.mkdir()
    (folder / "refit.json.partial").symlink_to(victim / "new")  # as an interrupted run leaves a file of that name
    ok(*drop)
    assert {path.name for path in folder.iterdir()} == {"refit.json"}
    assert list(victim.iterdir()) == []
