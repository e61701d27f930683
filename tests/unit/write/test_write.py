"""Writing: bytes, shards, resuming, publishing, and what happens when something is in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import moesurgery
from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.write.claim import claim
from moesurgery.write.job_control import JobControl
from tests.conftest import ROOT, Result
from tests.tiny import read_tensors, same_bits

Cli = Callable[..., Result]


def digest(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def plan(demo: Path) -> Plan:
    """A plan that computes, copies and edits."""
    return apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3, scale=1.5)


def test_scaled_tensors_are_rounded_once_and_all_others_are_byte_identical(
    demo: Path, plan: Plan, tmp_path: Path
) -> None:
    write_plan(plan, tmp_path / "out")
    before, after = read_tensors(demo), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        scaled = name.endswith(".w2.weight")
        expected = (tensor.float() * 1.5).to(tensor.dtype) if scaled else tensor
        assert same_bits(after[name], expected), name


def test_shards_order_and_metadata_follow_the_source(demo: Path, plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "out")
    old, new = open_checkpoint(demo), open_checkpoint(tmp_path / "out")
    assert new.shards == old.shards
    for a, b in zip(old.headers, new.headers, strict=True):
        assert [(t.name, t.dtype, t.shape) for t in a.tensors] == [(t.name, t.dtype, t.shape) for t in b.tensors]
        assert a.metadata == b.metadata
        assert a.data_start % 4096 == b.data_start % 4096  # so that a filesystem can share blocks


def test_side_files_are_carried_and_the_index_is_right(demo: Path, plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (demo / name).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.nbytes
    assert index["weight_map"] == json.loads((demo / "model.safetensors.index.json").read_text())["weight_map"]


def test_config_keeps_order_and_unknown_keys(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    config = {"zebra": {"a": [1, None]}, **json.loads((model / "config.json").read_text())}
    (model / "config.json").write_text(json.dumps(config))
    write_plan(apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale="none"), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(found) == list(config)
    assert found == {**config, "num_experts_per_tok": 3}


def test_nothing_changed_is_byte_identical(demo: Path, tmp_path: Path) -> None:
    write_plan(plan_of(open_checkpoint(demo)), tmp_path / "out")
    before, after = digest(demo), digest(tmp_path / "out")
    ours = {"moesurgery.json", "README.md", "model.safetensors.index.json"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_same_input_same_bytes(plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "a", WriteOptions(jobs=1))
    write_plan(plan, tmp_path / "b", WriteOptions(jobs=4, durable=False))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("durable", [True, False])
def test_no_fsync_waits_for_nothing(durable: bool, plan: Plan, tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_plan(plan, tmp_path / "out", WriteOptions(durable=durable))
    assert bool(synced) == durable


def test_file_modes_follow_the_umask(plan: Plan, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_plan(plan, tmp_path / "out")
    finally:
        os.umask(old)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


@pytest.mark.parametrize(("size", "shards"), [(1_000_000, None), (100_000_000, 1)])
def test_resharding(demo: Path, plan: Plan, tmp_path: Path, size: int, shards: int | None) -> None:
    write_plan(replace(plan, max_shard_size=size), tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    if shards:
        assert found.shards == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        assert len(found.shards) > 10
        assert found.shards[0].endswith(f"-of-{len(found.shards):05d}.safetensors")
        largest = max(t.nbytes for t in found.tensors.values())
        assert all(sum(t.nbytes for t in h.tensors) <= max(size, largest) for h in found.headers)
    write_plan(plan, tmp_path / "same")
    a, b = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "same")
    assert all(same_bits(a[n], b[n]) for n in b)


def test_hard_links_share_the_file_and_copies_do_not(demo: Path, tmp_path: Path) -> None:
    plan = apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3, scale="none")
    write_plan(plan, tmp_path / "copied")
    shard = "model-00001-of-00003.safetensors"
    assert not (tmp_path / "copied" / shard).samefile(demo / shard)
    model = Path(shutil.copytree(demo, tmp_path / "model"))  # links do not cross filesystems
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale="none")
    write_plan(plan, tmp_path / "linked", WriteOptions(link=True))
    assert (tmp_path / "linked" / shard).samefile(model / shard)
    assert (tmp_path / "linked" / shard).read_bytes() == (demo / shard).read_bytes()


def test_any_executor_will_do(plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "threads")
    spawn = get_context("spawn")
    write_plan(plan, tmp_path / "processes", make_executor=lambda: ProcessPoolExecutor(2, mp_context=spawn))
    assert digest(tmp_path / "threads") == digest(tmp_path / "processes")


# Refusals


def test_an_existing_output_is_refused_and_force_replaces_it(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_bytes(b"stale")
    with pytest.raises(OutputError, match="not empty"):
        write_plan(plan, out)
    assert (out / "old.safetensors").read_bytes() == b"stale"
    write_plan(plan, out, WriteOptions(force=True))
    assert not (out / "old.safetensors").exists()
    assert len(list(tmp_path.iterdir())) == 1  # nothing left beside it


@pytest.mark.parametrize("foreign", ["thesis.docx", "folder"])
def test_force_deletes_nothing_but_a_checkpoint(plan: Plan, tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / foreign).mkdir() if foreign == "folder" else (out / foreign).write_text("mine")
    with pytest.raises(OutputError, match="no part of a checkpoint"):
        write_plan(plan, out, WriteOptions(force=True))
    assert (out / foreign).exists()


def test_an_empty_folder_may_be_filled(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_plan(plan, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_an_edit_made_in_its_models_folder_lies_beside_it(
    demo: Path, tmp_path: Path, ok: Cli, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moesurgery rescale --top-k 3` in a model's own folder, twice."""
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    monkeypatch.chdir(model)
    before = digest(model)
    ok("rescale", "--top-k", 3)
    ok("rescale", "--top-k", 4)
    three, four = tmp_path / "model-rescale-k3", tmp_path / "model-rescale-k4"
    assert {p.name for p in three.iterdir()} == {p.name for p in four.iterdir()}
    refused = cli("rescale", "--top-k", 3, "-o", "inside")
    assert refused.code == 2
    assert "lies inside the input" in refused.err
    assert "-o ../inside" in refused.err
    assert digest(model) == before


