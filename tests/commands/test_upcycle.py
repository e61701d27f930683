"""Upcycle: designs that equal the dense model, what is refused, routers, the proof, and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RecipeError, RefusedError
from moesurgery.expr.elementwise import scale
from moesurgery.surgery.upcycle.design import Design
from moesurgery.surgery.upcycle.mixture import Mixture
from moesurgery.write.write_plan import WriteOptions
from tests.conftest import Result
from tests.dense import DELTA, LATENT, LLAMA3, LONG_PROMPT, NARROW, save_dense
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Cli = Callable[..., Result]
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
MIXTRAL_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    save_dense(path, "llama", **LLAMA3)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Dense models by type, each made once."""
    made: dict[str, Path] = {}

    def get(model_type: str, **changes: Any) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("dense") / model_type
            save_dense(made[model_type], model_type, **changes)
        return made[model_type]

    return get


def upcycled(model: Path, out: Path, *, options: WriteOptions | None = None, **parameters: Any) -> dict[str, Any]:
    plan = apply(plan_of(open_checkpoint(model)), "upcycle", **{"proof": False, **parameters})
    write_plan(plan, out, options or WriteOptions(durable=False))
    return dict(plan.steps[0].report)


def difference(a: Path, b: Path) -> float:
    return float((logits(load(a), LONG_PROMPT) - logits(load(b), LONG_PROMPT)).abs().max())


# Designs: every one of these is the dense model at step 0

DESIGNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", LLAMA3, {"to": "mixtral", "experts": 8, "granularity": 2}),
    ("llama", LLAMA3, {"to": "mixtral", "experts": 8, "granularity": 4, "top_k": 8, "router_std": 1.0}),
    ("llama", LLAMA3, {"to": "mixtral", "experts": 8, "top_k": 1, "router": "uniform"}),
    ("llama", LLAMA3, {"to": "mixtral", "experts": 8, "top_k": 8, "router": "zero"}),
    ("llama", LLAMA3, {"to": "mixtral", "experts": 4, "top_k": 4, "split": "random", "router": "zero"}),
    ("llama", LLAMA3, {"to": "mixtral", "experts": 4, "top_k": 4, "split": "clusters", "router": "zero"}),
    ("llama", LLAMA3, {"to": "granitemoe", "experts": 8, "granularity": 2, "top_k": 4}),
    ("llama", LLAMA3, {"to": "granitemoeshared", "experts": 6, "granularity": 3, "shared_expert": 0.25}),
    ("llama", LLAMA3, {"to": "qwen2_moe", "experts": 4, "granularity": 2, "shared_expert": 0.5}),
    ("llama", LLAMA3, {"to": "qwen2_moe", "experts": 4, "shared_expert": 1.0}),
    ("llama", LLAMA3, {"to": "qwen2_moe", "experts": 4, "renormalise": False, "router": "zero"}),
    ("llama", LLAMA3, {"to": "solar_open", "experts": 8, "granularity": 2, "shared_expert": 0.5}),
    ("llama", LLAMA3, {"to": "glm4_moe", "experts": 4, "renormalise": False, "router": "zero", "shared_expert": 0.5}),
    ("llama", LLAMA3, {"to": "ernie4_5_moe", "experts": 4, "granularity": 2, "shared_expert": 0.5}),
    ("llama", LLAMA3, {"to": "llama4_text", "experts": 4, "shared_expert": 1.0}),
    ("qwen3", NARROW, {"to": "qwen3_moe", "experts": 8, "granularity": 2}),
    ("qwen3", NARROW, {"to": "qwen3_moe", "experts": 8, "renormalise": False, "router": "zero"}),
    ("qwen3", NARROW, {"to": "dots1", "experts": 8, "granularity": 4, "shared_expert": 0.5}),
    ("qwen3_5_text", {**DELTA, "initializer_range": 0.01}, {"experts": 8, "granularity": 2, "shared_expert": 0.5}),
    ("hunyuan_v1_dense", NARROW, {"experts": 4, "shared_expert": 0.5}),
    ("cohere", {}, {"experts": 4, "granularity": 2, "shared_expert": 0.5}),
    ("youtu", LATENT, {"to": "deepseek_v3", "experts": 8, "granularity": 4, "shared_expert": 0.5}),
    ("olmo2", {}, {"experts": 8, "granularity": 2}),
]


