"""Which tensor goes into which shard, and where in it: what filesystems that share blocks depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.file_reader import PAGE
from moesurgery.expr.nodes import Copy
from moesurgery.write import shard_layout
from moesurgery.write.shard import make_header
from moesurgery.write.shard_units import units_of
from moesurgery.write.write_plan import WriteOptions
from tests.tiny import build, load, logits, read_tensors, same_bits


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dense model in several shards, whose FFN matrices are whole pages."""
    path = tmp_path_factory.mktemp("dense") / "llama"
    build("llama", intermediate_size=64, num_hidden_layers=4).save_pretrained(path, max_shard_size="60KB")
    assert len(open_checkpoint(path).shards) >= 3
    return path


def test_copies_of_experts_lie_at_the_sources_place_in_the_page(sharded: Path) -> None:
    plan = apply(plan_of(open_checkpoint(sharded)), "upcycle", experts=8, proof=False)
    shared = 0
    for task in shard_layout.shard_tasks(plan):
        header = make_header(task.entries, task.metadata, task.phase)
        for piece, at in units_of(task.entries, len(header)):
            if isinstance(piece, Copy) and piece.nbytes >= PAGE:
                assert (piece.start - at) % PAGE == 0
                shared += piece.nbytes
    assert shared > 0.8 * plan.nbytes


def test_shards_that_grow_are_cut_and_hold_tensors_of_one_source_shard(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = apply(plan_of(open_checkpoint(sharded)), "upcycle", experts=8, proof=False)
    whole = shard_layout.shard_tasks(plan)
    assert [task.name for task in whole] == plan.checkpoint.shards
    monkeypatch.setattr(shard_layout, "SHARD_BYTES", 100_000)
    cut = shard_layout.shard_tasks(plan)
    assert len(cut) > len(whole)
    assert [name for task in cut for name, _ in task.entries] == [name for task in whole for name, _ in task.entries]
    assert all(len({plan.shard_of[name] for name, _ in task.entries}) == 1 for task in cut)
    largest = max(100_000, *(header.file_size for header in plan.checkpoint.headers))
    assert all(task.data_bytes <= largest for task in cut)
    write_plan(plan, tmp_path / "cut", WriteOptions(durable=False))
    monkeypatch.undo()
    write_plan(plan, tmp_path / "whole", WriteOptions(durable=False))
    a, b = read_tensors(tmp_path / "cut"), read_tensors(tmp_path / "whole")
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)
    assert float((logits(load(tmp_path / "cut")) - logits(load(sharded))).abs().max()) <= 1e-5


def test_a_wanted_size_goes_over_the_sources_boundaries(sharded: Path) -> None:
    plan = replace(plan_of(open_checkpoint(sharded)), max_shard_size=10_000_000)
    assert [task.name for task in shard_layout.shard_tasks(plan)] == ["model.safetensors"]
