"""The factor from statistics: closed forms on experts made for them, least squares by hand, and what is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.fitting.collector import collect
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.factors import gate, measured, measured_expert, norm_matched, per_expert_factor
from moesurgery.stats.statistics_file import BlockStats, Stats
from tests.conftest import Result
from tests.tiny import PROMPT, build, load, read_tensors, same_bits

Cli = Callable[..., Result]


def collected(path: Path, *top_k: int) -> Stats:
    return collect(Engine(plan_of(open_checkpoint(path))), Tokens(PROMPT), top_k)


def synthetic(path: Path, model_type: str, correlated: bool, **changes: Any) -> Path:
    """A model whose experts say vectors of one length: the same one, or each into four dimensions of its own."""
    model = build(model_type, num_hidden_layers=2, **changes)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        with torch.no_grad():
            for e in range(1, 8):
                experts.gate_up_proj[e] = experts.gate_up_proj[0]
                experts.down_proj[e] = experts.down_proj[0]
            if not correlated:
                rows = experts.down_proj[0, :4].clone()
                experts.down_proj.zero_()
                for e in range(8):
                    experts.down_proj[e, 4 * e : 4 * e + 4] = rows
    model.save_pretrained(path, save_original_format=True)
    return path


def probabilities(path: Path) -> list[torch.Tensor]:
    """Softmax scores [T, 8] of each layer's router, highest first."""
    found = []
    model = load(path)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda m, args, out: found.append(
                (args[0].flatten(0, -2) @ m.weight.T).softmax(-1).sort(-1).values.flip(-1)
            )
        )
    with torch.no_grad():
        model(PROMPT)
    return found


def sums(p: torch.Tensor, k: int, renormalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """G_k, the sum of gates, and Q_k, the sum of their squares, for each token."""
    g = p[:, :k] / p[:, :k].sum(-1, keepdim=True) if renormalised else p[:, :k]
    return g.sum(-1), (g**2).sum(-1)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (2, 3), (2, 8), (4, 2)])
@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_orthogonal_experts(tmp_path: Path, model_type: str, n: int, m: int) -> None:
    """For experts of one norm at right angles, both factors follow from gates alone: every expert says the same
    length to one token, but not to another, so tokens are weighted by it."""
    path = synthetic(tmp_path / "m", model_type, correlated=False, num_experts_per_tok=n)
    stats = collected(path, m)
    renormalised = model_type == "mixtral"
    for block, p in zip(stats.blocks.values(), probabilities(path), strict=True):
        low = min(n, m)
        q_n, q_m = sums(p, n, renormalised)[1], sums(p, m, renormalised)[1]
        common = (p[:, :low] ** 2).sum(-1)
        if renormalised:
            common = common / (p[:, :n].sum(-1) * p[:, :m].sum(-1))
        said = said_squared(path)[block.where]
        s_norm = math.sqrt(float((said * q_n).sum() / (said * q_m).sum()))
        s_ls = float((said * common).sum() / (said * q_m).sum())
        assert norm_matched(block, m) == pytest.approx(s_norm, rel=1e-4)
        assert measured(block, m) == pytest.approx(s_ls, rel=1e-4)
        assert gate(block, m) == pytest.approx(math.sqrt(float(q_n.sum() / q_m.sum())), rel=1e-4)
        if m < n and not renormalised:
            assert measured(block, m) == pytest.approx(1, rel=1e-4)


def said_squared(path: Path) -> dict[str, torch.Tensor]:
    """|f|^2 [T] of the first expert in each layer; the others' are the same."""
    found = {}
    model = load(path)
    for number, layer in enumerate(model.model.layers):

        def watch(module: Any, args: Any, where: str = f"model.layers.{number}") -> None:
            hidden = args[0]
            module_out = type(module).forward(
                module, hidden, torch.zeros(len(hidden), 1, dtype=torch.long), torch.ones(len(hidden), 1)
            )
            found[where] = (module_out**2).sum(-1)

        layer.mlp.experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(PROMPT)
    return found