@pytest.mark.parametrize(
    ("source", "changes", "parameters"),
    DESIGNS,
    ids=[f"{s}-{i}-" + "-".join(map(str, p.values())) for i, (s, _, p) in enumerate(DESIGNS)],
)
def test_designs_compute_what_the_dense_model_does(
    sources: Any, tmp_path: Path, source: str, changes: dict[str, Any], parameters: dict[str, Any]
) -> None:
    path = sources(source, **changes)
    report = upcycled(path, tmp_path / "out", **parameters)
    assert report["exact"]
    expected = logits(load(path), LONG_PROMPT)
    found = logits(load(tmp_path / "out"), LONG_PROMPT)
    assert (found - expected).abs().max() <= 1e-5


INEXACT: list[tuple[dict[str, Any], str]] = [
    ({"reinit": 0.5}, "50% of each expert's neurons are drawn anew"),
    ({"noise": 0.1}, "noise on the experts"),
    ({"to": "qwen2_moe", "renormalise": False, "router_std": 0.5}, "the gates do not sum to the same"),
    ({"split": "random"}, "a token uses 2 of the 4 parts"),
    ({"split": "random", "top_k": 4, "router_std": 0.5}, "unequal gates"),
    ({"sources": [{"residual_scale": 0.5}]}, "residual_scale"),
]


@pytest.mark.parametrize(("parameters", "reason"), INEXACT, ids=[reason for _, reason in INEXACT])
def test_what_is_not_exact_says_so_and_is_not(
    llama: Path, tmp_path: Path, parameters: dict[str, Any], reason: str
) -> None:
    report = upcycled(llama, tmp_path / "out", experts=4, **parameters)
    assert not report["exact"]
    assert any(reason in text for text in report["inexact"])
    assert difference(llama, tmp_path / "out") > 1e-3


def test_copies_are_the_source_bytes(llama: Path, tmp_path: Path) -> None:
    upcycled(llama, tmp_path / "out", experts=3)
    before, after = read_tensors(llama), read_tensors(tmp_path / "out")
    for layer in range(3):
        for theirs, ours in MIXTRAL_NAMES.items():
            source = before.pop(f"model.layers.{layer}.mlp.{ours}.weight")
            for expert in range(3):
                assert same_bits(after.pop(EXPERT.format(layer, expert, theirs)), source)
        assert after.pop(ROUTER.format(layer)).shape == (3, 32)
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)


def test_copies_are_copied_by_ranges_and_only_routers_are_computed(llama: Path, cli: Cli) -> None:
    for extra in ((), ("--granularity", 2)):
        report = cli("upcycle", llama, "--experts", 8, *extra, "--dry-run", "--json", "--no-proof").json
        down = 0 if not extra else 8 * 3
        assert report["tensors"]["computed"] == 3 + down


def test_slices_stand_in_groups_and_share_a_router_row(llama: Path, tmp_path: Path) -> None:
    upcycled(llama, tmp_path / "out", experts=6, granularity=3, top_k=3)
    before, after = read_tensors(llama), read_tensors(tmp_path / "out")
    for expert in range(6):
        part = slice(16 * (expert % 3), 16 * (expert % 3 + 1))
        up = before["model.layers.1.mlp.up_proj.weight"]
        down = before["model.layers.1.mlp.down_proj.weight"]
        assert same_bits(after[EXPERT.format(1, expert, "w3")], up[part])
        assert torch.equal(after[EXPERT.format(1, expert, "w2")], down[:, part] * 3)
    rows = after[ROUTER.format(1)]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[2], rows[3])


