"""Rescale: the factor by each rule, where it goes, and that the model computes what was promised."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.families.config_keys import Settings
from moesurgery.families.routing import second_moments
from tests.conftest import Result
from tests.tiny import TINY, experts_multiplied, load, logits, read_tensors, same_bits

Cli = Callable[..., Result]
TOP_K_FAMILIES = [t for t in TINY if t != "phimoe"]


def rescaled(model: Path, out: Path, **parameters: Any) -> dict[str, Any]:
    plan = apply(plan_of(open_checkpoint(model)), "rescale", **parameters)
    write_plan(plan, out)
    return dict(plan.steps[0].report)


def factors(report: dict[str, Any]) -> dict[str, float]:
    return {entry["layer"]: entry["factor"] for entry in report["layers"]}


# Rules


@pytest.mark.parametrize(
    ("model_type", "norm", "published"),
    [
        ("mixtral", math.sqrt(3 / 2), math.sqrt(2 / 3)),
        ("qwen3_moe", math.sqrt(3 / 2), math.sqrt(2 / 3)),
        ("deepseek_v3", math.sqrt(3 / 2), math.sqrt(2 / 3)),
        ("gpt_oss", math.sqrt(3 / 2), math.sqrt(2 / 3)),
        ("olmoe", math.sqrt(2 / 3), math.sqrt(2 / 3)),
        ("qwen2_moe", math.sqrt(2 / 3), math.sqrt(2 / 3)),
        ("deepseek_v2", math.sqrt(2 / 3), math.sqrt(2 / 3)),
        ("jamba", math.sqrt(2 / 3), math.sqrt(2 / 3)),
    ],
)
def test_even_gates_by_routing_class_and_the_published_rule(
    models: Any, model_type: str, norm: float, published: float
) -> None:
    plan = plan_of(open_checkpoint(models(model_type)))
    for rule, expected in (("norm", norm), ("published", published)):
        report = apply(plan, "rescale", top_k=3, scale=rule).steps[0].report
        assert set(factors(report).values()) == {expected}


def test_published_is_the_figure_of_the_issue(demo: Path) -> None:
    report = apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3, scale="published").steps[0].report
    assert all(round(f, 6) == 0.816497 for f in factors(report).values())


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"norm_topk_prob": False}])
def test_the_direction_follows_the_config(models: Any, changes: dict[str, bool]) -> None:
    plan = plan_of(open_checkpoint(models("olmoe", **changes)))
    report = apply(plan, "rescale", top_k=4, scale="norm").steps[0].report
    assert set(factors(report).values()) == {math.sqrt(2) if changes["norm_topk_prob"] else math.sqrt(0.5)}


@pytest.mark.parametrize("top_k", [1, 3, 4, 8])
def test_the_router_estimate_lies_between_nothing_and_even_gates(models: Any, top_k: int) -> None:
    for model_type in ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "jamba", "lfm2_moe"):
        if model_type == "deepseek_v3" and top_k == 8:
            continue  # more than its groups can reach
        report = (
            apply(plan_of(open_checkpoint(models(model_type))), "rescale", top_k=top_k, scale="router").steps[0].report
        )
        low, high = sorted((1.0, report["alternatives"]["norm"]))
        for factor in factors(report).values():
            assert low - 1e-9 <= factor <= high + 1e-9, model_type


def test_the_router_estimate_by_brute_force(demo: Path) -> None:
    """The same estimate from a transformers model: its own router modules on its own normalised embeddings."""
    report = apply(plan_of(open_checkpoint(demo)), "rescale", top_k=3).steps[0].report
    model = load(demo)
    embedding = model.model.embed_tokens.weight
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            hidden = layer.post_attention_layernorm(embedding)
            moments = []
            for k in (2, 3):
                layer.mlp.gate.top_k = k
                _, weights, _ = layer.mlp.gate(hidden)
                moments.append(weights.double().pow(2).sum(-1).mean().item())
        assert factors(report)[f"model.layers.{i}"] == pytest.approx(math.sqrt(moments[0] / moments[1]), rel=1e-4)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_router_estimate_for_correlated_experts_by_brute_force(models: Any, rho: float) -> None:
    """E|y|^2 for outputs of length one, any two of which have the cosine rho, by the model's own router."""
    for model_type in ("qwen3_moe", "olmoe"):
        path = models(model_type)
        report = apply(plan_of(open_checkpoint(path)), "rescale", top_k=4, rho=rho).steps[0].report
        model = load(path)
        cosines = torch.full((8, 8), rho, dtype=torch.float64).fill_diagonal_(1.0)
        for i, layer in enumerate(model.model.layers):
            if not hasattr(layer.mlp, "gate"):
                continue  # a dense layer
            with torch.no_grad():
                hidden = layer.post_attention_layernorm(model.model.embed_tokens.weight)
                sizes = []
                for k in (2, 4):
                    layer.mlp.gate.top_k = k
                    _, weights, index = layer.mlp.gate(hidden)
                    dense = torch.zeros(len(hidden), 8, dtype=torch.float64).scatter_(1, index, weights.double())
                    sizes.append(torch.einsum("ti,ij,tj->t", dense, cosines, dense).mean().item())
            # The model's norm adds an epsilon, which tells on embeddings as small as an untrained model's.
            assert factors(report)[f"model.layers.{i}"] == pytest.approx(math.sqrt(sizes[0] / sizes[1]), rel=5e-3)
            if rho == 1 and model_type == "qwen3_moe":
                assert factors(report)[f"model.layers.{i}"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("model_type", "changes", "top_k", "rho"),
    [
        ("mixtral", {}, 1, 0.3),
        ("mixtral", {}, 3, 0.0),
        ("qwen3_moe", {"num_experts_per_tok": 4}, 2, 0.1),
        ("qwen3_moe", {"num_experts_per_tok": 4}, 6, 0.2),
        ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": False}, 6, 0.0),
        ("deepseek_v3", {}, 1, 0.0),
        ("deepseek_v3", {}, 3, 0.5),
    ],
)
def test_the_correlation_that_is_assumed(
    models: Any, model_type: str, changes: dict[str, Any], top_k: int, rho: float
) -> None:
    plan = plan_of(open_checkpoint(models(model_type, **changes)))
    step = apply(plan, "rescale", top_k=top_k).steps[0]
    assert (step.report["rho"], step.parameters["rho"]) == (rho, rho)
    given = apply(plan, "rescale", top_k=top_k, rho=rho).steps[0]
    assert factors(given.report) == factors(step.report)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_second_moments_are_those_of_the_models_own_router(models: Any, model_type: str) -> None:
    path = models(model_type)
    model = load(path)
    settings = Settings(open_anatomy(path).family, open_checkpoint(path).config)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    router = next(m for n, m in model.named_modules() if n.endswith((".gate", ".router")) and hasattr(m, "weight"))
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args), with_kwargs=True)
    logits(model)
    hidden, weights = seen[0][0].reshape(-1, 32), seen[0][2]
    raw = (
        torch.nn.functional.linear(hidden.float(), router.weight.float(), getattr(router, "bias", None))
        .detach()
        .numpy()
    )
    bias = None
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            bias = tensor.detach().numpy()
            break
    moments = second_moments(settings, raw, bias)
    routed_scale_key = settings.routed_scale_key or 1.0
    expected = (weights.double() / routed_scale_key).pow(2).sum(-1).mean().item()
    assert moments[1] == pytest.approx(expected, rel=1e-4)