@pytest.mark.parametrize(("n", "m"), [(2, 1), (2, 3)])
def test_identical_experts(tmp_path: Path, n: int, m: int) -> None:
    """A renormalised router needs no factor; for a raw one it is the ratio of the gates' sums."""
    even = synthetic(tmp_path / "renormalised", "mixtral", correlated=True, num_experts_per_tok=n)
    for block in collected(even, m).blocks.values():
        assert measured(block, m) == pytest.approx(1, rel=1e-4)
        assert norm_matched(block, m) == pytest.approx(1, rel=1e-4)
    raw = synthetic(tmp_path / "raw", "olmoe", correlated=True, num_experts_per_tok=n)
    for block, p in zip(collected(raw, m).blocks.values(), probabilities(raw), strict=True):
        said = said_squared(raw)[block.where]
        g_n, g_m = sums(p, n, False)[0], sums(p, m, False)[0]
        expected = float((said * g_n * g_m).sum() / (said * g_m**2).sum())
        assert measured(block, m) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("renormalised", "n", "m", "s_norm", "s_ls"),
    [
        (True, 2, 3, math.sqrt(3 / 2), 1),
        (True, 4, 2, math.sqrt(2 / 4), 2 / 4),
        (False, 2, 3, math.sqrt(2 / 3), 2 / 3),
        (False, 4, 2, math.sqrt(4 / 2), 1),
    ],
)
def test_even_gates(renormalised: bool, n: int, m: int, s_norm: float, s_ls: float) -> None:
    """Equal gates, experts at right angles: the closed forms."""
    gates = {k: 1 / k if renormalised else 1 / 8 for k in (n, m)}
    low = min(n, m)
    gram = {k: np.diag([gates[k] ** 2] * k + [0] * (8 - k)) for k in (n, m)}
    block = BlockStats(
        "b",
        {
            name: np.stack([value, value])
            for name, value in {
                "gram": gram[n],
                f"gram@{m}": gram[m],
                f"cross@{m}": np.array([gates[n] * gates[m]] * low + [0] * (8 - low)),
            }.items()
        },
    )
    assert norm_matched(block, m) == pytest.approx(s_norm)
    assert measured(block, m) == pytest.approx(s_ls)


