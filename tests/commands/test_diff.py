"""`moesurgery diff`: what differs, and by how much, against torch on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery.checkpoint.decode import numbers
from tests.broken import BrokenCheckpoint, make_broken
from tests.conftest import Result

Cli = Callable[..., Result]
MOE = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
CHANGED, CAST, RESHAPED, GONE = (
    MOE.format(0, 0, "w2"),
    MOE.format(1, 1, "w1"),
    MOE.format(0, 0, "w3"),
    MOE.format(1, 1, "w2"),
)


@pytest.fixture
def pair(models: Any, tmp_path: Path) -> tuple[Path, BrokenCheckpoint]:
    """A model in bfloat16, and a copy of it."""
    model = models("mixtral", dtype="bfloat16")
    return model, make_broken(model, tmp_path / "other")


def test_a_copy_is_the_same(pair: tuple[Path, BrokenCheckpoint], cli: Cli) -> None:
    model, other = pair
    other.single()  # in another number of shards
    result = cli("diff", model, other.folder)
    assert (result.code, result.out.split(":")[0]) == (0, "the same")
    assert cli("diff", model, other.folder, "--json").json["same"] is True


def test_every_kind_of_difference_and_its_size(pair: tuple[Path, BrokenCheckpoint], cli: Cli) -> None:
    model, other = pair
    before = other.tensors()
    noise = torch.randn(before[CHANGED].shape, generator=torch.Generator().manual_seed(1))
    changed = (before[CHANGED].float() + 0.1 * noise).bfloat16()
    other.update(
        {CHANGED: changed, CAST: before[CAST].half(), RESHAPED: before[RESHAPED][:40], GONE: None, "new": torch.ones(2)}
    )
    other.config(num_experts_per_tok=3)
    result = cli("diff", model, other.folder, "--json")
    assert result.code == 1
    found = {tensor["name"]: tensor for tensor in result.json["tensors"]}
    kinds = {name: tensor["kind"] for name, tensor in found.items()}
    assert kinds == {CHANGED: "values", CAST: "dtype", RESHAPED: "shape", GONE: "removed", "new": "added"}
    assert result.json["equal"] == len(before) - 4
    assert result.json["config"] == [{"key": "num_experts_per_tok", "before": 2, "after": 3}]
    for name, after in ((CHANGED, changed), (CAST, before[CAST].half())):
        a, b = before[name].double().flatten(), after.double().flatten()
        assert found[name]["max_abs"] == pytest.approx(float((a - b).abs().max()), rel=1e-6, abs=1e-12)
        assert found[name]["relative"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6, abs=1e-12)
        assert found[name]["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-6)
    assert found[CHANGED]["max_abs"] > 0.1
    text = cli("diff", model, other.folder).out
    assert "config.json: num_experts_per_tok: 2 -> 3" in text
    assert f"5 tensors differ, {len(before) - 4} are equal" in text
    assert CHANGED not in text  # tensors of one kind share a line
    assert CHANGED in cli("diff", model, other.folder, "--each").out


def test_what_is_finite_in_one_only_is_counted(pair: tuple[Path, BrokenCheckpoint], cli: Cli) -> None:
    model, other = pair
    other.edit(CHANGED, lambda t: t.view(-1)[:3].fill_(float("nan")) is None or None)
    (found,) = cli("diff", model, other.folder, "--json").json["tensors"]
    assert (found["not_finite"], found["max_abs"], found["cosine"]) == (3, 0.0, 1.0)


def test_names_are_escaped(pair: tuple[Path, BrokenCheckpoint], cli: Cli) -> None:
    model, other = pair
    other.config(**{"\x1b[2J": "\x1b]0;title\x07"})
    result = cli("diff", model, other.folder)
    assert result.code == 1
    assert "\x1b" not in result.out


FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_bit_floats_are_what_torch_makes_of_them(dtype: str) -> None:
    codes = bytes(range(256))
    expected = torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(FLOATS[dtype]).float().numpy()
    np.testing.assert_array_equal(numbers(codes, dtype), expected)
