"""Which experts go: every criterion against loops, and the choice of a set against all sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.fitting.collector import collect
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.criteria import scores
from moesurgery.stats.least_set import least_set
from moesurgery.stats.statistics_file import Stats
from tests.conftest import Result
from tests.tiny import PROMPT, read_tensors
from tests.unit.fitting.test_collector import Seen

Cli = Callable[..., Result]


def total(pairs: np.ndarray, members: Any) -> float:
    return float(sum(pairs[i, j] for i in members for j in members))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("experts", "count", "parts"), [(9, 3, 1), (8, 4, 2), (12, 6, 3), (7, 0, 1), (6, 6, 2)])
def test_exchanges_are_never_worse_than_greedy_and_none_is_left_that_helps(
    seed: int, experts: int, count: int, parts: int
) -> None:
    draws = np.random.default_rng(seed).normal(size=(experts, 5))
    pairs = draws @ draws.T  # correlated: a greedy choice is often not the best
    chosen, greedy = least_set(pairs, count, parts), least_set(pairs, count, parts, swaps=False)
    size = experts // parts
    for found in (chosen, greedy):
        assert len(set(found)) == count
        assert {sum(e // size == part for e in found) for part in range(parts)} == {count // parts}
    assert total(pairs, chosen) <= total(pairs, greedy) + 1e-9
    for out in chosen:
        for into in set(range(experts)) - set(chosen):
            if out // size == into // size:
                swapped = [into if e == out else e for e in chosen]
                assert total(pairs, swapped) >= total(pairs, chosen) - 1e-9


def test_the_greedy_choice_by_loops_and_how_near_the_best_set_is() -> None:
    better = ratio = 0.0
    for seed in range(40):
        draws = np.random.default_rng(seed).normal(size=(10, 4))
        pairs = draws @ draws.T
        by_hand: list[int] = []
        while len(by_hand) < 4:
            rest = [e for e in range(10) if e not in by_hand]
            by_hand.append(min(rest, key=lambda e: total(pairs, [*by_hand, e])))
        assert least_set(pairs, 4, swaps=False) == sorted(by_hand)
        best = min(total(pairs, members) for members in combinations(range(10), 4))
        found = total(pairs, least_set(pairs, 4))
        better += found < total(pairs, by_hand) - 1e-9
        ratio += found < best + 1e-9
    assert better >= 10  # exchanges matter here …
    assert ratio >= 20  # … and find the very best set more often than not


def test_guarded_experts_are_taken_last() -> None:
    pairs = np.diag([1.0, 2.0, 3.0, 4.0])
    assert least_set(pairs, 2, guarded=[0]) == [1, 2]
    assert least_set(pairs, 3, guarded=[0, 1]) == [0, 2, 3]  # the cheapest of the guarded, where one has to go
    assert least_set(pairs, 2, 2, guarded=[0]) == [1, 2]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "olmoe"])
def test_every_criterion_by_loops_over_tokens(models: Any, model_type: str) -> None:
    path = models(model_type)
    found = collect(Engine(plan_of(open_checkpoint(path))), Tokens(PROMPT))
    seen = Seen(path)
    for where, block in found.blocks.items():
        _, index, weights = seen.calls[where]
        chosen: list[list[tuple[float, np.ndarray]]] = [[] for _ in range(8)]
        sizes = np.zeros((len(index), 8))
        for t in range(len(index)):
            for e, g in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                output = seen.output(where, t, e)
                chosen[e].append((g, output))
                sizes[t, e] = g * np.linalg.norm(output)
        expected = {
            "frequency": [len(c) for c in chosen],
            "ean": [sum(np.linalg.norm(f) for _, f in c) for c in chosen],
            "reap-sum": [sum(g * np.linalg.norm(f) for g, f in c) for c in chosen],
            "reap": [sum(g * np.linalg.norm(f) for g, f in c) / max(32, len(c)) for c in chosen],
            "man": [sum(np.linalg.norm(f) for _, f in c) / max(32, len(c)) for c in chosen],
            "msan": [sum(float(f @ f) for _, f in c) / max(32, len(c)) for c in chosen],
        }
        for by, values in expected.items():
            np.testing.assert_allclose(scores(block, by), values, rtol=2e-5, err_msg=by)  # type: ignore[arg-type]
        dropped = apply(plan_of(open_checkpoint(path)), "drop-experts", count=2, by="hope", stats=_saved(found, path))
        layer = next(e for e in dropped.steps[0].report["layers"] if e["layer"] == where)
        sets = [s for s in combinations(range(8), 2) if model_type != "deepseek_v3" or s[0] // 4 != s[1] // 4]
        cost = {s: float((sizes[:, list(s)].sum(axis=1) ** 2).sum()) for s in sets}
        assert cost[tuple(layer["dropped"])] <= min(cost.values()) * (1 + 1e-6)


def _saved(stats: Stats, model: Path) -> str:
    return str(stats.save(model.parent / f"{model.name}-criteria.safetensors"))


def test_aimer_by_hand(models: Any) -> None:
    path = models("qwen3_moe")
    tensors = read_tensors(path)
    step = apply(plan_of(open_checkpoint(path)), "drop-experts", count=3, by="aimer").steps[0]
    for layer in step.report["layers"]:
        expected = []
        for e in range(8):
            mine = [v.flatten() for n, v in tensors.items() if f"{layer['layer']}.mlp.experts.{e}." in n]
            weights = torch.cat(mine).double()
            expected.append(float(weights.abs().mean() / weights.square().mean().sqrt()))
        np.testing.assert_allclose(layer["scores"], [-x for x in expected], rtol=1e-6)
        assert set(layer["dropped"]) == set(np.argsort(expected)[-3:].tolist())


def test_statistics_from_before_a_criterion(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    stats = collect(Engine(plan_of(open_checkpoint(path))), Tokens(PROMPT))
    for block in stats.blocks.values():
        del block.sums["norm2"], block.sums["pair_norms"]
    file = str(stats.save(tmp_path / "s"))
    plan = plan_of(open_checkpoint(path))
    apply(plan, "drop-experts", count=1, by="gram", stats=file)
    for by in ("msan", "hope"):
        with pytest.raises(RefusedError, match=f"which {by} needs") as refused:
            apply(plan, "drop-experts", count=1, by=by, stats=file)
        assert "collect" in (refused.value.hint or "")


# Protection


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("by", ["gram", "frequency", "router-norm"])
def test_what_matters_on_a_text_of_its_own_stays(models: Any, tmp_path: Path, model_type: str, by: str) -> None:
    path = models(model_type)
    plan = plan_of(open_checkpoint(path))
    stats = collect(Engine(plan), Tokens(PROMPT))
    other = collect(Engine(plan), Tokens((PROMPT + 7) % 60))
    given = {"stats": str(stats.save(tmp_path / "s"))} if by != "router-norm" else {}
    protect = str(other.save(tmp_path / "math"))
    step = apply(plan, "drop-experts", count=4, by=by, protect=protect, protect_share=0.25, **given).steps[0]
    parts = 2 if model_type == "deepseek_v3" else 1
    for layer in step.report["layers"]:
        standing = other.blocks[layer["layer"]].total("gate_norm")
        for part in range(parts):
            members = range(part * 8 // parts, (part + 1) * 8 // parts)
            best = sorted(members, key=lambda e: -standing[e])[: 2 // parts]
            assert not set(best) & set(layer["dropped"])
        assert len(layer["dropped"]) == 4
    assert any("math" in note for note in step.notes)
    with pytest.raises(RefusedError, match="are protected by"):
        apply(plan, "drop-experts", count=4, by=by, protect=protect, protect_share=0.8, **given)


def test_protection_of_experts_that_are_named(models: Any) -> None:
    with pytest.raises(RecipeError, match="experts are named"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "drop-experts", experts=[1], protect="s.safetensors")


def test_the_text_to_protect_is_run_over(demo: Path, tmp_path: Path, ok: Cli) -> None:
    manual = demo.parent / "calibration-manual.txt"
    options = ["--count", 3, "--by", "router-norm", "--protect", manual, "--tokens", 512, "--window", 64]
    ok("drop-experts", demo, *options, "-o", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert (tmp_path / "out.protect.stats.safetensors").exists()
    ok("collect", demo, "--text", manual, "--tokens", 512, "--window", 64, "-o", tmp_path / "s")
    document = json.loads((tmp_path / "s.json").read_text())
    for seen, layer in zip(document["layers"], record["steps"][0]["report"]["layers"], strict=True):
        assert int(np.argmax(seen["experts"]["reap-sum"])) in layer["kept"]