@pytest.mark.parametrize("where", ["model", "."])
def test_the_output_is_never_an_input(demo: Path, tmp_path: Path, where: str) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    before = digest(model)
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3)
    with pytest.raises(OutputError, match="input"):
        write_plan(plan, tmp_path / where, WriteOptions(force=True))
    assert digest(model) == before


def test_a_symlink_as_output_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="not a directory"):
        write_plan(plan, tmp_path / "out", WriteOptions(force=True))


def test_a_missing_parent_is_said(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write_plan(plan, tmp_path / "no such" / "out")
    assert (caught.value.hint or "").endswith(f"mkdir -p '{tmp_path}/no such'")


def test_a_place_without_the_right_to_write_is_said_at_once(
    demo: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    result = cli("rescale", demo, "--top-k", 3, "-o", tmp_path / "out", "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert f"{tmp_path} may not be written to" in result.err


def test_a_place_without_the_right_to_look_is_said(
    demo: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_symlink", forbidden)
    result = cli("rescale", demo, "--top-k", 3, "-o", tmp_path / "out")
    assert result.code == 2
    assert f"cannot write {tmp_path}/out: Permission denied" in result.err


def test_the_folder_one_is_in_is_refused(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="the folder you are in") as caught:
        write_plan(plan, ".")
    assert "-o here" in (caught.value.hint or "")


# Interruptions


class StoppedError(Exception):
    """What the watch raises after some bytes."""


def stop_after(count: int) -> JobControl:
    watch = JobControl()
    seen = 0

    def progress(n: int) -> None:
        nonlocal seen
        seen += n
        if seen >= count:
            raise StoppedError

    watch.progress = progress
    return watch


def test_an_interrupted_job_resumes_to_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_plan(plan, out, WriteOptions(jobs=1), watch=stop_after(8_000_000))
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert partial.is_dir()
    written = write_plan(plan, out)
    assert 0 < written.resumed < written.shards
    assert digest(out) == digest(tmp_path / "whole")
    assert not partial.exists()


def test_an_unfinished_job_of_another_recipe_is_not_mixed_in(demo: Path, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_plan(plan, out, WriteOptions(jobs=1), watch=stop_after(8_000_000))
    other = apply(plan_of(open_checkpoint(demo)), "rescale", top_k=4, scale=1.25)
    with pytest.raises(OutputError, match="another recipe"):
        write_plan(other, out)
    write_plan(other, out, WriteOptions(force=True))
    write_plan(other, tmp_path / "fresh")
    assert digest(out) == digest(tmp_path / "fresh")


def test_a_changed_input_does_not_resume(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    with pytest.raises(StoppedError):
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=1), watch=stop_after(8_000_000))
    shard = model / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OutputError, match="changed inputs"):
        write_plan(plan, tmp_path / "out")


def test_two_processes_do_not_write_one_output(plan: Plan, tmp_path: Path) -> None:
    other = claim(tmp_path / "out.partial", "someone else", force=False)
    try:
        with pytest.raises(OutputError, match="another process"):
            write_plan(plan, tmp_path / "out")
    finally:
        other.release()


def test_a_failed_shard_leaves_no_temporary_file(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesurgery.write.copy_bytes.write_full", _full_disk)
    with pytest.raises(OutputError, match="no space"):
        write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))


def test_a_file_too_large_for_its_filesystem(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("moesurgery.write.copy_bytes.write_full", too_large)
    with pytest.raises(OutputError, match="larger than its filesystem") as caught:
        write_plan(plan, tmp_path / "out")
    assert "--max-shard-size" in (caught.value.hint or "")


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_no_room_is_an_error_before_the_first_byte(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: _Full(real(path)))
    with pytest.raises(OutputError, match="GB free"):
        write_plan(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class _Full:
    """A filesystem with one free block."""

    def __init__(self, real: os.statvfs_result) -> None:
        self.f_frsize = real.f_frsize
        self.f_bavail = 1


def test_a_really_full_filesystem(demo: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own with a 4 MB tmpfs; needs user namespaces or root, as CI has."""
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {tmp_path} && cd {ROOT} &&
        {sys.executable} -c 'import sys; from moesurgery.cli import main; sys.exit(main())' \\
            rescale {demo} --top-k 3 -o {tmp_path}/out; echo "code $?"; ls -A {tmp_path}
    """
    flags = ["-m"] if os.getuid() == 0 else ["-Urm"]
    done = subprocess.run(["unshare", *flags, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert "code 2" in done.stdout, done.stderr
    assert "free" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "code 2"  # nothing is left in the folder


def slow_writer(model: Path, out: Path) -> subprocess.Popen[str]:
    """Start a process that writes one megabyte every half second."""
    program = f"""
import sys, time
from moesurgery.cli import main
from moesurgery.write import shard
from moesurgery.write import copy_bytes
fast = copy_bytes.write_full
def slow(*a):
    time.sleep(0.5); fast(*a)
copy_bytes.write_full = slow
sys.exit(main(["rescale", {str(model)!r}, "--top-k", "3", "--scale", "1.5", "-o", {str(out)!r}, "-j", "1"]))
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 seconds")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(demo: Path, plan: Plan, tmp_path: Path, how: signal.Signals, ok: Cli) -> None:
    before = digest(demo)
    out = tmp_path / "out"
    process = slow_writer(demo, out)
    wait_for(lambda: list((tmp_path / "out.partial" / ".moesurgery").glob("*.safetensors.json")))
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert not out.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "resumes it" in errors
        assert "Traceback" not in errors
    assert digest(demo) == before
    assert "from the interrupted job" in ok("rescale", demo, "--top-k", 3, "--scale", 1.5, "-o", out).out
    write_plan(plan, tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


def test_a_source_that_shrinks_while_it_is_read(demo: Path, tmp_path: Path, cli: Cli) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    os.truncate(model / "model-00002-of-00003.safetensors", 1_000_000)
    with pytest.raises(moesurgery.SurgeryError, match="before its header says"):
        write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_kill_left_in_the_working_folder_does_not_block_resuming(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_plan(plan, out, WriteOptions(jobs=1), watch=stop_after(8_000_000))
    left = tmp_path / "out.partial" / ".moesurgery" / "tmpabc.tmp"  # as a killed trial of reflinks leaves it
    left.mkdir()
    (left / "clone").write_bytes(b"x")
    (tmp_path / "out.partial" / "old.json").write_text("{}")  # and a side file that the input has lost since
    assert write_plan(plan, out).resumed
    write_plan(plan, tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(plan: Plan, tmp_path: Path, link: bool) -> None:
    mine = tmp_path / ("elsewhere" if link else "out.partial")
    mine.mkdir()
    (mine / "model-00009-of-00009.safetensors").write_bytes(b"mine")
    if link:
        (tmp_path / "out.partial").symlink_to(mine)
    with pytest.raises(OutputError, match="no unfinished job of ours"):
        write_plan(plan, tmp_path / "out", WriteOptions(force=True))
    assert digest(mine) == {"model-00009-of-00009.safetensors": b"mine"}


def test_force_looks_again_before_it_replaces(plan: Plan, tmp_path: Path) -> None:
    """What came into the old output while the new one was written is not deleted with it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_bytes(b"stale")
    watch = JobControl(progress=lambda count: (out / "thesis.docx").write_text("mine") and None)
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        write_plan(plan, out, WriteOptions(force=True), watch=watch)
    assert set(digest(out)) == {"old.safetensors", "thesis.docx"}
    (out / "thesis.docx").unlink()
    assert write_plan(plan, out, WriteOptions(force=True)).resumed == 3


def test_what_was_not_synced_is_not_trusted_after_a_restart(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        write_plan(plan, out, WriteOptions(jobs=1, durable=False), watch=stop_after(8_000_000))
    with monkeypatch.context() as patch:
        patch.setattr("moesurgery.write.shard_manifest.boot_id", lambda: "another run of the machine")
        with pytest.raises(StoppedError):
            write_plan(plan, out, WriteOptions(jobs=1, durable=False), watch=stop_after(1))
    assert write_plan(plan, out).resumed  # but within one run of the machine it is kept


def test_a_link_out_of_the_checkpoint_is_refused_before_any_work(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    (model / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(moesurgery.SurgeryError, match="outside the checkpoint"):
        write_plan(plan_of(open_checkpoint(model)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [model]


def test_shards_in_a_folder_stay_there(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    (model / "weights").mkdir()
    for shard in model.glob("*.safetensors"):
        shard.rename(model / "weights" / shard.name)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    write_plan(apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5), tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.shards == [f"weights/model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_half_a_surrogate_pair_in_the_config(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    config = {**json.loads((model / "config.json").read_text()), "zebra": "a\ud800b"}
    (model / "config.json").write_text(json.dumps(config))
    write_plan(apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale="none"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["zebra"] == "a\ud800b"


@pytest.mark.parametrize("operation", ["rescale", None])
def test_a_read_error_in_the_middle_names_the_source(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str | None
) -> None:
    """A bad sector: every read of the second shard's second megabyte fails with EIO."""
    plan = plan_of(open_checkpoint(demo))
    if operation:
        plan = apply(plan, operation, top_k=3, scale=1.5)
    bad = (demo / "model-00002-of-00003.safetensors").stat().st_ino
    copy, read = os.copy_file_range, os.preadv

    def touches(descriptor: int, start: int, length: int) -> bool:
        return os.fstat(descriptor).st_ino == bad and start < 2_000_000 < start + length

    def failing_copy(source: int, target: int, count: int, start: int, to: int) -> int:
        if touches(source, start, count):
            raise OSError(errno.EIO, "Input/output error")
        return copy(source, target, count, start, to)

    def failing_read(descriptor: int, buffers: list[Any], offset: int) -> int:
        if touches(descriptor, offset, len(buffers[0])):
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", failing_copy)
        patch.setattr(os, "preadv", failing_read)
        with pytest.raises(moesurgery.SurgeryError, match=r"model-00002-of-00003.*Input/output error"):
            write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    write_plan(plan, tmp_path / "out")  # the disk has recovered
    write_plan(plan, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


# Sizes


def sparse_checkpoint(folder: Path, shards: int, shard_gb: float, layers_per_shard: int = 1) -> None:
    """A Mixtral of shards * shard_gb GB that takes no space: headers, and holes for data."""
    folder.mkdir()
    hidden, experts = 1024, 8
    width = int(shard_gb * 1e9 / 2 / 3 / experts / hidden / layers_per_shard)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        shapes: dict[str, list[int]] = {}
        for layer in range(i * layers_per_shard, (i + 1) * layers_per_shard):
            p = f"model.layers.{layer}."
            shapes[f"{p}block_sparse_moe.gate.weight"] = [experts, hidden]
            for e in range(experts):
                shapes[f"{p}block_sparse_moe.experts.{e}.w1.weight"] = [width, hidden]
                shapes[f"{p}block_sparse_moe.experts.{e}.w2.weight"] = [hidden, width]
                shapes[f"{p}block_sparse_moe.experts.{e}.w3.weight"] = [width, hidden]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": 2, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": shards * layers_per_shard}))


@pytest.mark.parametrize("link", [False, True])
def test_a_terabyte_edited_in_its_config_alone_takes_no_space(tmp_path: Path, ok: Cli, link: bool) -> None:
    sparse_checkpoint(tmp_path / "huge", shards=10, shard_gb=100)
    arguments = ["--link"] if link else []
    ok("rescale", tmp_path / "huge", "--top-k", 3, "--scale", "none", "-o", tmp_path / "out", *arguments)
    found = open_checkpoint(tmp_path / "out")
    assert found.stored_bytes > 0.99e12
    assert found.config["num_experts_per_tok"] == 3
    taken = sum(f.stat().st_blocks * 512 for f in (tmp_path / "out").iterdir())
    assert taken < 1_000_000


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Rescaling 0.4 GB and 1.6 GB peaks within 20 MB of each other, far below either."""
    peaks = []
    for gigabytes in (0.4, 1.6):
        folder = tmp_path / f"m{gigabytes}"
        sparse_checkpoint(folder, shards=2, shard_gb=gigabytes / 2)
        arguments = [
            "rescale",
            str(folder),
            "--top-k",
            "3",
            "--scale",
            "norm",
            "-q",
            "--no-fsync",
            "-o",
            f"{folder}-out",
        ]
        program = (
            f"import sys; from moesurgery.cli import main; code = main({arguments!r});"
            # Not ru_maxrss: that starts at the parent's, and pytest has torch in it.
            "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1]); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) // 1024)
        shutil.rmtree(str(folder) + "-out")
    assert max(peaks) < 350
    assert abs(peaks[1] - peaks[0]) < 20


def test_loads_in_transformers_with_nothing_missing(plan: Plan, tmp_path: Path) -> None:
    from tests.tiny import load

    write_plan(plan, tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.num_experts_per_tok == 3
    with torch.no_grad():
        assert bool(model(torch.tensor([[0, 5, 6]])).logits.isfinite().all())
