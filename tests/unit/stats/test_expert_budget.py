"""Experts shared out over layers: the best allocation against all of them, and what stock loaders take."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moesurgery.families.config_keys import EXPERTS_KEYS
from moesurgery.stats.expert_budget import best_allocation, lost_shares, uniform_allocation
from tests.conftest import Result
from tests.families import BASE, TINY


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [1, 2])
def test_the_best_of_all_allocations(seed: int, step: int) -> None:
    """Costs of any shape, also such as a greedy choice gets wrong."""
    random = np.random.default_rng(seed)
    costs = {f"layer {i}": [0.0, *random.random(6).cumsum()] for i in range(4)}
    best = best_allocation(costs, 10, 5, step)
    each = range(0, 6, step)
    least = min(
        sum(cost[n] for cost, n in zip(costs.values(), counts, strict=True))
        for counts in itertools.product(each, repeat=4)
        if sum(counts) == 10
    )
    assert best.cost == pytest.approx(least)
    assert sum(best.dropped.values()) == 10
    assert all(n in each for n in best.dropped.values())
    assert best.cost == pytest.approx(sum(costs[where][n] for where, n in best.dropped.items()))
    with pytest.raises(ValueError, match="no sum of 4 multiples"):
        best_allocation(costs, 21, 5)


def test_shares_and_one_number_for_all() -> None:
    assert lost_shares([1.0, 4.0, 3.0]) == [0.0, 1 / 8, 4 / 8, 1.0]
    assert lost_shares([0.0, 0.0]) == [0.0, 0.0, 0.0]
    costs = {"a": lost_shares([1, 1, 2]), "b": lost_shares([2, 2, 4])}
    assert uniform_allocation(costs, 1) == ({"a": 1, "b": 1}, 0.5)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe"])
@pytest.mark.parametrize("listed", [False, True])
def test_stock_transformers_takes_one_number_for_all_layers(model_type: str, listed: bool) -> None:
    """The reason for which `--per-layer` is refused. Where this fails, transformers has learnt it: then write it."""
    settings: dict[str, Any] = BASE | TINY.get(model_type, {"num_experts": 8, "moe_topk": 2})
    last = settings["num_hidden_layers"] - 1
    for key in EXPERTS_KEYS:
        theirs = {key: [8] * last + [4]} if listed else {"per_layer_config": {str(last): {key: 4}}}
        try:
            config = transformers.AutoConfig.for_model(model_type, **(settings | theirs))
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        named = [(name, p.shape[0]) for name, p in model.named_parameters() if f"layers.{last}.mlp." in name]
        assert named
        assert all(size != 4 for _, size in named), f"{model_type} takes {theirs}"


def test_what_a_number_for_each_layer_would_save_is_said(models: Any, cli: Any, tmp_path: Any) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"input_ids": ' + str([i % 60 + 3 for i in range(2048)]) + "}")
    options = ("--text", text, "--window", 64, "--tokens", 512, "--no-heldout", "--per-layer")
    told: Result = cli(
        "drop-experts", models("mixtral"), "--keep", 6, "--by", "reap-sum", *options, "-o", tmp_path / "o"
    )
    assert told.code == 2
    assert "no stock loader takes a number of experts for each layer" in told.err
    assert "% of reap-sum instead of" in told.err
    assert not (tmp_path / "o").exists()
    free: Result = cli("drop-experts", models("mixtral"), "--keep", 6, "--per-layer", "--dry-run")
    assert free.code == 2
    assert "--by reap-sum" in free.err
    named: Result = cli("drop-experts", models("mixtral"), "--experts", 3, "--per-layer", "--dry-run")
    assert named.code == 2
    assert "shares out a number" in named.err