def open_anatomy(path: Path) -> Any:
    return plan_of(open_checkpoint(path)).anatomy


def test_the_same_seed_gives_the_same_sample_and_another_does_not(models: Any) -> None:
    path = models("mixtral", vocab_size=20_000)
    plan = plan_of(open_checkpoint(path))
    runs = [factors(apply(plan, "rescale", top_k=3, seed=s).steps[0].report) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_going_nowhere_changes_nothing(demo: Path, tmp_path: Path) -> None:
    report = rescaled(demo, tmp_path / "out", top_k=2)
    assert set(factors(report).values()) == {1.0}
    before, after = read_tensors(demo), read_tensors(tmp_path / "out")
    assert all(same_bits(after[n], before[n]) for n in before)


def test_dbrx_norm_orders() -> None:
    """The even-gates factor and the moments of an L_p normalised router, on even gates."""
    from moesurgery.families.family import Family, Flag, RouterRule
    from moesurgery.families.routing import even_gates_factor

    for order in (1.0, 2.0, None):
        family = Family("x", (), (), (), routing=RouterRule(renormalised=Flag(("p",), 1.0, null_means_off=True)))
        settings = Settings(family, {"p": order})
        moments = second_moments(settings, np.zeros((5, 8)))
        assert math.sqrt(moments[1] / moments[3]) == pytest.approx(even_gates_factor(settings, 2, 4))


# What the model then computes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", TOP_K_FAMILIES)
def test_logits_equal_expert_outputs_times_the_factor(
    models: Any, tmp_path: Path, model_type: str, fused: bool
) -> None:
    path = models(model_type, fused=fused)
    report = rescaled(path, tmp_path / "out", top_k=3)
    by_layer = factors(report)
    if report["where"] == "config":
        mean = math.exp(sum(map(math.log, by_layer.values())) / len(by_layer))
        by_layer = dict.fromkeys(by_layer, mean)
    reference = load(path, num_experts_per_tok=3)
    with experts_multiplied(reference, lambda name: by_layer[".".join(name.split(".")[:3])]):
        expected = logits(reference)
    unscaled = logits(reference)
    found = logits(load(tmp_path / "out"))
    assert (expected - unscaled).abs().max() > 1e-3  # else the test could not fail
    assert (found - expected).abs().max() < 2e-6


def test_the_config_number_takes_the_factor_and_no_weight_file_changes(models: Any, tmp_path: Path) -> None:
    path = models("deepseek_v3")
    report = rescaled(path, tmp_path / "out", top_k=4, scale="norm")
    assert report["where"] == "config"
    for shard in path.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out"))
    assert after["routed_scaling_factor"] == pytest.approx(before["routed_scaling_factor"] * math.sqrt(2))


def test_config_and_weights_are_the_same_edit(models: Any, tmp_path: Path) -> None:
    for where in ("config", "weights"):
        rescaled(models("deepseek_v3"), tmp_path / where, top_k=4, scale="norm", where=where)
    difference = logits(load(tmp_path / "config")) - logits(load(tmp_path / "weights"))
    assert difference.abs().max() < 2e-6


def test_a_per_layer_rule_keeps_its_layers_in_the_weights(models: Any, tmp_path: Path) -> None:
    path = models("deepseek_v3", num_hidden_layers=3)
    report = rescaled(path, tmp_path / "out", top_k=4, where="weights")
    assert len(set(factors(report).values())) == 2
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    for layer, factor in factors(report).items():
        for name in (n for n in before if n.startswith(f"{layer}.mlp.experts.") and "down_proj" in n):
            assert same_bits(after[name], before[name] * factor)


def test_every_alias_of_the_key_is_edited(models: Any, tmp_path: Path) -> None:
    path = models("gpt_oss")
    config = json.loads((path / "config.json").read_text())
    model = plan_of(open_checkpoint(path))
    edited = apply(
        type(model)(model.sources, model.tensors, model.shard_of, {**config, "experts_per_token": 2}),
        "rescale",
        top_k=3,
    )
    assert edited.config["num_experts_per_tok"] == edited.config["experts_per_token"] == 3


def test_biases_of_the_down_projection_are_scaled_too(models: Any, tmp_path: Path) -> None:
    rescaled(models("gpt_oss"), tmp_path / "out", top_k=4, scale=2.0)
    before, after = read_tensors(models("gpt_oss")), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        expected = tensor * 2 if "down_proj" in name else tensor
        assert same_bits(after[name], expected), name


# Refusals


@pytest.mark.parametrize(("top_k", "message"), [(9, "8 experts"), (100, "8 experts")])
def test_impossible_top_k(demo: Path, cli: Cli, tmp_path: Path, top_k: int, message: str) -> None:
    result = cli("rescale", demo, "--top-k", top_k, "-o", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert "between 1 and 8" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("top_k", ["0", "-1", "two", "2.5"])
def test_nonsense_top_k(demo: Path, cli: Cli, top_k: str) -> None:
    result = cli("rescale", demo, "--top-k", top_k)
    assert result.code == 2
    assert "--top-k" in result.err


def test_more_than_the_groups_reach(models: Any) -> None:
    plan = plan_of(open_checkpoint(models("deepseek_v3")))
    with pytest.raises(RefusedError, match="1 of 2 groups, 4 experts"):
        apply(plan, "rescale", top_k=5)


def test_a_router_whose_k_is_in_the_code(models: Any) -> None:
    with pytest.raises(RefusedError, match="always uses top-2"):
        apply(plan_of(open_checkpoint(models("phimoe"))), "rescale", top_k=3)


@pytest.mark.parametrize(
    ("model_type", "where", "message"),
    [("mixtral", "config", "no config number"), ("mixtral", "scales", "not quantised")],
)
def test_places_that_are_not_there(models: Any, model_type: str, where: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        apply(plan_of(open_checkpoint(models(model_type))), "rescale", top_k=3, where=where)


@pytest.mark.parametrize("stated", [0, 9])
def test_an_impossible_top_k_in_the_config(demo: Path, cli: Cli, tmp_path: Path, stated: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": stated}))
    for command in (["rescale", model, "--top-k", 3, "-o", tmp_path / "out"], ["count-params", model]):
        result = cli(*command)
        assert result.code == 2
        assert f"num_experts_per_tok is {stated}, each layer has 8 experts" in result.err
        assert "between 1 and 8" in result.err
    assert cli("count-params", model, "--top-k", 3).code == 0


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("0", "would silence the experts"),
        ("-1", "would turn the experts' output around"),
        ("nan", "is not one of router"),
        ("inf", "is not one of router"),
        ("sqrt", "is not one of router"),
    ],
)
def test_nonsense_factors(demo: Path, cli: Cli, tmp_path: Path, scale: str, message: str) -> None:
    result = cli("rescale", demo, "--top-k", "3", "--scale", scale, "-o", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_a_dense_model(tmp_path: Path, cli: Cli) -> None:
    from tests.tiny import save_tiny

    save_tiny("llama", tmp_path / "dense", intermediate_size=48)
    result = cli("rescale", tmp_path / "dense", "--top-k", 3)
    assert result.code == 2
    assert "dense model" in result.err


# The command


def test_the_command_says_which_rule_why_and_what_others_give(demo: Path, ok: Cli, tmp_path: Path) -> None:
    out = ok("rescale", demo, "--top-k", 3, "-o", tmp_path / "out").out
    assert "rule `router`" in out
    assert "renormalises its weights" in out
    assert "router (used)" in out
    assert "1.224745" in out
    assert "0.816497" in out
    assert out.count("model.layers.") == 6


def test_held_out_loss_of_the_demo_model(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """The default rule costs less than a factor of one, and the published rule more."""
    text = demo.parent / "heldout-code.txt"
    nats = {}
    for rule in ("router", "none", "published"):
        ok("rescale", demo, "--top-k", 3, "--scale", rule, "-o", tmp_path / rule, "-q")
        nats[rule] = ok("perplexity", tmp_path / rule, text, "--limit", 8, "--json").json["domains"][0]["nats"]
    base = ok("perplexity", demo, text, "--limit", 8, "--json").json["domains"][0]["nats"]
    assert base < nats["router"] < nats["none"] < nats["published"]
    assert nats["router"] - base < 0.4 * (nats["none"] - base)
