"""The selection bias by exchanges: against what the model's own code computes with another bias."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.fitting.bias_fit import Exchanges, exchanges
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import FittedBlock
from tests.tiny import load, read_tensors, same_bits
from tests.unit.fitting.test_layer_fit import TEXT, edit, experts_of, layers_of, repaired, save

FREE = {"n_group": 1, "topk_group": 1}  # no groups of experts


@pytest.fixture
def path(models: Any) -> Path:
    found: Path = models("glm4_moe", **FREE)
    return found


def calls_of(plan: Plan, change: dict[int, float]) -> Iterator[tuple[ExpertsCall, torch.Tensor]]:
    """Yield the last block's call and routed output, with no change of its selection bias and with one."""
    engine = Engine(plan)
    block = engine.blocks[-1]
    passes = engine.start(Tokens(TEXT), Hooks(), batch=len(TEXT))
    passes.to_layer(next(i for i, unit in enumerate(engine.layers) if unit.path == block.unit))
    with engine.weights.loaded(engine.layers[passes.passed], pin=True):
        for step in ({}, change):
            bias = engine.meta_model.tensor(block.correction or "")
            for expert, value in step.items():
                bias[expert] += value
            calls: list[ExpertsCall] = []
            passes.peek(Hooks(experts=lambda call, to=calls: to.append(call), router_logits=True))  # type: ignore[misc]
            yield calls[0], calls[0].run().reshape(TEXT.numel(), -1)
    passes.close()


@pytest.mark.parametrize("normed", [True, False])
def test_the_cost_of_an_exchange_is_what_the_models_code_computes(models: Any, normed: bool) -> None:
    """Every expert is moved a little, up and down: which tokens exchange one, and what that does to their error. Where
    two experts are about equal, another exchange than the first may come of it, which is rare."""
    plan = plan_of(open_checkpoint(models("glm4_moe", **FREE, norm_topk_prob=normed)))
    engine = Engine(plan)
    bias = engine.meta_model.value(engine.blocks[-1].block.named("correction_bias")[0].name)
    moved, foretold = [], []
    for expert, step in [(e, sign * 0.004) for e in range(8) for sign in (1, -1)]:
        (call, before), (other, after) = calls_of(plan, {expert: step})
        missing = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        found = exchanges(plan.anatomy.settings, bias, [call], [missing])
        assert found is not None
        assert np.array_equal(found.odd, np.repeat(np.arange(len(TEXT)) % 2 == 1, TEXT.shape[1]))
        change = np.zeros(8)
        change[expert] = step
        happens = change[found.comes] - change[found.goes] > found.margin
        true = (call.index.sort(-1).values != other.index.sort(-1).values).any(-1).reshape(-1).numpy()
        cost = ((missing.double() - (after - before)).square() - missing.double().square()).sum(-1).numpy()
        assert found.cost[happens & true] == pytest.approx(cost[happens & true], rel=1e-3, abs=1e-4)
        assert found.error(change) == pytest.approx(found.cost[happens].sum())
        moved.append(true)
        foretold.append(happens)
    assert np.sum(moved) > 50
    assert (np.array(moved) != np.array(foretold)).sum() <= 0.05 * np.sum(moved)


def test_no_bias_alone_could_be_better() -> None:
    """Every expert's change is the best on a fine grid, the others' being what they are."""
    generator = np.random.default_rng(0)
    tokens, experts = 300, 5
    pairs = np.array([generator.permutation(experts)[:2] for _ in range(tokens)])
    costs = generator.normal(size=tokens)
    problem = Exchanges(pairs[:, 0], pairs[:, 1], generator.exponential(size=tokens), costs, np.zeros(tokens, bool))
    change, most = problem.solve(experts), float(np.median(problem.margin))
    assert problem.error(change) < -1
    assert np.abs(change).max() <= most
    for expert in range(experts):
        for value in np.linspace(-most, most, 2001):
            other = change.copy()
            other[expert] = value
            assert problem.error(other) >= problem.error(change) - 1e-9


def test_the_bias_of_a_model_that_was_not_edited_stays(path: Path) -> None:
    plan = plan_of(open_checkpoint(path))
    found: list[FittedBlock] = []
    fit_layers(Engine(plan), Engine(plan), Tokens(TEXT), RepairOptions("router"), found.append)
    assert found
    assert all(entry.bias is None and entry.router is None for entry in found)


def test_what_is_written_is_what_was_fitted(path: Path, tmp_path: Path) -> None:
    """The error of each layer is that of the two written models; nothing changes but routers and their biases."""
    fitted = repaired(path, kind="router")
    assert any(entry.bias is not None for entry in fitted)
    repair = save(fitted, tmp_path / "repair", "router")
    write_plan(apply(edit(path)[1], "refit", repair=repair), tmp_path / "out")
    write_plan(edit(path)[1], tmp_path / "edited")
    before, after = read_tensors(tmp_path / "edited"), read_tensors(tmp_path / "out")
    changed = {name for name in before if not same_bits(before[name], after[name])}
    biases = {f"{f.where}.mlp.gate.e_score_correction_bias": f.bias for f in fitted if f.bias is not None}
    assert changed == biases.keys() | {f"{f.where}.mlp.gate.weight" for f in fitted if f.router is not None}
    for name, bias in biases.items():
        assert torch.equal(after[name], bias)
    original, mended, added = layers_of(load(path)), layers_of(load(tmp_path / "out")), experts_of(load(path))
    for entry in fitted:
        y = added[entry.where][-1].double()
        error = float((original[entry.where] - mended[entry.where]).pow(2).sum() / y.pow(2).sum())
        assert error == pytest.approx(entry.error_after, rel=2e-2)
        assert entry.error_after < entry.error_before


def test_a_bias_is_not_for_a_model_without_one(path: Path, models: Any, tmp_path: Path) -> None:
    fitted = [FittedBlock(f"model.layers.{i}", bias=torch.zeros(6), tokens=[1] * 6) for i in range(2)]
    with pytest.raises(RefusedError, match="has no selection bias"):
        apply(edit(models("mixtral"))[1], "refit", repair=save(fitted, tmp_path / "repair", "router"))


def test_experts_chosen_by_groups_keep_their_bias(models: Any) -> None:
    path = models("deepseek_v3")
    assert plan_of(open_checkpoint(path)).anatomy.settings.groups
    assert all(entry.bias is None for entry in repaired(path, kind="router"))
