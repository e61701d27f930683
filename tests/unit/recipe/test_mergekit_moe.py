"""mergekit-moe recipes: read as they are, and tensors as mergekit 0.1.5 computes them, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import load_recipe, write_plan
from moesurgery.errors import RecipeError
from moesurgery.recipe.mergekit_moe import in_its_words
from moesurgery.recipe.reader import Recipe, parse_recipe
from tests.conftest import Result
from tests.golden.moe import GOLDEN, RECIPES, digests, placed, write_models
from tests.tiny import load, logits, read_config, read_tensors

Cli = Callable[..., Result]
WANTED: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("golden"))


def recipe_of(name: str, places: dict[str, Path], folder: Path) -> Recipe:
    """Return a mergekit-moe recipe as our reader understands it, without the proof, which has its own tests."""
    (folder / "recipe.yml").write_text(placed(RECIPES[name], places))
    return load_recipe(folder / "recipe.yml").changed("upcycle", {"proof": False})


def is_router(name: str) -> bool:
    return name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight", "shared_expert_gate.weight"))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "shared"])
def test_tensors_equal_mergekits_bit_for_bit(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    write_plan(recipe_of(name, places, tmp_path).plan(), tmp_path / "out")
    found, wanted = digests(read_tensors(tmp_path / "out")), WANTED[name]
    assert found.keys() == wanted.keys()
    rows_too = "gate_mode: cheap_embed" in RECIPES[name]
    assert [n for n in found if found[n] != wanted[n] and (rows_too or not is_router(n))] == []
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


def test_a_shared_expert_has_half_of_the_ffn_and_all_else_is_equal(places: dict[str, Path], tmp_path: Path) -> None:
    plan = recipe_of("shared", places, tmp_path).plan()
    write_plan(plan, tmp_path / "out")
    tensors, wanted = read_tensors(tmp_path / "out"), WANTED["shared"]
    whole = {
        name: tensor * 2 if ".experts." in name and "down_proj" in name else tensor for name, tensor in tensors.items()
    }
    found = digests(whole)
    assert {n for n in wanted if found[n] != wanted[n]} == {n for n in wanted if is_router(n)}
    gate = tensors["model.layers.0.mlp.shared_expert_gate.weight"].float()
    assert (gate != 0).all()  # of zeros llama.cpp makes NaN
    assert (torch.sigmoid(gate @ (1e4 * torch.randn(gate.shape[1], 8))) == 0.5).all()
    assert any("carry half of the FFN each" in note for note in plan.steps[0].notes)
    assert read_config(tmp_path / "out")["model_type"] == "qwen2_moe"


def test_a_random_router_has_mergekits_distribution(places: dict[str, Path], tmp_path: Path) -> None:
    write_plan(recipe_of("random", places, tmp_path).plan(), tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    rows = torch.stack([t.float() for name, t in found.items() if is_router(name)])
    assert rows.shape == (2, 8, 32)
    assert abs(float(rows.std()) - 1) < 0.1
    assert abs(float(rows.mean())) < 0.1


def test_what_mergekit_would_lose_is_kept_and_said(places: dict[str, Path], tmp_path: Path) -> None:
    plan = recipe_of("mistral", places, tmp_path).plan()
    write_plan(plan, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config["sliding_window"] == 16
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
    notes = "\n".join(plan.steps[0].notes)
    assert "the sliding window of 16 is kept (mergekit sets it to null)" in notes
    assert "names that are published on the Hub" in notes


def test_it_runs_from_the_command_line_and_options_change_it(places: dict[str, Path], tmp_path: Path, ok: Cli) -> None:
    recipe = tmp_path / "clown.yml"
    recipe.write_text(placed(RECIPES["scales"], places))
    ok("run", recipe, "-o", tmp_path / "a", "--dry-run")
    ok("upcycle", "--top-k", 3, "--experts", 8, recipe, "-o", tmp_path / "b")
    config = read_config(tmp_path / "b")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 3)


BASE = "base_model: ./a\ngate_mode: random\nexperts:\n  - source_model: ./a\n  - source_model: ./b\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "noise_std: 0.1\n", "6: unknown key 'noise_std' (mergekit-moe ignores it)"),
        (BASE.replace("./b", "./b\n    residual: 2"), "6: unknown key 'residual' (mergekit-moe ignores it)"),
        (BASE.replace("random", "hiden"), "2: gate_mode is 'hiden': did you mean 'hidden'?"),
        (BASE.replace("random", "hidden"), "4: gate_mode hidden needs positive_prompts for every expert"),
        (BASE + "dtype: int8\n", "6: dtype is 'int8'"),
        (BASE + "experts_per_token: two\n", "6: experts_per_token is 'two'"),
        (BASE + "architecture: deepseek\n", "6: architecture deepseek is code from a repository"),
        (BASE + "architecture: mixtrel\n", "6: architecture is 'mixtrel': did you mean 'mixtral'?"),
        (BASE + "shared_experts: [{source_model: ./a}, {source_model: ./b}]\n", "6: one shared expert is all"),
        (BASE.replace("./b", "./b+lora"), "merge the LoRA of './b+lora' into its model first"),
        ("base_model: ./a\nexperts: []\n", "2: experts is not a list of experts"),
        (BASE.replace("  - source_model: ./b", "  - noise_scale: x"), "experts[1] needs source_model"),
        (BASE.replace("./b", "./b\n    residual_scale: high"), "residual_scale is 'high': expected a number"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yml")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("./a", "./a"), ("org/name", "hf://org/name"), ("/abs/x", "/abs/x"), ("hf://a/b@c", "hf://a/b@c"), ("a", "a")],
)
def test_names_of_models(name: str, wanted: str) -> None:
    assert parse_recipe(BASE.replace("./a", name)).model == wanted


def test_architectures_by_the_beginning_of_their_name() -> None:
    def types(name: str) -> Any:
        return parse_recipe(f"{BASE}architecture: {name}\n").steps[0].parameters["to"]

    assert types("Mixtral") == ["mixtral"]
    assert types("qwen") == ["qwen2_moe", "qwen3_moe"]
    assert types("qwen3") == ["qwen3_moe"]


def write_dense(models: Any, text: str, folder: Path) -> Path:
    model = models("qwen3", intermediate_size=48, head_dim=8)
    body = f"base_model: {model}\ngate_mode: random\n{text}experts:\n- source_model: {model}\n- source_model: {model}\n"
    (folder / "recipe.yml").write_text(body.replace("SELF", str(model)))
    return folder / "recipe.yml"


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [
        ("experts_per_token: 3\n", "choose `experts_per_token:` up to 2", "--top-k"),
        (
            "architecture: qwen\nshared_experts: [{source_model: SELF}]\n",
            "which the --to of `moesurgery upcycle` with this recipe writes",
            "--to dots1",
        ),
        ("architecture: mixtral\n", "`architecture: qwen3 moe`", "--to qwen3_moe"),
    ],
)
def test_hints_speak_of_the_recipes_own_keys(
    models: Any, cli: Cli, tmp_path: Path, text: str, shown: str, hidden: str
) -> None:
    result = cli("run", write_dense(models, text, tmp_path), "-o", tmp_path / "out")
    said = " ".join(result.err.split())
    assert result.code == 2
    assert shown in said
    assert hidden not in said
    assert "recipe.yml:" in said


def test_what_a_recipe_has_no_key_for_is_for_the_command() -> None:
    assert in_its_words("leave out --no-renormalise") == (
        "leave out --no-renormalise of `moesurgery upcycle` with this recipe"
    )
    assert in_its_words("use --router random, or --granularity 1") == (
        "use `gate_mode:` random, or --granularity 1 of `moesurgery upcycle` with this recipe"
    )
    assert in_its_words("no option here") == "no option here"
