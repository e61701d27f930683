"""Opening checkpoints: indexes, links, containment, and every way in which a directory can be wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moesurgery import open_checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo model that a test may break."""
    return Path(shutil.copytree(demo, tmp_path / "model"))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_opens_headers_only(demo: Path) -> None:
    checkpoint = open_checkpoint(demo)
    assert checkpoint.name == "model"
    assert len(checkpoint.shards) == 3
    assert checkpoint.stored_bytes == sum(t.nbytes for t in checkpoint.tensors.values())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(checkpoint.side_files)


def test_names_keep_file_order(demo: Path) -> None:
    checkpoint = open_checkpoint(demo)
    starts = [(t.file, t.start) for t in checkpoint.tensors.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("no/such/folder", "no such directory", ""),
        ("mistralai/Mixtral-8x7B-v0.1", "no such directory", "hf://mistralai/Mixtral-8x7B-v0.1"),
    ],
)
def test_a_bare_name_never_reaches_the_network(reference: str, message: str, hint: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(reference)
    assert hint in (caught.value.hint or "")


def test_a_folder_of_models_gets_a_hint(demo: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(demo.parent)
    assert "model" in (caught.value.hint or "")
    assert caught.value.message == f"{demo.parent.name} has no config.json"


def test_the_folder_of_a_hub_cache_gets_a_hint(demo: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123abc"
    shutil.copytree(demo, snapshot)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "models--acme--tiny")
    assert "snapshots/0123abc" in (caught.value.hint or "")


def test_missing_shard(copy: Path) -> None:
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(copy)


def test_a_shard_without_the_right_to_read_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def forbidden(path: Path, flags: int, *more: int) -> int:
        if str(path).endswith("model-00002-of-00003.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        open_checkpoint(copy)
    assert caught.value.hint == "ask for the right to read it"


def test_truncated_shard(copy: Path) -> None:
    path = copy / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(copy)


@pytest.mark.parametrize("outside", ["../model/model-00001-of-00003.safetensors", "/etc/passwd", "a\\b", "c:/x", ""])
def test_an_index_cannot_name_a_file_outside(copy: Path, outside: str) -> None:
    def change(index: dict) -> None:
        index["weight_map"]["model.norm.weight"] = outside

    edit_index(copy, change)
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        open_checkpoint(copy)


def test_a_link_out_of_the_checkpoint_is_refused(copy: Path, tmp_path: Path) -> None:
    shard = copy / "model-00001-of-00003.safetensors"
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(copy)


def test_a_hub_cache_may_link_to_its_blobs(demo: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in demo.iterdir():
        blob = cache / "blobs" / f"blob-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "tiny"
    assert checkpoint.source.identity == "hf://acme/tiny@0123abcd"
    assert len(checkpoint.tensors) == len(open_checkpoint(demo).tensors)


def test_a_pipe_in_place_of_a_shard_does_not_hang(copy: Path) -> None:
    shard = copy / "model-00001-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(copy)


def test_index_maps_a_tensor_to_the_wrong_shard(copy: Path) -> None:
    def change(index: dict) -> None:
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"

    edit_index(copy, change)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_checkpoint(copy)


def test_index_names_a_tensor_that_is_not_there(copy: Path) -> None:
    edit_index(copy, lambda index: index["weight_map"].update({"ghost.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="ghost"):
        open_checkpoint(copy)


def test_a_tensor_that_the_index_does_not_list(copy: Path) -> None:
    edit_index(copy, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="not listed"):
        open_checkpoint(copy)


def test_single_file_and_index_together_are_ambiguous(copy: Path) -> None:
    shutil.copy(copy / "model-00001-of-00003.safetensors", copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="both"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}']
)
def test_broken_index(copy: Path, content: str) -> None:
    (copy / INDEX).write_text(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(copy)


def test_repeated_name_in_the_index(copy: Path) -> None:
    text = (copy / INDEX).read_text()
    line = next(line for line in text.splitlines() if "model.norm.weight" in line).rstrip(",")
    (copy / INDEX).write_text(text.replace(line, line + ",\n" + line, 1))
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(copy)


@pytest.mark.parametrize("content", ["", "nonsense", "[1]"])
def test_broken_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(copy)


def test_infinity_in_a_config_is_kept(copy: Path, tmp_path: Path) -> None:
    from moesurgery import apply, plan_of, write_plan

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    write_plan(apply(plan_of(open_checkpoint(copy)), "rescale", top_k=3, scale="none"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "pickles are never opened" in (caught.value.hint or "")


def test_other_weights_are_not_carried(copy: Path) -> None:
    (copy / "consolidated.safetensors").write_bytes(b"x")
    (copy / "pytorch_model.bin").write_bytes(b"x")
    (copy / "original").mkdir()
    (copy / "original" / "params.json").write_text("{}")
    checkpoint = open_checkpoint(copy)
    assert set(checkpoint.other_weights) == {"consolidated.safetensors", "pytorch_model.bin"}
    assert "original/params.json" in checkpoint.side_files
    assert "consolidated.safetensors" not in checkpoint.side_files


def test_shards_without_an_index(copy: Path) -> None:
    (copy / INDEX).unlink()
    assert len(open_checkpoint(copy).shards) == 3


def test_reads_are_confined(demo: Path) -> None:
    with pytest.raises(CheckpointError, match="leaves"):
        LocalSource(demo).read("../../../pyproject.toml", 0, 10)


def test_folders_deeper_than_the_stack_are_listed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("x.json").write_text("{}")
    assert "/".join(["d"] * 1100) + "/x.json" in open_checkpoint(copy).side_files
    os.unlink("x.json")  # by hand: pytest's own clean-up is recursive
    for _ in range(1100):
        os.chdir("..")
        os.rmdir("d")


def test_what_is_no_regular_file_is_named_and_never_listed(copy: Path, tmp_path: Path) -> None:
    os.mkfifo(copy / "pipe")
    (copy / "nothing").symlink_to("missing")
    (copy / "folder").symlink_to(tmp_path)
    source = LocalSource(copy)
    assert source.irregular() == {"pipe": "a pipe", "nothing": "a link to nothing", "folder": "a link to a folder"}
    assert not set(source.irregular()) & set(source.files())


def test_a_remote_listing_cannot_name_a_file_outside(demo: Path, tmp_path: Path) -> None:
    """An object store's keys may hold `..`: they are left out, so that no output is written by such a name."""
    import fsspec

    store = fsspec.filesystem("memory")
    for file in demo.iterdir():
        store.pipe(f"/bucket/model/{file.name}", file.read_bytes())
    store.store["/bucket/model/../../evil.json"] = store.store["/bucket/model/config.json"]
    try:
        checkpoint = open_checkpoint("memory://bucket/model")
        assert not [file for file in checkpoint.file_sizes if ".." in file]
        assert checkpoint.source.irregular() == {"../../evil.json": "a path out of the checkpoint"}
    finally:
        store.rm("/bucket", recursive=True)


def test_incomplete_shards_without_an_index_are_refused(copy: Path) -> None:
    (copy / INDEX).unlink()
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(copy)


def test_an_index_names_safetensors_only(copy: Path) -> None:
    """Else a shard could be called README.md, and the card would be written over its copy."""
    (copy / "model-00001-of-00003.safetensors").rename(copy / "README.md")

    def change(index: dict) -> None:
        for name, file in index["weight_map"].items():
            index["weight_map"][name] = "README.md" if "00001-of" in file else file

    edit_index(copy, change)
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(copy)


def test_a_config_nested_too_deeply(copy: Path) -> None:
    (copy / "config.json").write_text('{"a":' + "[" * 500 + "]" * 500 + "}")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        open_checkpoint(copy)
