"""Inputs that change under a running job: never a mixture of two models, whatever changes, and whenever."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurgery import WriteOptions, apply, open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.digest import sampled_digest, whole_digest
from moesurgery.checkpoint.remote_source import RemoteSource
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError, OutputError
from moesurgery.merge.merge_recipe import load_merge_recipe
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import open_repair
from moesurgery.stats.statistics_file import load_stats
from moesurgery.write import copy_bytes, expected_output
from moesurgery.write.job_control import JobControl
from moesurgery.write.open_folder import OpenFolder
from tests.conftest import Result

Cli = Callable[..., Result]
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


def replaced(file: Path) -> None:
    """Another file of that name, as `mv` puts it there: the same header, other weights."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (file.parent / "x.tmp").write_bytes(data)
    os.utime(file.parent / "x.tmp", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(file.parent / "x.tmp", file)


def overwritten(file: Path) -> None:
    """The same file with other weights in it, as `cp` writes them."""
    time.sleep(0.03)  # the time of a write is known to some milliseconds
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x11")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


def removed(file: Path) -> None:
    file.unlink()


def touched(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


CHANGES = [replaced, overwritten, cut, removed, touched]
SAID = {
    "replaced": "it was replaced by another file",
    "overwritten": "it was written to",
    "cut": "bytes now, it had",
    "removed": "No such file or directory",
    "touched": "it was written to",
}


def refused(error: pytest.ExceptionInfo[CheckpointError], file: Path, change: Callable[[Path], None]) -> None:
    """The message says what changed and how; the hint, what to do."""
    message = error.value.message
    if "before its header says" in message:  # it ends in the middle of what is read
        assert change is cut
    elif f"{file} is missing" in message:
        assert change is removed
        assert error.value.hint == "copy or download the checkpoint again"
    else:
        assert f"{file} changed while it was in use: " in message
        assert SAID[change.__name__] in message
        assert "wait until nothing writes to it" in str(error.value.hint)


def during(action: Callable[[], None], after: int = 1) -> JobControl:
    """Do something once, when some bytes have been written."""
    seen = 0
    done = False

    def progress(count: int) -> None:
        nonlocal seen, done
        seen += count
        if seen >= after and not done:
            done = True
            action()

    return JobControl(progress)


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_a_job_runs(
    model: Path, tmp_path: Path, change: Callable[[Path], None], shard: int, jobs: int
) -> None:
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    with pytest.raises(CheckpointError) as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=jobs), watch=during(lambda: change(model / SHARDS[shard])))
    refused(caught, model / SHARDS[shard], change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("link", [False, True])
def test_a_shard_that_is_copied_whole(
    model: Path, tmp_path: Path, change: Callable[[Path], None], link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By copies, links and clones: what the file is when the copy is done counts."""
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale="none")
    real: Callable[..., Any] = OpenFolder.link if link else copy_bytes.copy_file

    def copied(*arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        source = arguments[1 if link else 0]  # a link is made by the folder that it is in
        if source.name == SHARDS[1]:
            change(source)
        return result

    monkeypatch.setattr(OpenFolder if link else copy_bytes, real.__name__, copied)
    monkeypatch.setattr(copy_bytes, "clone", lambda *_, **__: False)
    with pytest.raises(CheckpointError) as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=1, link=link))
    refused(caught, model / SHARDS[1], change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json", SHARDS[0]])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_before_the_output_is_published(
    model: Path, tmp_path: Path, file: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, config, index, and what is copied beside them, after the last shard is done."""
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    real = expected_output.checked_shard

    def checked(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        if arguments[1].name == SHARDS[2]:
            change(model / file)
        return found

    monkeypatch.setattr(expected_output, "checked_shard", checked)
    with pytest.raises(CheckpointError) as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=1))
    refused(caught, model / file, change)
    assert not (tmp_path / "out").exists()


def test_what_is_not_read_may_change(model: Path, tmp_path: Path) -> None:
    (model / "other.bin").write_bytes(b"1")
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    write_plan(plan, tmp_path / "out", watch=during(lambda: overwritten(model / "other.bin")))
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_a_header_belongs_to_the_file_that_was_listed(
    model: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalSource.files

    def listed(source: LocalSource) -> dict[str, int]:
        found = real(source)
        change(model / SHARDS[1])
        return found

    monkeypatch.setattr(LocalSource, "files", listed)
    with pytest.raises(CheckpointError, match="changed while it was in use") as caught:
        open_checkpoint(model)
    refused(caught, model / SHARDS[1], change)


def test_values_that_a_plan_is_made_by_are_those_of_the_header(model: Path) -> None:
    """The embedding, from which factors are estimated."""
    plan = plan_of(open_checkpoint(model))
    for shard in SHARDS:
        replaced(model / shard)
    with pytest.raises(CheckpointError, match="was replaced by another file"):
        apply(plan, "rescale", top_k=3)


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_a_job_in_other_processes(model: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5)
    change(model / SHARDS[1])

    def executor() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(2, mp_context=get_context("spawn"))

    with pytest.raises(CheckpointError) as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=2), make_executor=executor)
    refused(caught, model / SHARDS[1], change)


