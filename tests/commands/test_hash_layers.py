"""DeepSeek-V4's hash layers: the table of each token's experts follows, as a loop over tokens says it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RefusedError
from tests.quantise import rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Models = Callable[..., Path]
TABLE, ROUTER = "model.layers.0.ffn.gate.tid2eid", "model.layers.0.ffn.gate.weight"


@pytest.fixture
def hashed(models: Models, tmp_path: Path) -> Path:
    """DeepSeek-V4 with a first layer whose table names distinct random experts."""
    tensors = read_tensors(models("deepseek_v4"))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(8, generator=generator)[:2] for _ in range(len(tensors[TABLE]))]
    rewrite(models("deepseek_v4"), tmp_path / "hashed", {**tensors, TABLE: torch.stack(rows)}, {})
    return tmp_path / "hashed"


def edited(model: Path, out: Path, operation: str, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), operation, **parameters), out)
    return out


def hidden_from_routers(tensors: dict[str, torch.Tensor], gone: list[int]) -> dict[str, torch.Tensor]:
    """Return selection biases with which no router of another layer ever chooses some experts."""
    biases = {name: tensor.clone() for name, tensor in tensors.items() if name.endswith("ffn.gate.bias")}
    for tensor in biases.values():
        tensor[gone] = -100.0
    assert biases
    return biases


def followed(table: Any, before: Any, after: Any, place: dict[int, int], width: int) -> list[list[int]]:
    """Brute force: one token, one place, one candidate after the other."""
    cosine = torch.nn.functional.cosine_similarity
    new_table = []
    for listed in table.tolist():
        new: list[Any] = []
        for old in listed[:width]:
            new.append(None if place.get(old) in new else place.get(old))
        new += [None] * (width - len(new))
        for slot, number in enumerate(new):
            if number is None:
                near = cosine(before[listed[slot % len(listed)]].double()[None], after.double()).tolist()
                new[slot] = max((n for n in range(len(after)) if n not in new), key=near.__getitem__)
        new_table.append(new)
    return new_table


def test_a_drop_sends_tokens_to_the_nearest_expert(hashed: Path, tmp_path: Path) -> None:
    kept = [1, 2, 4, 5, 6]
    before = read_tensors(hashed)
    out = edited(hashed, tmp_path / "out", "drop-experts", keep=kept)
    after = read_tensors(out)
    place = {old: new for new, old in enumerate(kept)}
    assert after[TABLE].dtype == torch.int64
    assert after[TABLE].tolist() == followed(before[TABLE], before[ROUTER], before[ROUTER][kept], place, 2)
    assert all(len(set(row)) == 2 for row in after[TABLE].tolist())
    assert read_config(out)["n_routed_experts"] == 5
    for name, tensor in after.items():
        if ".experts." not in name and "gate" not in name:
            assert same_bits(tensor, before[name]), name


def test_a_drop_of_experts_that_no_token_goes_to_changes_nothing(hashed: Path, tmp_path: Path) -> None:
    tensors = read_tensors(hashed)
    tensors |= {TABLE: tensors[TABLE] % 4, **hidden_from_routers(tensors, [4, 5, 6, 7])}
    rewrite(hashed, tmp_path / "never", tensors, {})
    out = edited(tmp_path / "never", tmp_path / "out", "drop-experts", experts=[4, 5, 6, 7])
    assert torch.allclose(logits(load(out)), logits(load(tmp_path / "never")), atol=1e-6)
    distinct = tensors[TABLE][:, 0] != tensors[TABLE][:, 1]
    assert torch.equal(read_tensors(out)[TABLE][distinct], tensors[TABLE][distinct])


def test_the_outcome_is_the_original_with_that_table(hashed: Path, tmp_path: Path) -> None:
    """transformers' forward pass on the original, its table rewritten in the old numbers."""
    kept = [0, 2, 3, 5, 7]
    out = edited(hashed, tmp_path / "out", "drop-experts", keep=kept)
    tensors = read_tensors(hashed)
    tensors |= {TABLE: torch.tensor(kept)[read_tensors(out)[TABLE]], **hidden_from_routers(tensors, [1, 4, 6])}
    rewrite(hashed, tmp_path / "reference", tensors, {})
    assert torch.allclose(logits(load(out)), logits(load(tmp_path / "reference")), atol=1e-6)
    assert not torch.allclose(logits(load(out)), logits(load(hashed)), atol=1e-3)


@pytest.mark.parametrize("router", ["dominant", "mean"])
def test_a_merge_makes_two_experts_of_a_token_one_and_another(hashed: Path, tmp_path: Path, router: str) -> None:
    before = read_tensors(hashed)
    groups = [[0, 3], [1], [2, 5, 6], [4], [7]]
    out = edited(hashed, tmp_path / "out", "merge-experts", groups=[[0, 3], [2, 5, 6]], router=router)
    after = read_tensors(out)
    place = {old: new for new, group in enumerate(groups) for old in group}
    assert any(place[a] == place[b] for a, b in before[TABLE].tolist())
    assert after[TABLE].tolist() == followed(before[TABLE], before[ROUTER], after[ROUTER], place, 2)
    assert torch.isfinite(logits(load(out))).all()


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_another_top_k_makes_another_width(hashed: Path, tmp_path: Path, top_k: int) -> None:
    before = read_tensors(hashed)
    plan = apply(plan_of(open_checkpoint(hashed)), "rescale", top_k=top_k)
    write_plan(plan, tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    same = {number: number for number in range(8)}
    assert after[TABLE].tolist() == followed(before[TABLE], before[ROUTER], before[ROUTER], same, top_k)
    assert any("the first 1 of the 2" in note or "more, those" in note for note in plan.steps[0].notes)
    assert load(tmp_path / "out").config.num_experts_per_tok == top_k
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_steps_in_one_recipe_are_steps_one_by_one(hashed: Path, tmp_path: Path) -> None:
    one = edited(hashed, tmp_path / "a", "drop-experts", keep=[0, 1, 2, 4, 6, 7])
    one = edited(one, tmp_path / "b", "rescale", top_k=3)
    plan = apply(plan_of(open_checkpoint(hashed)), "drop-experts", keep=[0, 1, 2, 4, 6, 7])
    write_plan(apply(plan, "rescale", top_k=3), tmp_path / "c")
    assert same_bits(read_tensors(one)[TABLE], read_tensors(tmp_path / "c")[TABLE])


def test_added_experts_leave_the_table(hashed: Path, tmp_path: Path) -> None:
    out = edited(hashed, tmp_path / "out", "add-expert", source=str(hashed), experts=[3])
    assert same_bits(read_tensors(out)[TABLE], read_tensors(hashed)[TABLE])
    assert torch.isfinite(logits(load(out))).all()


def test_numbers_of_no_expert_are_refused(hashed: Path, tmp_path: Path) -> None:
    tensors = read_tensors(hashed)
    tensors[TABLE][3, 1] = 8
    rewrite(hashed, tmp_path / "m", tensors, {})
    with pytest.raises(CheckpointError, match="names experts 0 to 8; the layer has 0 to 7"):
        edited(tmp_path / "m", tmp_path / "out", "drop-experts", count=2)
    assert not (tmp_path / "out").exists()


def test_too_few_experts_are_refused(hashed: Path) -> None:
    with pytest.raises(RefusedError, match="each token is routed to 2"):
        apply(plan_of(open_checkpoint(hashed)), "drop-experts", keep=1)