def test_the_config_keeps_unknown_keys_and_aligns_counts(llama: Path, tmp_path: Path) -> None:
    config = read_config(llama)
    model = tmp_path / "model"
    model.mkdir()
    for file in llama.glob("*.safetensors*"):
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "our_own_key": [1, {"a": None}], "auto_map": {"x": "y"}}))
    upcycled(model, tmp_path / "out", experts=8, granularity=2, top_k=4, to="solar_open")
    found = read_config(tmp_path / "out")
    assert found["our_own_key"] == [1, {"a": None}]
    assert "auto_map" not in found
    assert found["architectures"] == ["SolarOpenForCausalLM"]
    assert (found["n_routed_experts"], found["num_experts_per_tok"], found["moe_intermediate_size"]) == (8, 4, 24)
    assert found["rope_parameters"] == {**config["rope_parameters"], "partial_rotary_factor": 1.0} or (
        found["rope_parameters"] == config["rope_parameters"]
    )


# Routers


def test_a_random_router_has_the_types_own_deviation(sources: Any, tmp_path: Path) -> None:
    path = sources("mistral", hidden_size=512, head_dim=8, sliding_window=None, initializer_range=0.05)
    upcycled(path, tmp_path / "a", experts=32, seed=1)
    upcycled(path, tmp_path / "b", experts=32, seed=2)
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    rows = torch.stack([a[ROUTER.format(i)] for i in range(3)])
    assert abs(float(rows.std()) - 0.05) < 0.001
    assert abs(float(rows.mean())) < 0.001
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], b[ROUTER.format(0)])
    changed = [name for name in a if not same_bits(a[name], b[name])]
    assert changed == [ROUTER.format(i) for i in range(3)]


def test_random_numbers_depend_on_neither_threads_nor_shards(llama: Path, tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"experts": 4, "reinit": 0.25, "noise": 0.01, "seed": 3}
    plan = apply(plan_of(open_checkpoint(llama)), "upcycle", proof=False, **parameters)
    write_plan(plan, tmp_path / "a", WriteOptions(jobs=1, durable=False))
    from dataclasses import replace

    write_plan(replace(plan, max_shard_size=30_000), tmp_path / "b", WriteOptions(jobs=4, durable=False))
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > len(list((tmp_path / "a").glob("*.safetensors")))
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)


def test_router_rows_from_a_file(llama: Path, tmp_path: Path) -> None:
    rows = {f"layers.{i}": torch.randn(4, 32) for i in range(3)}
    save_file(rows, tmp_path / "rows.safetensors")
    upcycled(llama, tmp_path / "out", experts=8, granularity=2, router=str(tmp_path / "rows.safetensors"))
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[ROUTER.format(2)], rows["layers.2"].repeat_interleave(2, 0))
    save_file({"layers.0": torch.randn(3, 32)}, tmp_path / "bad.safetensors")
    with pytest.raises(RecipeError, match=r"layers.0 has shape \[3, 32\]"):
        upcycled(llama, tmp_path / "out2", experts=4, router=str(tmp_path / "bad.safetensors"))
    with pytest.raises(RecipeError, match="neither a kind of router nor a file") as caught:
        upcycled(llama, tmp_path / "out2", experts=4, router="randon")
    assert caught.value.hint == "did you mean 'random'?"
    (tmp_path / "rows.yaml").write_text("layers.0: 1")
    with pytest.raises(RecipeError, match="cannot be read as router rows"):
        upcycled(llama, tmp_path / "out2", experts=4, router=str(tmp_path / "rows.yaml"))


# What is refused

REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"experts": 4, "top_k": 5}, "top-k 5 of 4 experts", "up to 4"),
    ({"experts": 7, "granularity": 2}, "7 experts are no whole groups of 2 slices", "--experts 8"),
    ({"experts": 8, "granularity": 4, "top_k": 6}, "miss some of the 4 slices", "--top-k 8"),
    ({"experts": 10, "granularity": 5}, "48 neurons, which 5 does not divide", "another number"),
    ({"experts": 4, "granularity": 2, "split": "random"}, "two ways to cut", "one of them"),
    ({}, "how many experts", "--experts"),
    ({"experts": 8, "to": "mixtral", "shared_expert": 0.5}, "no shared expert", "--to qwen2_moe"),
    ({"experts": 8, "to": "llama4_text", "shared_expert": 0.5}, "multiplies the experts' input", "--shared-expert 1"),
    ({"experts": 8, "to": "mixtral", "renormalise": False}, "always makes the chosen gates sum to 1", "leave out"),
    ({"experts": 8, "to": "qwen2_moe", "split": "random", "shared_expert": 0.5}, "leaves no FFN", "--granularity"),
    ({"experts": 8, "granularity": 2, "top_k": 2, "router": "zero"}, "all experts tie", "--router random"),
    ({"experts": 8, "rest": "average"}, "at least two different models", ""),
    ({"experts": 8, "router": "hidden"}, "needs prompts for every source", "prompts"),
]


