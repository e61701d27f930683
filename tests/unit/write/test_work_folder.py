"""A working folder that somebody else has put there, copied, or changed: nothing in it is followed or believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moesurgery
from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.digest import sampled_digest
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.write.claim import claim
from moesurgery.write.job_control import JobControl
from tests.conftest import Result
from tests.unit.write.test_write import StoppedError, digest, stop_after

Cli = Callable[..., Result]
SHARD = "model-00001-of-00003.safetensors"
WORK = ".moesurgery"
EVERY_FILE = [
    f"{WORK}/plan",
    f"{WORK}/lock",
    f"{WORK}/{SHARD}.json",
    f"{WORK}/x.tmp",
    SHARD,
    "README.md",
    "config.json",
]
EVERY_NAME = ["", WORK, *EVERY_FILE, "sub", f"{WORK}/sub"]


@pytest.fixture
def plan(demo: Path) -> Plan:
    return apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3, scale=1.5)


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    write_plan(plan, tmp_path / "expected")
    return digest(tmp_path / "expected")


@pytest.fixture
def partial(plan: Plan, tmp_path: Path) -> Path:
    """An unfinished job with a finished shard: `place/out.partial`."""
    (tmp_path / "place").mkdir()
    with pytest.raises(StoppedError):
        write_plan(plan, tmp_path / "place" / "out", WriteOptions(jobs=1), watch=stop_after(8_000_000))
    assert (tmp_path / "place" / "out.partial" / WORK / f"{SHARD}.json").exists()
    return tmp_path / "place" / "out.partial"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Files of the user that lie elsewhere, under names that a job has too."""
    folder = tmp_path / "victim"
    (folder / WORK).mkdir(parents=True)
    for name in (*EVERY_FILE, "precious.txt", "plan", "lock"):
        (folder / name).write_text(f"precious {name}")
    return folder


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """Opening a pipe would wait for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def put(path: Path, make: Callable[[Path], Any]) -> None:
    """Put something in place of `path`."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


def refused(plan: Plan, partial: Path, why: str, *, force: bool = False) -> None:
    before = listing(partial.parent)
    with pytest.raises(OutputError, match=r"out\.partial exists and is no unfinished job of ours") as caught:
        write_plan(plan, partial.with_name("out"), WriteOptions(force=force))
    assert why in caught.value.message
    assert caught.value.hint == "move it away, or choose another folder with -o"
    assert listing(partial.parent) == before


def listing(folder: Path) -> dict[str, str]:
    return {str(p): f"{p.lstat().st_ino} {stat.S_IFMT(p.lstat().st_mode)}" for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", EVERY_NAME)
@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
def test_a_link_anywhere_is_refused(plan: Plan, partial: Path, victim: Path, name: str, to: str, force: bool) -> None:
    before = digest(victim)
    target = {"folder": victim, "file": victim / "precious.txt", "nothing": victim / "new"}[to]
    put(partial / name, lambda path: path.symlink_to(target))
    refused(plan, partial, "is a symbolic link", force=force)
    assert digest(victim) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_pipe_anywhere_is_refused_and_not_waited_for(plan: Plan, partial: Path, name: str, force: bool) -> None:
    put(partial / name, lambda path: os.mkfifo(path))
    refused(plan, partial, f"{partial / name} is a pipe", force=force)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_nothing_is_written_through_a_hard_link(
    plan: Plan, partial: Path, victim: Path, expected: dict[str, bytes], name: str
) -> None:
    before = digest(victim)
    put(partial / name, lambda path: os.link(victim / name, path))
    write_plan(plan, partial.with_name("out"), WriteOptions(force=True))
    assert digest(partial.with_name("out")) == expected
    assert digest(victim) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["", WORK, f"{WORK}/plan", f"{WORK}/lock", f"{WORK}/{SHARD}.json", SHARD, "README.md"])
