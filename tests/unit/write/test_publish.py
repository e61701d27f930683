"""Publishing over an old output: exchanged at once, never neither; what a killed job left is cleaned up."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.write import publish
from moesurgery.write.open_folder import OpenFolder
from tests.conftest import ROOT, Result
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
FORCE = WriteOptions(force=True, durable=False)
OLD = {"old.safetensors": b"old", "sub/more.safetensors": b"old", "config.json": b"{}"}


@pytest.fixture
def plan(demo: Path) -> Plan:
    return apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3, scale="none")


@pytest.fixture
def new(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    write_plan(plan, tmp_path / "expected")
    return digest(tmp_path / "expected")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An old output, alone in its folder."""
    folder = tmp_path / "place" / "out"
    fill(folder, OLD)
    return folder


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def beside(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


@pytest.fixture(params=[True, False], ids=["exchange", "renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without a kernel and filesystem that exchange two names at once."""
    if not request.param:
        monkeypatch.setattr(publish, "_rename_with_flags", None)
    return bool(request.param)


class Killed(BaseException):
    """Instead of SIGKILL; nothing that the process does afterwards reaches the disk."""


def killed_at(monkeypatch: pytest.MonkeyPatch, last: int) -> Callable[[], int]:
    """Stop at the `last` change of names, and let nothing change names after it; return the count of them."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count >= last:
                raise Killed
            return original(*arguments, **named)

        return call

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(publish, "exchange", counted(publish.exchange))
    return lambda: count


def test_killed_at_every_change_of_names(
    plan: Plan, tmp_path: Path, new: dict[str, bytes], exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run for each; where names can be exchanged, OUT is the old output or the new one at any time."""
    place = tmp_path / "killed"
    last, seen = 1, []
    while True:
        out = place / str(last) / "out"
        fill(out, OLD)
        with monkeypatch.context() as patch:
            steps = killed_at(patch, last)
            with suppress(Killed):
                write_plan(plan, out, FORCE)
            whole = steps() < last
        if out.exists():
            found = {name: data for name, data in digest(out).items() if not name.startswith(".moesurgery")}
            assert found in (OLD, new)
            seen.append("old" if found == OLD else "new")
        else:
            assert not exchanges
            (aside,) = out.parent.glob("out.replaced-*")
            assert digest(aside) == OLD
            seen.append("aside")
        if last % 3 == 0:
            with pytest.raises(OutputError, match="exists and is not empty"):
                write_plan(plan, out)  # without --force as well, the old output gets its name back, or is deleted
            assert digest(out) in (OLD, new)
            assert set(beside(out)) <= {"out", "out.partial"}
        write_plan(plan, out, FORCE)
        assert digest(out) == new
        assert beside(out) == ["out"]
        if whole:
            break
        last += 1
    assert last > 15
    assert set(seen) == {"old", "new", "aside"} - ({"aside"} if exchanges else set())


def test_this_system_exchanges(tmp_path: Path) -> None:
    """Else the tests of that would say nothing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert publish.exchange(OpenFolder.open(tmp_path), "a", "b")
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(OSError, match=r"No such file or directory: '.*/c'"):
        publish.exchange(OpenFolder.open(tmp_path), "a", "c")


def test_an_empty_folder_gives_way(plan: Plan, out: Path, new: dict[str, bytes]) -> None:
    empty = out.with_name("empty")
    empty.mkdir()
    write_plan(plan, empty)
    assert digest(empty) == new
    assert beside(out) == ["empty", "out"]


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_appears_under_the_outputs_name_is_kept(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = tmp_path / "out"
    real = publish.publish

    def late(*arguments: Any, **named: Any) -> None:
        if what == "folder":
            fill(out, OLD)
        else:
            out.write_text("mine") if what == "file" else out.symlink_to(tmp_path)
        real(*arguments, **named)

    monkeypatch.setattr("moesurgery.write.write_plan.publish", late)
    with pytest.raises(OutputError, match=r"out appeared while .*out\.partial was written") as caught:
        write_plan(plan, out, WriteOptions(force=what != "folder"))
    assert {"folder": "written", "file": "is a file", "link": "is a symbolic link"}[what] in caught.value.message
    assert caught.value.hint == f"mv {out}.partial to a place of your choice"
    assert out.is_symlink() if what == "link" else out.exists()
    assert (tmp_path / "out.partial" / "config.json").exists()


def test_what_came_into_the_old_output_at_the_last_moment_is_kept(
    plan: Plan, out: Path, new: dict[str, bytes], exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at it and the exchange: the old output gets its name back."""
    with monkeypatch.context() as patch:
        real = publish.exchange

        def late(parent: OpenFolder, *names: str) -> bool:
            (out / "thesis.docx").write_text("mine")
            return real(parent, *names)

        patch.setattr(publish, "exchange", late)
        with pytest.raises(OutputError, match=r"--force would delete .*thesis\.docx, which is no part") as caught:
            write_plan(plan, out, FORCE)
    assert caught.value.hint == "move it away, or choose another folder"
    assert digest(out) == {**OLD, "thesis.docx": b"mine"}
    assert beside(out) == ["out", "out.partial"]
    (out / "thesis.docx").unlink()
    assert write_plan(plan, out, FORCE).resumed == 3
    assert digest(out) == new
    assert beside(out) == ["out"]


def test_what_comes_into_the_old_output_while_it_is_deleted_is_kept(
    plan: Plan, out: Path, new: dict[str, bytes], exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = publish.check_replaceable
        calls = 0

        def late(folder: OpenFolder, **named: Any) -> list[str]:
            nonlocal calls
            names, calls = real(folder, **named), calls + 1
            if calls == 3:  # that of the deletion itself
                descriptor = folder.create("thesis.docx")
                os.write(descriptor, b"mine")
                os.close(descriptor)
            return names

        patch.setattr(publish, "check_replaceable", late)
        with pytest.raises(OutputError, match=r"something came into .*, a part of the old output") as caught:
            write_plan(plan, out, FORCE)
    (old,) = {*beside(out)} - {"out"}
    assert old == "out.partial" if exchanges else old.startswith("out.replaced-")
    assert caught.value.hint == (
        f"the new output is whole: move what you need out of {out.with_name(old)}, and delete that"
    )
    assert {name: data for name, data in digest(out).items() if not name.startswith(".moesurgery")} == new
    assert digest(out.with_name(old)) == {"thesis.docx": b"mine"}
    with pytest.raises(OutputError, match=r"--force would delete .*thesis\.docx"):
        write_plan(plan, out)  # still
    out.with_name(old).joinpath("thesis.docx").rename(out.parent / "thesis.docx")
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_plan(plan, out)
    assert beside(out) == ["out", "thesis.docx"]
    assert digest(out) == new


# What earlier versions left behind


@pytest.mark.parametrize("old", [True, False])
def test_old_outputs_of_jobs_that_were_killed_are_deleted(
    plan: Plan, out: Path, new: dict[str, bytes], old: bool
) -> None:
    """`OUT.replaced-PID`, by --force alone, and nothing that only looks like it."""
    victim = out.parent / "victim"
    fill(victim, OLD)
    for name in ("out.replaced-1", "out.replaced-23", "out.replaced-mine", "out2.replaced-1"):
        fill(out.with_name(name), OLD)
    fill(out.with_name("out.replaced-4"), {**OLD, "thesis.docx": b"mine"})
    out.with_name("out.replaced-5").symlink_to(victim)
    out.with_name("out.replaced-6").write_text("a file")
    kept = ["out.replaced-4", "out.replaced-5", "out.replaced-6", "out.replaced-mine", "out2.replaced-1", "victim"]
    if old:
        with pytest.raises(OutputError, match="exists and is not empty"):
            write_plan(plan, out)
    else:
        for name in OLD:
            (out / name).unlink()
        (out / "sub").rmdir()
        write_plan(plan, out)
    assert beside(out) == sorted(["out", "out.replaced-1", "out.replaced-23", *kept])
    write_plan(plan, out, FORCE)
    assert beside(out) == sorted(["out", *kept])
    assert digest(out) == new
    assert digest(victim) == OLD


@pytest.mark.parametrize("name", ["out.partial", "out.replaced-123", "out.replaced-123/model"])
@pytest.mark.parametrize("force", [False, True])
def test_an_input_that_would_be_deleted_is_refused(
    demo: Path, tmp_path: Path, cli: Cli, name: str, force: bool
) -> None:
    """The old output that a killed job left, say, which somebody goes on with."""
    model = Path(shutil.copytree(demo, tmp_path / name))
    before = digest(tmp_path)
    result = cli("rescale", model, "--top-k", 3, "-o", tmp_path / "out", *["--force"] * force)
    assert result.code == 2
    said = " ".join(result.err.split())
    assert f"the input {model} has the name of a folder that a job for {tmp_path}/out makes and deletes" in said
    assert "hint: give it another name, or choose another folder with -o" in said
    assert digest(tmp_path) == before
    assert cli("rescale", model, "--top-k", 3, "-o", tmp_path / "out2").code == 0


LEFT = {".moesurgery/plan": b"0123abcd", ".moesurgery/lock": b"", ".moesurgery/sub/a.safetensors.json": b"{}"}


def test_what_a_job_kept_for_itself_in_a_published_output_is_deleted(
    demo: Path, out: Path, cli: Cli, new: dict[str, bytes]
) -> None:
    """`OUT/.moesurgery`, by the next run for this output, whether or not it may replace it; not by a dry run."""
    fill(out, LEFT)
    command = ("rescale", demo, "--top-k", 3, "--scale", "none", "-o", out)
    assert "exists and is not empty: writing needs --force" in cli(*command, "--dry-run").err
    assert (out / ".moesurgery").exists()
    result = cli(*command)
    assert result.code == 2
    assert "exists and is not empty" in result.err
    assert digest(out) == OLD
    assert not (out / ".moesurgery").exists()
    fill(out, LEFT)
    assert cli(*command, "--force").code == 0
    assert digest(out) == new
    assert beside(out) == ["out"]


@pytest.mark.parametrize("name", [".moesurgery", ".moesurgery/lock", ".moesurgery/plan", ".moesurgery/x.json"])
def test_nothing_is_deleted_through_a_link_in_an_output(plan: Plan, out: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    fill(victim, LEFT)
    fill(victim, {"plan": b"mine", "x": b"mine"})
    before = digest(victim)
    if "/" in name:
        fill(out, LEFT)
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim / "x")
    else:
        (out / name).symlink_to(victim / ".moesurgery")
    for options in (WriteOptions(), FORCE):
        with pytest.raises(OutputError):
            write_plan(plan, out, options)
    assert (out / name).is_symlink()
    assert digest(victim) == before


@pytest.mark.parametrize("name", ["notes.txt", "plan.docx", "sub/notes"])
def test_a_folder_of_that_name_with_anything_else_is_left_alone(plan: Plan, out: Path, name: str) -> None:
    fill(out, {**LEFT, f".moesurgery/{name}": b"mine"})
    before = digest(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_plan(plan, out)
    assert digest(out) == before


def test_a_record_from_elsewhere_deletes_nothing(plan: Plan, out: Path) -> None:
    """`replaces` with the number of somebody's folder, in an output that a repository holds."""
    fill(out.with_name("out.partial"), OLD)
    inode = out.with_name("out.partial").stat().st_ino
    fill(out, {".moesurgery/lock": b"", ".moesurgery/plan": b'{"plan": "x", "lock": 1, "replaces": %d}' % inode})
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_plan(plan, out)
    assert digest(out.with_name("out.partial")) == OLD


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_another_process_is_about_to_finish(plan: Plan, out: Path, force: bool) -> None:
    fill(out, LEFT)
    with open(out / ".moesurgery" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"another process is writing .*/out") as caught:
            write_plan(plan, out, WriteOptions(force=force))
    assert caught.value.hint == "wait for it, or choose another folder"
    assert set(digest(out)) == {*OLD, *LEFT}


def test_every_writer_killed_with_every_flag(tmp_path: Path) -> None:
    """Twenty-eight kills; `python -m tests.kill_writers FOLDER 1000` makes a thousand."""
    command = [sys.executable, "-m", "tests.kill_writers", str(tmp_path), "28"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "28 kills of 14 writers" in done.stdout
