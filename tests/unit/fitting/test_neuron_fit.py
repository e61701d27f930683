"""Neurons chosen and down-projections solved: against loops and a solver of numpy on what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.fitting import neuron_order
from moesurgery.fitting.collector import collect
from moesurgery.fitting.neuron_fit import fit_neurons
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.repair_file import FittedBlock
from moesurgery.surgery.slim_experts import _neurons_to_fit
from tests.conftest import Result
from tests.tiny import load, read_config, read_tensors, same_bits
from tests.unit.fitting.test_layer_fit import TEXT, experts_of

Cli = Callable[..., Result]
RIDGE = 0.1


def problem(width: int = 24, outputs: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of moments [I, I] and a down-projection [H, I]."""
    random = np.random.default_rng(3)
    h = random.standard_normal((200, width)) @ random.standard_normal((width, width))
    return h.T @ h, random.standard_normal((outputs, width))


def least_error(gram: np.ndarray, down: np.ndarray, gone: list[int]) -> float:
    """The least of |W h - W' h|^2 + lambda |W - W'|^2 over all W' without the columns `gone`, by numpy's solver."""
    damped = gram + neuron_order.DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    left = [i for i in range(len(gram)) if i not in gone]
    changed = np.linalg.solve(damped[np.ix_(left, left)], damped[np.ix_(left, gone)] @ down[:, gone].T).T
    difference = np.zeros_like(down)
    difference[:, gone], difference[:, left] = down[:, gone], -changed
    return float(np.sum(difference @ damped * difference))


@pytest.mark.parametrize("size", [1, 4])
def test_the_order_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Each time the neuron, or block of neurons, goes without which the least error is lowest."""
    monkeypatch.setattr(neuron_order, "PANEL", 5)
    gram, down = problem()
    gone: list[int] = []
    blocks, errors = [], []
    for _ in range(24 // size - 1):
        candidates = {
            block: least_error(gram, down, sorted([*gone, *range(block * size, (block + 1) * size)]))
            for block in range(24 // size)
            if block not in blocks
        }
        blocks.append(min(candidates, key=candidates.__getitem__))
        errors.append(candidates[blocks[-1]])
        gone = sorted([*gone, *range(blocks[-1] * size, (blocks[-1] + 1) * size)])
    order, found = neuron_order.removal_order(torch.from_numpy(gram), torch.from_numpy(down.T @ down), size, size)
    assert order.tolist() == blocks
    assert np.allclose(found.numpy(), errors, rtol=1e-5)


def fitted(path: Path, **parameters: Any) -> dict[str, FittedBlock]:
    plan, found = plan_of(open_checkpoint(path)), {}
    choice = _neurons_to_fit(plan, parameters)
    assert choice is not None
    fit_neurons(Engine(plan), Tokens(TEXT), choice, RIDGE, lambda fit: found.update({fit.where: fit}))
    return found


def solved(h: torch.Tensor, down: torch.Tensor, kept: list[int]) -> np.ndarray:
    """The down-projection of the neurons `kept` by numpy's least squares, for inputs `h` [t, I]."""
    h, down = h.double(), down.double()
    gone = [i for i in range(h.shape[1]) if i not in kept]
    few = h[:, kept].numpy()
    strength = RIDGE * np.square(few).sum(0).mean()
    rows = np.concatenate([few, np.sqrt(strength) * np.eye(len(kept))])
    wanted = np.concatenate([(h[:, gone] @ down[:, gone].T).numpy(), np.zeros((len(kept), len(down)))])
    change: np.ndarray = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return down[:, kept].numpy() + change.T


def test_routed_experts_are_solved_as_numpy_does(models: Any) -> None:
    path = models("mixtral")
    found = fitted(path, width=32)
    seen = experts_of(load(path))
    assert seen.keys() == found.keys()
    for where, (module, hidden, index, weights, _) in seen.items():
        fit = found[where]
        for expert in range(8):
            token, slot = (index.reshape(-1, index.shape[-1]) == expert).nonzero(as_tuple=True)
            x = hidden.reshape(-1, hidden.shape[-1])[token]
            gate, up = module.gate_up_proj[expert].chunk(2)
            h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            h = (h * weights.reshape(-1, weights.shape[-1])[token, slot][:, None]).detach()
            down, kept = module.down_proj[expert].detach(), fit.matrices[expert]["kept"].tolist()
            assert len(kept) == 32
            assert np.allclose(fit.matrices[expert]["down"].numpy(), solved(h, down, kept), rtol=1e-3, atol=1e-4)
        assert 0 < fit.error_after < fit.error_before < 1


def test_shared_experts_that_follow_are_solved_too(models: Any) -> None:
    path = models("deepseek_v3")
    found = fitted(path, width=16)
    where = next(name for name in found if name.endswith("shared_experts"))
    model, read = load(path), []
    module = model.get_submodule(where)
    module.down_proj.register_forward_pre_hook(lambda _, given: read.append(given[0].reshape(-1, 24)))
    with torch.no_grad():
        model(input_ids=TEXT)
    matrices = found[where].matrices[0]
    expected = solved(torch.cat(read), module.down_proj.weight.detach(), matrices["kept"].tolist())
    assert np.allclose(matrices["down"].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_statistics_choose_what_the_fit_chooses(models: Any, tmp_path: Path) -> None:
    """Also where blocks are tried again meanwhile, with shared experts in them, for which experts reproduce them."""
    path = models("deepseek_v3")
    plan = plan_of(open_checkpoint(path))
    stats = collect(Engine(plan), Tokens(TEXT), keep=[4], neurons=True).save(tmp_path / "stats")
    for by in ("obs", "saliency"):
        write_plan(apply(plan, "slim-experts", width=16, stats=str(stats), by=by), tmp_path / by)
        tensors, before = read_tensors(tmp_path / by), read_tensors(path)
        for where, fit in fitted(path, width=16, by=by).items():
            for expert, matrices in fit.matrices.items():
                name = f"{where}.gate_proj.weight"
                name = name if name in tensors else f"{where}.mlp.experts.{expert}.gate_proj.weight"
                assert same_bits(tensors[name], before[name][matrices["kept"]])
                down = name.replace("gate_proj", "down_proj")
                assert same_bits(tensors[down], before[down][:, matrices["kept"]])


def test_one_command_on_text(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    """The files beside the output make the same checkpoint again, and are not used for another width."""
    text = tmp_path / "text.txt"
    text.write_text("The router sends every token to two of its experts. " * 200)
    width = read_config(demo)["intermediate_size"]
    given = ["slim-experts", demo, "--text", text, "--window", 64, "--tokens", 1024, "-o", tmp_path / "out"]
    said = ok(*given, "--width", width // 2)
    assert "held-out loss" in said.out
    recipe = ok(*given, "--width", width // 2, "--print-recipe").out
    (tmp_path / "recipe.yaml").write_text(recipe)
    ok("run", tmp_path / "recipe.yaml", "-o", tmp_path / "again")
    one, again = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert all(same_bits(one[name], again[name]) for name in one)
    assert read_config(tmp_path / "out")["intermediate_size"] == width // 2
    other = cli(*given, "--width", width // 4, "--dry-run")
    assert other.code != 0
    assert "width" in other.err


def test_a_folder_without_a_fit(models: Any, tmp_path: Path, cli: Cli) -> None:
    failed = cli("slim-experts", models("mixtral"), "--width", 32, "--fit", tmp_path, "-o", tmp_path / "out")
    assert failed.code != 0
    assert "cannot be read as a repair" in failed.err