def test_what_belongs_to_another_user_is_refused(plan: Plan, partial: Path, name: str, force: bool) -> None:
    if not (partial / name).exists():
        (partial / name).write_text("planted")
    os.chown(partial / name, 12345, 12345)
    refused(plan, partial, "belongs to the user 12345", force=force)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_an_empty_folder_of_another_user_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    os.chown(tmp_path / "out.partial", 12345, 12345)
    refused(plan, tmp_path / "out.partial", "belongs to the user 12345")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_links_to_a_source_of_another_user_are_taken_over(demo: Path, tmp_path: Path) -> None:
    """As --link makes them: finished, and of a job that was killed before it gave one its name."""
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    for file in model.iterdir():
        os.chown(file, 12345, 12345)
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale="none")
    options = WriteOptions(jobs=1, link=True)
    with pytest.raises(StoppedError):
        write_plan(plan, tmp_path / "out", options, watch=stop_after(8_000_000))
    os.link(model / SHARD, tmp_path / "out.partial" / WORK / "x.tmp")
    assert write_plan(plan, tmp_path / "out", options).shards == 3
    assert (tmp_path / "out" / SHARD).samefile(model / SHARD)
    assert not (tmp_path / "out.partial").exists()


def test_on_a_filesystem_whose_files_have_another_owner_jobs_resume(
    plan: Plan, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root on a network filesystem makes files of `nobody`: what it makes there says whose files are its own."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert write_plan(plan, partial.with_name("out")).resumed
    assert os.listdir(partial.parent) == ["out"]


@pytest.mark.parametrize("others", [[], ["README.md"], [SHARD], ["thesis.docx"], [f"{WORK}/notes.txt"]])
def test_a_folder_without_a_record_is_refused_unless_it_is_empty(
    plan: Plan, tmp_path: Path, expected: dict[str, bytes], others: list[str]
) -> None:
    partial = tmp_path / "place" / "out.partial"
    (partial / WORK).mkdir(parents=True)
    for name in others:
        (partial / name).write_text("mine")
    if others:
        refused(plan, partial, "it has no record of a plan, .moesurgery/plan", force=True)
        assert all((partial / name).read_text() == "mine" for name in others)
    else:
        write_plan(plan, partial.with_name("out"))
        assert digest(partial.with_name("out")) == expected


def test_only_what_jobs_keep_for_themselves_is_begun_again(
    plan: Plan, partial: Path, expected: dict[str, bytes]
) -> None:
    """As a job leaves its folder that is killed while it gives it up."""
    for name in ("plan", "lock"):
        (partial / WORK / name).unlink()
    for path in partial.glob("*.safetensors"):
        path.unlink()
    assert write_plan(plan, partial.with_name("out")).resumed == 0
    assert digest(partial.with_name("out")) == expected


def at_most(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what may be called `count` times, and is interrupted then."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if calls == count:
            raise KeyboardInterrupt
        calls += 1
        return original(*arguments, **named)

    return call


def test_killed_while_the_job_of_another_recipe_is_deleted(
    demo: Path, plan: Plan, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that --force deletes, and then the same command again."""
    other = apply(plan_of(open_checkpoint(demo)), "rescale", top_k=4, scale="none")
    left = 0
    while True:
        out = tmp_path / str(left) / "out"
        out.parent.mkdir()
        with pytest.raises(StoppedError):
            write_plan(other, out, WriteOptions(jobs=1), watch=stop_after(12_000_000))
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", at_most(left, os.unlink))
            try:
                claim(out.with_name("out.partial"), "some plan", force=True).release()
                whole = True
            except KeyboardInterrupt:
                whole = False
        write_plan(plan, out, WriteOptions(force=True))
        assert digest(out) == expected
        if whole:
            break
        left += 1
    assert left > 3


def alter(shard: Path) -> None:
    """Change values in the middle of a shard, and nothing of its size and times."""
    status = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(status.st_size // 2)
        file.write(b"\x3f" * 64)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def forge(partial: Path, name: str) -> None:
    """Make the manifest of an altered shard agree with it in all that can be known beforehand."""
    path = partial / WORK / f"{name}.json"
    manifest = json.loads(path.read_text())
    status = (partial / name).stat()
    sample = sampled_digest(LocalSource(partial), name, status.st_size)
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sampled_sha256": sample}
    path.write_text(json.dumps({**manifest, **known}))


@pytest.mark.parametrize("how", ["altered", "forged", "exchanged", "header only", "absent"])
def test_a_planted_shard_is_not_believed(plan: Plan, partial: Path, expected: dict[str, bytes], how: str) -> None:
    shard = partial / SHARD
    if how in ("altered", "forged"):
        alter(shard)
    if how == "forged":
        forge(partial, SHARD)
    if how == "exchanged":  # another file of the same size, with the same times
        other = partial.parent / "other"
        shutil.copy2(shard, other)
        alter(other)
        os.replace(other, shard)
    if how == "header only":
        os.truncate(shard, 1000)
    if how == "absent":
        shard.unlink()
    written = write_plan(plan, partial.with_name("out"))
    assert digest(partial.with_name("out")) == expected
    assert written.resumed < written.shards - 1


@pytest.mark.parametrize("how", ["copied", "checked out"])
def test_a_folder_from_elsewhere_is_begun_again(
    plan: Plan, partial: Path, expected: dict[str, bytes], how: str
) -> None:
    """Everything in it is as a job of ours leaves it, with the right plan; but no kernel here has seen it written."""
    alter(partial / SHARD)
    forge(partial, SHARD)
    elsewhere = partial.with_name("elsewhere")
    partial.rename(elsewhere)
    shutil.copytree(elsewhere, partial, copy_function=shutil.copy2 if how == "copied" else shutil.copyfile)
    (partial / "config.json").write_text("{}")
    (partial / "sub" / ".git").mkdir(parents=True)
    (partial / "sub" / "evil.json").write_text("{}")
    written = write_plan(plan, partial.with_name("out"))
    assert written.resumed == 0
    assert digest(partial.with_name("out")) == expected


@pytest.mark.parametrize("text", ["", "[]", "null", "9" * 5000, "[" * 100_000, '{"plan": null}', "\x00" * 100, "abc"])
@pytest.mark.parametrize("name", ["plan", f"{SHARD}.json"])
def test_records_that_say_nothing(plan: Plan, partial: Path, expected: dict[str, bytes], name: str, text: str) -> None:
    (partial / WORK / name).write_text(text)
    out = partial.with_name("out")
    if name == "plan":
        with pytest.raises(OutputError, match="unfinished job of another recipe") as caught:
            write_plan(plan, out)
        assert caught.value.hint == "finish that job, delete the folder, or start over with --force"
    write_plan(plan, out, WriteOptions(force=True))
    assert digest(out) == expected


@pytest.mark.parametrize("name", ["sub.partial/evil.json", ".git/config", "nested/config.json", ".cache/x", "a/b/c.py"])
def test_nothing_that_came_into_the_folder_is_published(
    plan: Plan, partial: Path, expected: dict[str, bytes], name: str
) -> None:
    """Folders that a checkpoint's own listing leaves out as well."""
    (partial / name).parent.mkdir(parents=True)
    (partial / name).write_text("{}")
    (partial / name).with_name("moesurgery.json").write_text("{}")
    assert write_plan(plan, partial.with_name("out")).resumed
    assert digest(partial.with_name("out")) == expected


def test_nobody_else_may_look_into_it_until_it_is_published(plan: Plan, tmp_path: Path) -> None:
    seen = set()
    watch = JobControl(progress=lambda count: seen.add(stat.S_IMODE((tmp_path / "out.partial").stat().st_mode)))
    old = os.umask(0)
    try:
        write_plan(plan, tmp_path / "out", watch=watch)
    finally:
        os.umask(old)
    assert seen == {0o700}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777


def test_an_open_folder_is_closed_when_it_is_taken_over(plan: Plan, partial: Path) -> None:
    os.chmod(partial, 0o777)
    seen = set()
    watch = JobControl(progress=lambda count: seen.add(stat.S_IMODE(partial.stat().st_mode)))
    write_plan(plan, partial.with_name("out"), watch=watch)
    assert seen == {0o700}


@pytest.mark.parametrize("instead", ["link", "folder", "nothing"])
def test_a_folder_exchanged_while_it_is_written(plan: Plan, tmp_path: Path, victim: Path, instead: str) -> None:
    """In a folder that everybody may write to: the job goes on where it was, and publishes nothing else."""
    before = digest(victim)
    place = tmp_path / "place"
    place.mkdir()
    partial = place / "out.partial"

    def progress(count: int) -> None:
        if not (place / "away").exists():
            partial.rename(place / "away")
            if instead == "link":
                partial.symlink_to(victim)
            if instead == "folder":
                shutil.copytree(victim, partial)

    with pytest.raises(OutputError, match=r"out\.partial (was moved or replaced|.*missing)"):
        write_plan(plan, place / "out", WriteOptions(jobs=1), watch=JobControl(progress=progress))
    assert not (place / "out").exists()
    assert digest(victim) == before
    if instead == "folder":
        assert digest(partial) == before


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("instead", ["link", "folder"])
def test_a_folder_exchanged_at_the_last_moment(
    plan: Plan, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, old: bool, instead: str
) -> None:
    """Between the last look and the renaming: what was published by mistake is taken back."""
    place = tmp_path / "place"
    place.mkdir()
    out, partial = place / "out", place / "out.partial"
    if old:
        out.mkdir()
        (out / "old.safetensors").write_bytes(b"old")
    before = digest(victim)

    def first(original: Callable[..., Any], wanted: tuple[str, str]) -> Callable[..., Any]:
        def call(folder: Any, name: str, new: str) -> Any:
            if (name, new) == wanted and not (place / "away").exists():
                partial.rename(place / "away")
                partial.symlink_to(victim) if instead == "link" else shutil.copytree(victim, partial)
            return original(folder, name, new)

        return call

    from moesurgery.write import open_folder, publish

    names = ("out.partial", "out")
    if old:
        monkeypatch.setattr(publish, "exchange", first(publish.exchange, names))
    else:
        replace = first(open_folder.OpenFolder.replace, names)
        monkeypatch.setattr(open_folder.OpenFolder, "replace", replace)
    with pytest.raises(OutputError, match="was moved or replaced by something else while it was written") as caught:
        write_plan(plan, out, WriteOptions(force=old))
    assert caught.value.hint == "choose a folder in which nobody else may rename files, with -o"
    assert out.exists() == old
    if old:
        assert digest(out) == {"old.safetensors": b"old"}
    assert digest(victim) == before


def test_another_process_refuses_another_folder_of_that_name(tmp_path: Path) -> None:
    work = claim(tmp_path / "out.partial", "some plan", force=False)
    sent = pickle.dumps(work)
    assert pickle.loads(sent).inode == work.inode
    (tmp_path / "out.partial").rename(tmp_path / "away")
    shutil.copytree(tmp_path / "away", tmp_path / "out.partial")
    with pytest.raises(OutputError, match="was moved or replaced"):
        pickle.loads(sent)
    work.release()


def test_a_working_folder_that_was_uploaded_with_a_model_is_not_carried(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remote listing has every folder: that of a killed job among them, or one made to look so."""
    monkeypatch.setattr("moesurgery.checkpoint.source._skipped", lambda folder: False)
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    (model / WORK).mkdir()
    for name in ("lock", "plan", f"{SHARD}.json", "more.json"):
        (model / WORK / name).write_text("{}")
    plan = plan_of(open_checkpoint(model))
    assert f"{WORK}/plan" in plan.checkpoint.side_files
    write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out" / WORK).exists()


def test_an_adapter_is_not_written_through_a_link(
    models: Callable[..., Path], cli: Cli, ok: Cli, tmp_path: Path, victim: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = models("mixtral")
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    for file in tuned.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 1.25 if "q_proj" in n else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    before = digest(victim)
    (tmp_path / "out.partial").symlink_to(victim)
    command = ("extract-lora", base, tuned, "--rank", 2, "-o", tmp_path / "out")
    result = cli(*command)
    assert result.code == 2
    assert "no unfinished job of ours: it is a symbolic link" in result.err
    assert digest(victim) == before
    (tmp_path / "out.partial").unlink()
    claim(tmp_path / "out.partial", "extract-lora", force=False).release()  # killed while it computed
    ok(*command)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "out.partial").exists()
    assert cli(*command).code == 2  # it exists


def test_an_adapter_that_cannot_be_made_leaves_nothing(models: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    result = cli("extract-lora", models("mixtral"), models("mixtral"), "--rank", 2, "-o", tmp_path / "a" / "out")
    assert result.code == 2
    assert "do not differ" in result.err
    assert list((tmp_path / "a").iterdir()) == []


def test_names_that_lead_out_are_no_names(tmp_path: Path) -> None:
    work = claim(tmp_path / "out.partial", "some plan", force=False)
    for name in ("../x", "/x", "a/../../x", "", ".", "a//b"):
        with pytest.raises(moesurgery.SurgeryError, match="is no name of a file in"):
            work.write(name, [b"x"], durable=False)
    work.release()
