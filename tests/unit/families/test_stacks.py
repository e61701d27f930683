"""Layers that are repeated, left out or moved where the place of a layer decides what it holds: refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Result
from tests.tiny import read_tensors, save_tiny

Cli = Callable[..., Result]


def sliced(folder: Path, model: Path, *ranges: tuple[int, int]) -> Path:
    parts = "".join(f"- sources:\n  - model: {model}\n    layer_range: [{a}, {b}]\n" for a, b in ranges)
    (folder / "r.yml").write_text(f"merge_method: passthrough\nslices:\n{parts}")
    return folder / "r.yml"


@pytest.fixture(scope="module")
def inkling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers have queries in a table beside them, and the first has one less: the family table says so."""
    path = tmp_path_factory.mktemp("inkling2")
    save_tiny("inkling2", path)
    return path


def saved_with(model: Path, added: dict[str, torch.Tensor]) -> Path:
    held = {**read_tensors(model), **added}
    for file in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        file.unlink()
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture
def tabled(models: Any, tmp_path: Path) -> Path:
    """A model with queries for its two layers in a table beside them, of which no family table knows."""
    model = Path(shutil.copytree(models("mixtral", num_hidden_layers=2), tmp_path / "tabled"))
    return saved_with(model, {f"model.depth.layer_queries.{i}.weight": torch.ones(32) for i in range(2)})


@pytest.mark.parametrize("ranges", [((0, 2), (1, 2)), ((0, 1), (0, 2)), ((1, 2),), ((1, 2), (0, 1))])
def test_tables_beside_the_layers_do_not_follow(
    tabled: Path, inkling: Path, tmp_path: Path, cli: Cli, ranges: tuple[tuple[int, int], ...]
) -> None:
    result = cli("merge", sliced(tmp_path, inkling, *ranges), "-o", tmp_path / "out")
    assert result.code == 2
    assert "r.yml:2: inkling2: its attention residuals go by blocks of layers" in " ".join(result.err.split())
    result = cli("merge", sliced(tmp_path, tabled, *ranges), "-o", tmp_path / "out")
    assert result.code == 2
    message = " ".join(result.err.split())
    assert "r.yml:2: merge of" in message
    assert "_queries.#.weight has" in message
    assert "entries for 2 layers, which do not follow when layers are repeated, left out or moved" in message
    assert "keep the layers as they are" in message
    assert not (tmp_path / "out").exists()


def test_layers_that_stay_as_they_are_may_be_sliced(inkling: Path, tmp_path: Path, ok: Cli) -> None:
    ok("merge", sliced(tmp_path, inkling, (0, 1), (1, 2)), "-o", tmp_path / "out")
    ok("validate", tmp_path / "out", "--level", "config")


def test_repeated_blocks(tabled: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("tie-blocks", tabled, "--scheme", "repeat", "--materialize", "-o", tmp_path / "out")
    assert result.code == 2
    assert "tie-blocks: " in result.err
    assert "entries for 2 layers" in " ".join(result.err.split())


def test_the_same_model_with_these_tables_in_its_layers(tmp_path: Path, cli: Cli) -> None:
    """As transformers 5 saves it without the original format."""
    save_tiny("inkling2", tmp_path / "model", fused=True)
    result = cli("merge", sliced(tmp_path, tmp_path / "model", (0, 2), (1, 2)), "-o", tmp_path / "out")
    assert result.code == 2
    assert "the first layer has no query" in " ".join(result.err.split())


@pytest.fixture
def uneven(models: Any, tmp_path: Path) -> Path:
    """A model whose first layer lacks a tensor that the others have, with nothing in the config to say so."""
    model = Path(shutil.copytree(models("mixtral", num_hidden_layers=3), tmp_path / "uneven"))
    return saved_with(model, {f"model.layers.{layer}.self_attn.query": torch.ones(32) for layer in (1, 2)})


@pytest.mark.parametrize("ranges", [((0, 1), (0, 3)), ((0, 3), (0, 1)), ((1, 3), (0, 1))])
def test_layers_that_the_config_does_not_tell_apart(
    uneven: Path, tmp_path: Path, cli: Cli, ranges: tuple[tuple[int, int], ...]
) -> None:
    result = cli("merge", sliced(tmp_path, uneven, *ranges), "-o", tmp_path / "out")
    assert result.code == 2
    message = " ".join(result.err.split())
    assert "layer 1 has self_attn.query, layer 0 has not, and config.json does not say why" in message
    assert "the model's code would make up what is missing" in message


def test_layers_that_the_config_tells_apart_are_moved(models: Any, tmp_path: Path, ok: Cli) -> None:
    """A dense first layer is told by the config, which follows: nothing is missing in what comes out."""
    model = models("qwen3_moe")
    assert json.loads((model / "config.json").read_text())["mlp_only_layers"] == [0]
    ok("merge", sliced(tmp_path, model, (0, 3), (0, 2)), "-o", tmp_path / "out")
    ok("validate", tmp_path / "out", "--level", "config")