def test_sources_remember_across_processes(model: Path) -> None:
    source = LocalSource(model)
    source.files()
    again = pickle.loads(pickle.dumps(source))
    replaced(model / SHARDS[0])
    with pytest.raises(CheckpointError, match="was replaced"):
        again.read(SHARDS[0], 0, 8)


@pytest.mark.parametrize("which", ["a", "b"])
def test_every_model_of_a_merge_is_watched(model: Path, tmp_path: Path, which: str, cli: Cli) -> None:
    for name in ("a", "b"):
        shutil.copytree(model, tmp_path / name)
    recipe = tmp_path / "r.yml"
    listed = "".join(f"- model: {tmp_path / name}\n" for name in ("a", "b"))
    recipe.write_text(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n{listed}")
    plan = load_merge_recipe(recipe).plan()
    with pytest.raises(CheckpointError, match=rf"{which}/{SHARDS[2]} changed while it was in use"):
        write_plan(
            plan, tmp_path / "out", WriteOptions(jobs=1), watch=during(lambda: replaced(tmp_path / which / SHARDS[2]))
        )


# What is read beside the model


def adapter_of(folder: Path, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.full((2, 192), value), f"{module}.lora_B.weight": torch.ones(192, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def adapted(model: Path, adapter: Path, folder: Path) -> Plan:
    (folder / "r.yml").write_text(f"merge_method: passthrough\nmodels:\n- model: {model}+{adapter}\n")
    return load_merge_recipe(folder / "r.yml").plan()


def repair_of(model: Path, folder: Path, value: float) -> Path:
    """A repair with fitted matrices for every block."""
    folder.mkdir(exist_ok=True)
    anatomy = plan_of(open_checkpoint(model)).anatomy
    layers = []
    for number, block in enumerate(anatomy.main_blocks):
        shape = load_all(model)[f"model.layers.{block.layer}.block_sparse_moe.experts.0.w2.weight"].shape
        save_file({"0.down": torch.full(shape, value)}, folder / f"layer-{number:03}.safetensors")
        layers.append(
            {"layer": block.where, "factors": None, "file": f"layer-{number:03}.safetensors", "skipped": []}
            | {"tokens": [9] * block.experts, "error_before": 1.0, "error_after": 0.5}
        )
    document = {"format": "moesurgery refit 1", "kind": "down", "tokens": 9, "layers": layers}
    (folder / "refit.json").write_text(json.dumps(document))
    return folder


def load_all(model: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(model.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["adapter", "repair"])
def test_an_adapter_or_a_repair_that_changes(
    model: Path, tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    if kind == "adapter":
        plan = adapted(model, adapter_of(tmp_path / "beside", 0.5), tmp_path)
        file = tmp_path / "beside" / "adapter_model.safetensors"
    else:
        repair = repair_of(model, tmp_path / "beside", 0.5)
        plan = apply(plan_of(open_checkpoint(model)), "refit", repair=str(repair))
        file = sorted(repair.glob("*.safetensors"))[-1]
    with pytest.raises(CheckpointError) as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=1), watch=during(lambda: change(file)))
    refused(caught, file, change)
    assert not (tmp_path / "out").exists()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["adapter", "repair"])
def test_a_job_does_not_resume_with_another_adapter_or_repair(model: Path, tmp_path: Path, kind: str) -> None:
    """Their names and headers are the same; shards that were made with the old one would stay."""

    def planned(value: float) -> Plan:
        if kind == "adapter":
            return adapted(model, adapter_of(tmp_path / "beside", value), tmp_path)
        return apply(plan_of(open_checkpoint(model)), "refit", repair=str(repair_of(model, tmp_path / "beside", value)))

    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        write_plan(planned(0.5), tmp_path / "out", WriteOptions(jobs=1), watch=during(stop, after=8_000_000))
    with pytest.raises(OutputError, match="of another recipe or of changed inputs") as caught:
        write_plan(planned(0.25), tmp_path / "out", WriteOptions(jobs=1))
    assert "start over with --force" in str(caught.value.hint)


def test_a_repair_is_one_repair(model: Path, tmp_path: Path) -> None:
    """What refit.json says and the weights beside it are of one moment."""
    repair = repair_of(model, tmp_path / "beside", 0.5)
    found = open_repair(repair)
    file = repair / "layer-000.safetensors"
    replaced(file)
    with pytest.raises(CheckpointError, match=r"layer-000\.safetensors changed while it was in use"):
        found.matrices(next(iter(found.layers)))


def test_statistics_that_change_while_they_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesurgery.stats import statistics_file
    from tests.unit.checkpoint.test_not_finite import statistics

    path = statistics(model).save(tmp_path / "s.safetensors")
    assert load_stats(path).sha256 == statistics_file.digest(path)
    real = statistics_file.digest

    def digested(path: Path) -> str:
        found = real(path)
        replaced(path)
        return found

    monkeypatch.setattr(statistics_file, "digest", digested)
    with pytest.raises(CheckpointError, match=r"s\.safetensors changed while it was in use"):
        load_stats(path)
    with pytest.raises(CheckpointError, match="cannot be read as statistics"):
        load_stats(tmp_path / "nothing.safetensors")


def test_a_measurement_ends_when_its_model_changes(model: Path, tmp_path: Path, cli: Cli) -> None:
    from moesurgery.forward.meta_model import MetaModel

    meta_model = MetaModel(plan_of(open_checkpoint(model)), ("cpu",), "float32")
    for shard in SHARDS:
        replaced(model / shard)
    unit = next(iter(meta_model.units.values()))
    with pytest.raises(CheckpointError, match="was replaced by another file"):
        meta_model.load(unit)


# Other places than folders


@pytest.mark.parametrize("change", [overwritten, cut])
@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_files_behind_a_url_are_watched_too(
    model: Path, tmp_path: Path, protocol: str, change: Callable[[Path], None]
) -> None:
    import fsspec

    if protocol == "memory":
        system = fsspec.filesystem("memory")
        for file in model.iterdir():
            system.pipe_file(f"/watched/{file.name}", file.read_bytes())
        url = "memory://watched"
    else:
        url = f"file://{model}"

    def changed() -> None:
        change(model / SHARDS[2])
        if protocol == "memory":
            time.sleep(0.01)
            system.pipe_file(f"/watched/{SHARDS[2]}", (model / SHARDS[2]).read_bytes())

    plan = apply(plan_of(open_checkpoint(url)), "rescale", top_k=3, scale=1.5)
    with pytest.raises(CheckpointError, match=r"changed while it was in use|bytes .* were asked for") as caught:
        write_plan(plan, tmp_path / "out", WriteOptions(jobs=1), watch=during(changed))
    assert SHARDS[2] in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_short_answer_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RemoteSource(f"file://{model}", "file://model")
    size = source.files()[SHARDS[0]]
    system, _ = source._open()
    real = type(system).cat_file
    monkeypatch.setattr(type(system), "cat_file", lambda *a, **k: real(*a, **k)[:-3])
    for read in (
        lambda: source.read(SHARDS[0], 16, 64),
        lambda: sampled_digest(source, SHARDS[0], size),
        lambda: whole_digest(source, SHARDS[0], size),
    ):
        with pytest.raises(CheckpointError, match="were asked for, the server answered with"):
            read()


# Digests and the disk


@pytest.mark.parametrize("short", [1, 1000, 4095])
def test_digests_do_not_depend_on_how_much_comes_at_a_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    source, size = LocalSource(model), (model / SHARDS[0]).stat().st_size
    whole = sampled_digest(source, SHARDS[0], size), whole_digest(source, SHARDS[0], size)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: real(fd, min(count, max(short, count // 2)), at))
    assert (sampled_digest(source, SHARDS[0], size), whole_digest(source, SHARDS[0], size)) == whole


def test_a_digest_of_a_file_that_ends_too_early_is_refused(model: Path) -> None:
    source, size = LocalSource(model), (model / SHARDS[0]).stat().st_size
    for digest in (sampled_digest, whole_digest):
        with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} ends at byte {size:,}") as caught:
            digest(source, SHARDS[0], size + 100)
        assert "download or copy the file again" in str(caught.value.hint)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("scale", ["none", 1.5])
def test_a_resume_that_waits_for_the_disk_waits_for_what_did_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool, scale: Any
) -> None:
    plan = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=scale)

    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        write_plan(
            plan,
            tmp_path / "out",
            WriteOptions(jobs=1, link=link, durable=False),
            watch=during(stop, after=sum((model / s).stat().st_size for s in SHARDS[:2]) - 100_000),
        )
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    written = write_plan(plan, tmp_path / "out", WriteOptions(jobs=1, link=link))
    assert written.resumed
    assert synced >= {*SHARDS, "config.json", "moesurgery.json", "model.safetensors.index.json", "out.partial"}


def test_folders_of_shards_are_waited_for(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "sub").mkdir()
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for shard in SHARDS:
        (model / shard).rename(model / "sub" / shard)
    index["weight_map"] = {name: f"sub/{file}" for name, file in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    write_plan(apply(plan_of(open_checkpoint(model)), "rescale", top_k=3, scale=1.5), tmp_path / "out")
    assert synced >= {*SHARDS, "sub", "out.partial"}