@pytest.mark.parametrize(("parameters", "reason", "hint"), REFUSALS, ids=[reason for _, reason, _ in REFUSALS])
def test_designs_that_cannot_be(llama: Path, parameters: dict[str, Any], reason: str, hint: str) -> None:
    with pytest.raises((RefusedError, RecipeError)) as caught:
        apply(plan_of(open_checkpoint(llama)), "upcycle", proof=False, **parameters)
    assert reason in caught.value.message
    assert hint in (caught.value.hint or "")


def edited_copy(model: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    to.mkdir()
    tensors = read_tensors(model)
    edit(tensors)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((model / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.update({"model.layers.1.mlp.down_proj.bias": torch.zeros(32)}), "no place in a llama"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}), "no place in a llama"),
        (lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": torch.zeros(32, 32)}), "no place in a llama"),
        (lambda t: t.update({"vision.patch.weight": torch.zeros(4)}), "no place in a llama"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layer 1: mlp.up_proj.weight is missing"),
        (lambda t: t.pop("model.layers.2.input_layernorm.weight"), "3 layers, but 2 have input_layernorm.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32)}),
            "has shape|its gate",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32).to(torch.float8_e4m3fn)}),
            "a quantised FFN",
        ),
    ],
)
def test_tensors_that_would_be_lost_or_made_up(llama: Path, tmp_path: Path, edit: Any, reason: str) -> None:
    model = edited_copy(llama, tmp_path / "model", edit)
    with pytest.raises((RefusedError, CheckpointError), match=reason):
        apply(plan_of(open_checkpoint(model)), "upcycle", experts=4, proof=False)


def test_a_mixture_is_refused(models: Any, cli: Cli) -> None:
    result = cli("upcycle", models("mixtral"), "--experts", 8)
    assert result.code == 2
    assert "a mixture of experts already" in result.err


# The proof


def test_the_proof_gives_a_figure_without_reading_weights(llama: Path, tmp_path: Path) -> None:
    model = edited_copy(llama, tmp_path / "nan", lambda t: [x.fill_(float("nan")) for x in t.values()] and None)
    step = apply(plan_of(open_checkpoint(model)), "upcycle", experts=8, granularity=2).steps[0]
    assert 0 < step.report["proof"]["max_logit_difference"] < 1e-4
    assert any("a clone of 3 small layers" in text for text in step.details)


def test_the_proof_fails_where_the_rewrite_is_wrong(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Design.routed_factor.fget
    assert right is not None
    monkeypatch.setattr(Design, "routed_factor", property(lambda self: 1.01 * right(self)))
    with pytest.raises(RefusedError, match="the proof failed"):
        apply(plan_of(open_checkpoint(llama)), "upcycle", experts=8)


def test_the_proof_shrinks_rope_and_windows_that_old_configs_have(tmp_path: Path) -> None:
    old: dict[str, Any] = {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "sliding_window": 4096}
    factors = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    save_dense(tmp_path / "model", "phi3")
    config = {**read_config(tmp_path / "model"), **old, "rope_scaling": {"type": "longrope", **factors}}
    del config["rope_parameters"]
    config["original_max_position_embeddings"] = 16
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    step = apply(plan_of(open_checkpoint(tmp_path / "model")), "upcycle", experts=4).steps[0]
    assert step.report["target"] == "glm4_moe"
    assert step.report["proof"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize(
    ("source", "changes", "lost"),
    [
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}, {"sliding_window": None}),
        (
            "llama",
            LLAMA3,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None},
        ),
        ("granite", {"residual_multiplier": 0.2}, {"residual_multiplier": 1.0}),
    ],
)
def test_the_proof_sees_what_a_short_prompt_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, changes: dict[str, Any], lost: dict[str, Any]
) -> None:
    save_dense(tmp_path / "model", source, **changes)
    plan = plan_of(open_checkpoint(tmp_path / "model"))
    apply(plan, "upcycle", experts=4)
    whole = Mixture.config
    monkeypatch.setattr(Mixture, "config", lambda self: {**whole(self), **lost})
    with pytest.raises(RefusedError, match="the proof failed"):
        apply(plan, "upcycle", experts=4)


