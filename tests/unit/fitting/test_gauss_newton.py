"""The linearised expert and its conjugate gradients, against torch's derivatives and a dense solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesurgery.fitting import gauss_newton
from moesurgery.fitting.gauss_newton import Linearised, arrangement, chosen, conjugate, linearised, matrices
from moesurgery.forward.activations import activations, before_gate, down, first, gated
from tests.tiny import load

FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"]  # chunks, interleaved rows, no gate, inputs weighted


def module_of(path: Any) -> Any:
    """The experts of the first MoE layer, or the block of Llama 4, in float64."""
    model = load(path).double().requires_grad_(False)
    found = [m for n, m in model.named_modules() if n.endswith((".experts", ".feed_forward")) and hasattr(m, "forward")]
    return next(m for m in found if hasattr(m, "router") or hasattr(m, "has_gate"))


@pytest.fixture
def problem() -> tuple[Linearised, torch.Tensor]:
    """An expert of 5 neurons on 40 tokens, and what is missing of its output."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = (torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None], 1.5)
    parts = Linearised(random(40, 4), random(40, 1), random(40, 5), random(40, 2, 5), random(4, 5), scale)
    return parts, random(40, 4)


def dense(parts: Linearised) -> torch.Tensor:
    """The matrix [t H, size of a change] of `adds`."""
    columns = []
    for i in range(2 * 5 * 4 + 4 * 5):
        unit = torch.zeros(60, dtype=torch.float64)
        unit[i] = 1
        columns.append(parts.adds([unit[:40].view(2, 5, 4), unit[40:].view(4, 5)]).flatten())
    return torch.stack(columns, dim=1)


def test_pulls_is_the_adjoint_of_adds(problem: tuple[Linearised, torch.Tensor]) -> None:
    parts, missing = problem
    pulled = torch.cat([p.flatten() for p in parts.pulls(missing)])
    assert torch.allclose(pulled, dense(parts).T @ missing.flatten())


def test_every_ridge_by_a_dense_solver(problem: tuple[Linearised, torch.Tensor]) -> None:
    parts, missing = problem
    ridges = (0.5, 3.0, 40.0)
    found = conjugate(parts, missing, ridges, steps=400)
    matrix = dense(parts)
    for ridge, change in zip(ridges, found, strict=True):
        system = matrix.T @ matrix + ridge * torch.eye(60, dtype=torch.float64)
        expected = torch.linalg.solve(system, matrix.T @ missing.flatten())
        assert torch.allclose(torch.cat([c.flatten() for c in change]), expected, atol=1e-6)


def test_the_ridge_is_chosen_on_the_odd_windows(problem: tuple[Linearised, torch.Tensor]) -> None:
    parts, missing = problem
    change, found = chosen(parts, missing, 20, None)
    assert change is None  # noise alone
    assert found.held_out == 0
    wanted = parts.adds([torch.ones(2, 5, 4, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64)])
    change, found = chosen(parts, wanted, 20, None)
    assert found.ridge is not None
    assert found.held_out is not None
    assert found.held_out < -0.5 * float(wanted.pow(2).sum())


def test_ridges_one_at_a_time_are_those_of_all_at_once(
    problem: tuple[Linearised, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, missing = problem
    wanted = parts.adds([torch.ones(2, 5, 4, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64)])
    wanted = wanted + 0.3 * missing
    together, found = chosen(parts, wanted, 20, None)
    monkeypatch.setattr(gauss_newton, "PATH_BYTES", 0)
    apart, same = chosen(parts, wanted, 20, None)
    assert found.ridge == same.ridge
    assert found.held_out == pytest.approx(same.held_out)
    assert all(torch.allclose(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_linearised_expert_is_its_derivative(models: Any, model_type: str) -> None:
    module = module_of(models(model_type))
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(6, down(module, 1).shape[0], generator=generator, dtype=torch.float64)
    hidden = read  # of Llama 4 a score lies between them: here it is what the expert is given
    weight = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    arrange = arrangement(module, 1)
    parts = linearised(module, 1, hidden, weight, arrange)
    change = [torch.randn(p.shape, generator=generator) for p in parts.pulls(torch.zeros(6, read.shape[1]))]
    ahead, below = (part.clone() for part in change)
    parts.to_weights([ahead, below])
    with torch.no_grad():
        before = (first(module, 1).clone(), down(module, 1).clone())
        outputs = []
        for step in (1e-5, -1e-5):
            arrange(first(module, 1).T).add_(ahead.permute(2, 0, 1), alpha=step)
            down(module, 1).add_(below, alpha=step)
            outputs.append(weight * (_h(module, hidden) @ down(module, 1).T))
            first(module, 1).copy_(before[0])
            down(module, 1).copy_(before[1])
    expected = (outputs[0] - outputs[1]) / 2e-5
    assert torch.allclose(parts.adds(change).double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _h(module: Any, read: torch.Tensor) -> torch.Tensor:
    return gated(module, before_gate(module, 1, read))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_gate_and_up_are_told_apart(models: Any, model_type: str) -> None:
    """With its up rows zero an expert of Mixtral is silent; gpt-oss adds one to what its up rows say."""
    module = module_of(models(model_type))
    hidden = torch.randn(5, down(module, 0).shape[0], dtype=torch.float64)
    found = matrices(module, 0)
    assert found["gate"].shape == found["up"].shape == found["down"].T.shape
    with torch.no_grad():
        before = activations(module, 0, hidden)
        found["gate"].zero_()
        after = activations(module, 0, hidden)
    if model_type == "mixtral":
        assert before.abs().max() > 0
        assert after.abs().max() == 0
    else:
        bias = module.gate_up_proj_bias[0]
        up = hidden @ found["up"].T + bias[1::2]
        gate = bias[::2].clamp(max=module.limit)
        expected = (up.clamp(-module.limit, module.limit) + 1) * gate * torch.sigmoid(gate * module.alpha)
        assert torch.allclose(after, expected)
