"""Experts with changed neurons: parts of an FFN, neurons drawn anew, noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.surgery.upcycle.balanced_clusters import balanced_clusters
from tests.dense import LLAMA3, save_dense
from tests.tiny import read_tensors, same_bits

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
DENSE = "model.layers.{}.mlp.{}_proj.weight"
NAMES = {"w1": "gate", "w3": "up", "w2": "down"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    save_dense(path, "llama", **LLAMA3, intermediate_size=256)
    return path


def upcycled(model: Path, out: Path, **parameters: Any) -> dict[str, torch.Tensor]:
    write_plan(apply(plan_of(open_checkpoint(model)), "upcycle", proof=False, **parameters), out)
    return read_tensors(out)


def neurons(tensors: dict[str, torch.Tensor], layer: int, expert: int | None = None) -> torch.Tensor:
    """Return the neurons of an FFN or expert as rows: gate, up and down side by side."""
    if expert is None:
        parts = {ours: tensors[DENSE.format(layer, ours)] for ours in NAMES.values()}
    else:
        parts = {ours: tensors[EXPERT.format(layer, expert, theirs)] for theirs, ours in NAMES.items()}
    return torch.cat([parts["gate"], parts["up"], parts["down"].T], dim=1)


@pytest.mark.parametrize("method", ["random", "clusters"])
def test_a_split_has_every_neuron_once(llama: Path, tmp_path: Path, method: str) -> None:
    found = upcycled(llama, tmp_path / "out", experts=8, top_k=8, split=method)
    for layer in range(3):
        whole = neurons(read_tensors(llama), layer)
        parts = [neurons(found, layer, expert) for expert in range(8)]
        assert {len(part) for part in parts} == {32}
        down = slice(64, 96)
        for part in parts:
            part[:, down] /= 8  # gates of 1/8 each
        assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, whole.tolist()))
    assert sum(t.numel() for n, t in found.items() if ".experts." in n) == 3 * whole.numel()


def test_random_splits_differ_by_layer_and_seed(llama: Path, tmp_path: Path) -> None:
    whole = neurons(read_tensors(llama), 0)
    whole_1 = neurons(read_tensors(llama), 1)

    def members(tensors: dict[str, torch.Tensor], layer: int, of: torch.Tensor) -> list[int]:
        gate = tensors[EXPERT.format(layer, 0, "w1")]
        return [int((of[:, :32] == row).all(dim=1).nonzero()) for row in gate]

    a = upcycled(llama, tmp_path / "a", experts=4, split="random", seed=0)
    b = upcycled(llama, tmp_path / "b", experts=4, split="random", seed=1)
    assert members(a, 0, whole) != members(a, 1, whole_1)
    assert members(a, 0, whole) != members(b, 0, whole)
    assert members(a, 0, whole) != list(range(64))


def test_clusters_find_neurons_that_belong_together(tmp_path: Path) -> None:
    """Gate rows that point in a few planted directions, shuffled: every part must be one direction."""
    save_dense(tmp_path / "model", "llama", **LLAMA3, intermediate_size=64)
    tensors = read_tensors(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        directions = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:4]
        order = torch.randperm(64, generator=generator)
        lengths = torch.rand(64, 1, generator=generator) + 0.5
        rows = directions.repeat_interleave(16, 0) * lengths + 0.02 * torch.randn(64, 32, generator=generator)
        tensors[DENSE.format(layer, "gate")] = rows[order].contiguous()
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    found = upcycled(tmp_path / "model", tmp_path / "out", experts=4, split="clusters")
    for layer in range(3):
        for expert in range(4):
            rows = torch.nn.functional.normalize(found[EXPERT.format(layer, expert, "w1")], dim=1)
            assert float((rows @ rows.T).min()) > 0.8


def test_clusters_are_balanced_and_better_than_chance() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(96, 16)).astype(np.float32))
    labels = balanced_clusters(rows, 6, key=1)
    assert np.bincount(labels).tolist() == [16] * 6
    unit = torch.nn.functional.normalize(rows, dim=1)
    alike = torch.from_numpy(labels[:, None] == labels[None])
    near = float((unit @ unit.T)[alike].mean())
    chance = torch.from_numpy(np.random.default_rng(1).permutation(labels))
    assert near > float((unit @ unit.T)[chance[:, None] == chance[None]].mean()) + 0.1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_reinit_replaces_the_same_share_of_neurons_everywhere(llama: Path, tmp_path: Path, share: float) -> None:
    found = upcycled(llama, tmp_path / "out", experts=3, reinit=share)
    before = read_tensors(llama)
    chosen = []
    for expert in range(3):
        same = {
            ours: (found[EXPERT.format(1, expert, theirs)] == before[DENSE.format(1, ours)]).all(
                dim=0 if ours == "down" else 1
            )
            for theirs, ours in NAMES.items()
        }
        assert torch.equal(same["gate"], same["up"])
        assert torch.equal(same["gate"], same["down"])
        assert int((~same["gate"]).sum()) == round(256 * share)
        chosen.append(same["gate"])
        for theirs, ours in NAMES.items():
            drawn = neurons_of(found[EXPERT.format(1, expert, theirs)], ours)[~same["gate"]]
            replaced = neurons_of(before[DENSE.format(1, ours)], ours)[~same["gate"]]
            assert abs(float(drawn.mean() - replaced.mean())) < 5 * float(replaced.std()) / drawn.numel() ** 0.5
            assert float(drawn.std() / replaced.std()) == pytest.approx(1, abs=0.06)
    if share < 1:
        assert not torch.equal(chosen[0], chosen[1])


def neurons_of(matrix: torch.Tensor, role: str) -> torch.Tensor:
    return matrix.T if role == "down" else matrix


def test_noise_is_relative_to_each_tensor(llama: Path, tmp_path: Path) -> None:
    found = upcycled(llama, tmp_path / "out", experts=2, noise=0.1)
    before = read_tensors(llama)
    moved = []
    for expert in range(2):
        for theirs, ours in NAMES.items():
            old = before[DENSE.format(2, ours)]
            moved.append(found[EXPERT.format(2, expert, theirs)] - old)
            assert float(moved[-1].std() / old.std()) == pytest.approx(0.1, rel=0.05)
            assert abs(float((moved[-1] * old).mean())) < 0.02 * float(old.var())
    assert not torch.equal(moved[0], moved[3])


def test_reinit_of_half_precision_rounds_once(llama: Path, tmp_path: Path) -> None:
    a = upcycled(llama, tmp_path / "a", experts=2, reinit=0.5, noise=0.01, dtype="bfloat16")
    b = upcycled(llama, tmp_path / "b", experts=2, reinit=0.5, noise=0.01)
    assert all(same_bits(a[name], b[name].bfloat16()) for name in a)