# What is measured on the real models


def test_verify_compares_the_real_logits(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(open_checkpoint(llama))
    made = apply(plan, "upcycle", experts=4, granularity=2, verify=True, proof=False)
    verified = made.steps[0].report["verified"]
    assert verified["tokens"] == 64  # as many as the model allows
    assert verified["max_logit_difference"] <= 1e-5
    whole = Mixture.tensors

    def damaged(self: Mixture, rows: Any) -> Any:
        tensors, shard_of = whole(self, rows)
        name = EXPERT.format(1, 0, "w1")
        return {**tensors, name: scale(tensors[name], 1.5)}, shard_of

    monkeypatch.setattr(Mixture, "tensors", damaged)
    with pytest.raises(RefusedError, match="the mixture's logits differ from the dense model's"):
        apply(plan, "upcycle", experts=4, granularity=2, verify=True, proof=False)


def test_factors_that_sixteen_bits_round_are_said_and_are_no_failure(llama: Path, tmp_path: Path) -> None:
    load(llama).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    plan = plan_of(open_checkpoint(tmp_path / "half"))
    parameters: dict[str, Any] = {"experts": 4, "to": "qwen2_moe", "verify": True, "proof": False}
    (exact,) = apply(plan, "upcycle", shared_expert=0.5, **parameters).steps
    assert exact.report["rounded"] == []
    assert exact.report["verified"]["max_logit_difference"] <= 1e-5
    (step,) = apply(plan, "upcycle", shared_expert=0.3, **parameters).steps
    assert "times 0.7 and 0.6, not powers of two, in BF16" in step.details[0]
    assert step.report["verified"]["max_logit_difference"] > 1e-3
    (step,) = apply(plan, "upcycle", dtype="float16", **parameters).steps
    assert "up to rounding (all weights, to float16)" in step.details[0]
    (step,) = apply(plan, "upcycle", dtype="float32", **parameters).steps
    assert "rounding" not in step.details[0]


def test_damage_on_text_is_what_transformers_measures(llama: Path, tmp_path: Path, ok: Cli) -> None:
    ids = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))
    out = tmp_path / "out"
    parameters = ("--experts", 4, "--reinit", 0.5, "--no-proof", "--text", text, "--verify")
    report = ok("upcycle", llama, *parameters, "-o", out, "--json").json["steps"][0]["report"]

    def nats(path: Path) -> float:
        scores = logits(load(path), ids)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten()))

    assert report["measured"]["nats_before"] == pytest.approx(nats(llama), abs=1e-5)
    assert report["measured"]["nats_after"] == pytest.approx(nats(out), abs=1e-5)
    assert report["measured"]["divergence"] > 0
    largest = float((logits(load(out), ids[:1]) - logits(load(llama), ids[:1])).abs().max())
    assert report["verified"]["max_logit_difference"] == pytest.approx(largest, abs=1e-4)
    assert str(text) not in (out / "moesurgery.json").read_text()


# The command line


def test_the_command_writes_and_explains(llama: Path, tmp_path: Path, ok: Cli) -> None:
    result = ok("upcycle", llama, "--experts", 8, "-o", tmp_path / "out")
    assert "llama -> mixtral: 8 experts, top-2" in result.out + result.err
    assert "step 0 equals the dense model" in result.out + result.err
    assert "proof: a clone" in result.out + result.err
    assert difference(llama, tmp_path / "out") <= 1e-4
    assert not re.search(r"\d s\b", (tmp_path / "out" / "README.md").read_text())  # times would differ each time
    counted = ok("count-params", tmp_path / "out", "--json").json
    assert counted["total_params"] == sum(t.numel() for t in read_tensors(tmp_path / "out").values())


