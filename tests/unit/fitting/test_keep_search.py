"""Choosing experts by reconstruction: against every set tried out on transformers' own modules."""

from __future__ import annotations

from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import RefusedError
from moesurgery.fitting import keep_search as recon_module
from moesurgery.fitting.collector import collect
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.statistics_file import Stats
from tests.tiny import PROMPT, load


def collected(path: Path, keep: int) -> Stats:
    return collect(Engine(plan_of(open_checkpoint(path))), Tokens(PROMPT), keep=[keep])


def cut(whole: torch.nn.Module, kept: tuple[int, ...]) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """The MoE modules of a model, whole and with the other experts cut out, by layer."""
    small = deepcopy(whole)
    found = {}
    for number, layer in enumerate(small.model.layers):
        for holder in (layer.mlp.experts, layer.mlp.gate):
            for name, tensor in [*holder.named_parameters(), *holder.named_buffers()]:
                if tensor.shape[0] == 8:
                    setattr(holder, name, torch.nn.Parameter(tensor[list(kept)], requires_grad=False))
            for count in ("num_experts", "n_routed_experts"):
                if hasattr(holder, count):
                    setattr(holder, count, len(kept))
        found[f"model.layers.{number}"] = (whole.model.layers[number].mlp, layer.mlp)
    return found


def errors(path: Path, keep: int) -> dict[str, dict[tuple[int, ...], float]]:
    """The error of every kept set in every layer, on the inputs of the whole model."""
    inputs: dict[str, torch.Tensor] = {}
    model = load(path)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda m, args, where=f"model.layers.{number}": inputs.__setitem__(where, args[0])
        )
    found: dict[str, dict[tuple[int, ...], float]] = {}
    with torch.no_grad():
        model(PROMPT)
        model = load(path)  # without the hooks
        for kept in combinations(range(8), keep):
            for where, (whole, small) in cut(model, kept).items():
                error = (whole(inputs[where]) - small(inputs[where])).double().pow(2).sum()
                found.setdefault(where, {})[kept] = float(error)
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_the_best_of_all_sets(models: Any, model_type: str) -> None:
    path = models(model_type)
    stats = collected(path, 6)
    for where, by_set in errors(path, 6).items():
        found = tuple(torch.tensor(stats.blocks[where].sums["recon@6"]).nonzero().flatten().tolist())
        assert by_set[found] <= min(by_set.values()) * (1 + 1e-4)


def test_one_by_one_where_there_are_too_many_sets(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models("mixtral")
    best = {where: min(by_set, key=lambda kept: by_set[kept]) for where, by_set in errors(path, 7).items()}
    monkeypatch.setattr(recon_module, "EXHAUSTIVE", 0)
    stats = collected(path, 7)
    for where, kept in best.items():
        assert stats.blocks[where].sums["recon@7"].nonzero()[0].tolist() == list(kept)


def test_groups_keep_as_many_each(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models("deepseek_v3")
    for limit in (5000, 0):
        monkeypatch.setattr(recon_module, "EXHAUSTIVE", limit)
        for block in collected(path, 4).blocks.values():
            kept = block.sums["recon@4"]
            assert kept[:4].sum() == kept[4:].sum() == 2


def test_dropping_by_reconstruction(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    stats = collected(path, 6)
    file = str(stats.save(tmp_path / "s"))
    plan = plan_of(open_checkpoint(path))
    report = apply(plan, "drop-experts", count=2, by="recon", stats=file).steps[0].report
    for layer in report["layers"]:
        assert layer["kept"] == stats.blocks[layer["layer"]].sums["recon@6"].nonzero()[0].tolist()
    with pytest.raises(RefusedError, match="no choice of 5 experts by reconstruction"):
        apply(plan, "drop-experts", count=3, by="recon", stats=file)
    with pytest.raises(RefusedError, match="routed to 2"):
        collected(path, 1)
