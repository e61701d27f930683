"""Several operations in one recipe: one checkpoint, nothing in between, and the bytes of the steps one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from tests.conftest import Result
from tests.tiny import load, logits, read_tensors, same_bits

Cli = Callable[..., Result]

RECIPES: dict[str, tuple[str, dict[str, Any], list[dict[str, dict[str, Any]]]]] = {
    "mixtral": (
        "mixtral",
        {"num_hidden_layers": 4},
        [
            {"drop-experts": {"experts": [3]}},
            {"rescale": {"top_k": 3}},
            {"tie-blocks": {"scheme": "cycle", "init": "average"}},
            {"convert": {"dtype": "bf16"}},
        ],
    ),
    "mixtral, tied first": (
        "mixtral",
        {"num_hidden_layers": 4, "dtype": "bfloat16"},
        [
            {"tie-blocks": {"init": "average", "norms": "shared"}},
            {"merge-experts": {"groups": [[0, 5], [2, 7, 3]], "align": "weights"}},
            {"rescale": {"top_k": 1, "where": "weights"}},
        ],
    ),
    "gpt_oss, written out": (
        "gpt_oss",
        {"num_hidden_layers": 4},
        [
            {"rescale": {"top_k": 1}},
            {"drop-experts": {"keep": {0: [1, 2], 1: [0, 7], 2: [3, 4], 3: [5, 6]}}},
            {"tie-blocks": {"blocks": [0, 1, 0, 1, 2, 3]}},
            {"tie-blocks": {"materialize": True}},
            {"convert": {"dtype": "f16"}},
        ],
    ),
}


def weights(path: Path) -> dict[str, bytes]:
    """Return the files that make up a checkpoint; not the card and the record, which tell how it was made."""
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.suffix in (".safetensors", ".json", ".py") and file.name != "moesurgery.json"
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_steps_one_by_one(models: Any, tmp_path: Path, ok: Cli, name: str) -> None:
    model_type, changes, steps = RECIPES[name]
    model = models(model_type, **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), "steps": steps}))
    (tmp_path / "once").mkdir()
    ok("run", tmp_path / "recipe.yaml", "-o", tmp_path / "once" / "out")
    assert [path.name for path in (tmp_path / "once").iterdir()] == ["out"]
    path = model
    for number, step in enumerate(steps):
        (tmp_path / "step.yaml").write_text(yaml.safe_dump({"model": str(path), "steps": [step]}))
        path = tmp_path / str(number)
        ok("run", tmp_path / "step.yaml", "-o", path)
    assert weights(tmp_path / "once" / "out") == weights(path)
    assert bool(logits(load(path)).isfinite().all())


@pytest.mark.parametrize(
    ("dense", "changes", "to"),
    [
        ("llama", {"intermediate_size": 64}, "mixtral"),
        ("qwen3", {"intermediate_size": 64, "head_dim": 8}, "qwen3_moe"),
        ("mistral", {"intermediate_size": 64, "sliding_window": None}, "mixtral"),
    ],
)
def test_upcycled_and_back_is_the_dense_model(
    models: Any, tmp_path: Path, ok: Cli, dense: str, changes: dict[str, Any], to: str
) -> None:
    path = models(dense, **changes)
    ok("upcycle", path, "--experts", 4, "--to", to, "-o", tmp_path / "moe")
    ok("to-dense", tmp_path / "moe", "--expert", 0, "--to", dense, "-o", tmp_path / "dense")
    back, before = read_tensors(tmp_path / "dense"), read_tensors(path)
    assert back.keys() == before.keys()
    assert all(same_bits(back[name], before[name]) for name in before)
    config, stated = (transformers.AutoConfig.from_pretrained(p).to_dict() for p in (tmp_path / "dense", path))
    assert {**config, "_name_or_path": None} == {**stated, "_name_or_path": None}