def test_a_recipe_on_the_command_line_is_changed_by_options(llama: Path, tmp_path: Path, cli: Cli, ok: Cli) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {llama}\nsteps:\n  - upcycle: {{experts: 4, to: qwen2_moe, proof: false}}\n")
    ok("upcycle", "--experts", 8, recipe, "-o", tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config["model_type"], config["num_experts"]) == ("qwen2_moe", 8)
    other = tmp_path / "other.yaml"
    other.write_text(f"model: {llama}\nsteps:\n  - rescale: {{top_k: 3}}\n")
    result = cli("upcycle", "--experts", 8, other)
    assert result.code == 2
    assert "has no upcycle steps" in result.err
    result = cli("upcycle", "--granularity", 0, recipe)
    assert result.code == 2


def test_recipe_mistakes_are_told_with_their_line(llama: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {llama}\nsteps:\n  - upcycle:\n      sources:\n        - prompts: [a]\n          promts: [b]\n"
        "        - residual_scale: high\n      routr: zero\n"
    )
    result = cli("run", recipe)
    assert result.code == 2
    assert f"{recipe}:6: upcycle: sources[0].promts is unknown: did you mean 'prompts'?" in result.err
    assert f"{recipe}:8: upcycle has no parameter 'routr': did you mean 'router'?" in result.err


def test_steps_compose_with_rescale(llama: Path, tmp_path: Path) -> None:
    plan = apply(plan_of(open_checkpoint(llama)), "upcycle", experts=4, proof=False)
    plan = apply(plan, "rescale", top_k=3, scale="none")
    write_plan(plan, tmp_path / "out")
    assert read_config(tmp_path / "out")["num_experts_per_tok"] == 3
    assert difference(llama, tmp_path / "out") <= 1e-4


# And back


@pytest.mark.parametrize(
    ("source", "changes", "parameters"),
    [
        ("llama", LLAMA3, {"to": "mixtral"}),
        ("llama", LLAMA3, {"to": "mixtral", "experts": 8}),
        ("mistral", {"sliding_window": 8}, {"to": "mixtral"}),
        ("qwen2", {}, {"to": "qwen2_moe"}),
        ("qwen3", NARROW, {"to": "qwen3_moe"}),
        ("granite", {}, {"to": "granitemoe"}),
    ],
)
def test_to_dense_gives_the_dense_tensors_back(
    sources: Any, tmp_path: Path, ok: Cli, source: str, changes: dict[str, Any], parameters: dict[str, Any]
) -> None:
    path = sources(source, **changes)
    upcycled(path, tmp_path / "moe", **{"experts": 4, **parameters})
    ok("to-dense", tmp_path / "moe", "--expert", 0, "--to", source, "-o", tmp_path / "dense")
    before, after = read_tensors(path), read_tensors(tmp_path / "dense")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    assert torch.equal(logits(load(path), LONG_PROMPT), logits(load(tmp_path / "dense"), LONG_PROMPT))


def test_to_dense_gives_a_file_back_byte_for_byte(llama: Path, tmp_path: Path, ok: Cli) -> None:
    load(llama).save_pretrained(tmp_path / "one")
    upcycled(tmp_path / "one", tmp_path / "moe", experts=4)
    ok("to-dense", tmp_path / "moe", "--expert", 0, "--to", "llama", "-o", tmp_path / "dense")
    file = "model.safetensors"
    assert (tmp_path / "dense" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_an_output_that_exists_is_refused_before_anything_is_proved(llama: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    program = (
        "import sys\nfrom moesurgery.cli import main\n"
        f"assert main(['upcycle', {str(llama)!r}, '--experts', '4', '-o', {str(tmp_path / 'out')!r}]) == 2\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exists and is not empty" in done.stderr