def routed(path: Path, m: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each layer y_n [T, H], and g_i f_i [T, E, H] at top-k m on the same inputs, by transformers."""
    model = load(path)
    found = {}
    for number, layer in enumerate(model.model.layers):

        def watch(module: Any, args: Any, out: Any, where: str = f"model.layers.{number}") -> None:
            flat = args[0].flatten(0, 1)
            before, module.gate.top_k = module.gate.top_k, m
            _, weights, index = module.gate(flat)
            module.gate.top_k = before
            parts = torch.zeros(len(flat), 8, flat.shape[-1])
            for slot in range(m):
                for t in range(len(flat)):
                    e = int(index[t, slot])
                    one = type(module.experts).forward(
                        module.experts, flat[t : t + 1], torch.tensor([[e]]), weights[t, slot].reshape(1, 1)
                    )
                    parts[t, e] = one[0]
            found[where] = (out.flatten(0, 1), parts)

        layer.mlp.register_forward_hook(watch)
    with torch.no_grad():
        model(PROMPT)
    return found


def test_least_squares_by_torch(models: Any) -> None:
    """Factors by torch's own solver on outputs seen in transformers; and each family of them fits better."""
    path = models("mixtral")
    stats = collected(path, 3)
    for where, (y_n, parts) in routed(path, 3).items():
        block = stats.blocks[where]
        y_m = parts.sum(1)
        single = torch.linalg.lstsq(y_m.reshape(-1, 1), y_n.reshape(-1, 1)).solution.item()
        assert measured(block, 3) == pytest.approx(single, rel=1e-3)
        angle = torch.nn.functional.cosine_similarity(y_n.reshape(1, -1), y_m.reshape(1, -1)).item()
        assert measured(block, 3) == pytest.approx(angle * norm_matched(block, 3), rel=1e-3)
        each = torch.linalg.lstsq(parts.transpose(1, 2).reshape(-1, 8), y_n.reshape(-1, 1)).solution[:, 0]
        found = per_expert_factor(block.total("gram@3"), block.total("cross@3"), ridge=1e-9)
        assert found == pytest.approx(each.numpy(), rel=5e-3, abs=5e-3)

        def error(factors: Any, y_n: torch.Tensor = y_n, parts: torch.Tensor = parts) -> float:
            values = torch.as_tensor(factors, dtype=torch.float32)
            return float((y_n - (parts * values.expand(8)[None, :, None]).sum(1)).norm())

        assert error(found) <= error(measured_expert(block, 3)) + 1e-6
        assert error(measured_expert(block, 3)) < error(measured(block, 3)) < error(1.0)
        assert error(measured(block, 3)) < error(norm_matched(block, 3))


# What is written


@pytest.mark.parametrize("fused", [False, True])
def test_factors_are_in_the_down_projections(models: Any, tmp_path: Path, fused: bool) -> None:
    path = models("qwen2_moe", fused=fused)
    stats = collected(path, 3).save(tmp_path / "s")
    plan = apply(plan_of(open_checkpoint(path)), "rescale", top_k=3, scale="measured-expert", stats=str(stats))
    write_plan(plan, tmp_path / "out")
    factors = {layer["layer"]: layer["factor"] for layer in plan.steps[0].report["layers"]}
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        layer = ".".join(name.split(".")[:3])
        if name.endswith("experts.down_proj"):
            expected = tensor * torch.tensor(factors[layer])[:, None, None]
        elif "experts." in name and "down_proj" in name and "shared" not in name:
            expected = tensor * factors[layer][int(name.split(".")[5])]
        else:
            assert same_bits(after[name], tensor)
            continue
        assert torch.allclose(after[name], expected, rtol=1e-6)
        assert not torch.equal(after[name], tensor)


def test_one_number_in_the_config_only_when_asked(models: Any, tmp_path: Path) -> None:
    path = models("deepseek_v3")
    stats = str(collected(path, 3).save(tmp_path / "s"))
    plan = plan_of(open_checkpoint(path))
    auto = apply(plan, "rescale", top_k=3, scale="measured", stats=stats)
    assert auto.steps[0].report["where"] == "weights"
    asked = apply(plan, "rescale", top_k=3, scale="measured", stats=stats, where="config")
    assert asked.steps[0].report["where"] == "config"
    (factor,) = {layer["factor"] for layer in auto.steps[0].report["layers"]}  # one MoE layer
    assert asked.config["routed_scaling_factor"] == pytest.approx(plan.config["routed_scaling_factor"] * factor)
    with pytest.raises(RefusedError, match="not one per expert"):
        apply(plan, "rescale", top_k=3, scale="measured-expert", stats=stats, where="config")


def test_rules_that_need_statistics(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    plan = plan_of(open_checkpoint(path))
    with pytest.raises(RecipeError, match="needs statistics"):
        apply(plan, "rescale", top_k=3, scale="measured")
    stats = str(collected(path, 3).save(tmp_path / "s"))
    with pytest.raises(RefusedError, match="has sums for 3, not for top-k 4"):
        apply(plan, "rescale", top_k=4, scale="measured", stats=stats)
    same = apply(plan, "rescale", top_k=2, scale="measured", stats=stats)
    assert list(same.untouched()) == list(plan.untouched())


# The command


def test_the_command_measures_every_rule_and_writes_one(demo: Path, tmp_path: Path, ok: Cli) -> None:
    arguments = ["rescale", demo, "--top-k", 3, "--scale", "measured-expert", "-o", tmp_path / "out"]
    arguments += ["--text", demo.parent / "calibration-code.txt", "--window", 64, "--tokens", 2048]
    document = ok(*arguments, "--json").json
    nats = document["heldout"]["nats"]
    assert nats.keys() == {
        *("original", "none", "published", "norm", "router"),
        *("gate", "norm-matched", "measured", "measured-expert"),
    }
    assert max(nats[r] for r in ("measured", "measured-expert", "gate")) < nats["none"] < nats["published"]
    step = document["steps"][0]["report"]
    assert step["rule"] == "measured-expert"
    assert step["statistics"]["tokens"] == 1536  # a quarter of the windows is held out
    # The written model has the loss that was foretold, on other text too.
    text = demo.parent / "heldout-code.txt"
    options = ["--top-k", 3, "--heldout", text, "--limit", 1, "--stats", tmp_path / "out.stats.safetensors"]
    told = ok("rescale", demo, "--scale", "measured-expert", *options, "--dry-run", "--json").json["heldout"]
    found = ok("perplexity", tmp_path / "out", text, "--limit", 1, "--json").json["domains"][0]
    assert told["tokens"] == found["tokens"]
    assert told["nats"]["measured-expert"] == pytest.approx(found["nats"], abs=1e-5)
    shown = ok("rescale", demo, "--scale", "measured", *options, "--window", 32, "--dry-run").out
    assert shown.index("measured-expert") < shown.index("published")
    assert "over the original" in shown
