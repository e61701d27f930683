"""Recipes: strict YAML, the schema, and every recipe that ships."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moesurgery import load_recipe
from moesurgery.errors import RecipeError
from moesurgery.recipe.reader import parse_recipe, parse_size, recipe_schema
from moesurgery.recipe.yaml_strict import parse, parse_text
from tests.conftest import ROOT, Result
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))  # of merges: tests/commands/test_merge.py


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("12", 12),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ('"010"', "010"),
        ("'no'", "no"),
        ("1.2.3", "1.2.3"),
        ("hf://a/b", "hf://a/b"),
        ("2026-11-22", "2026-11-22"),
        ("[1, two]", [1, "two"]),
        ("{a: {b: [1]}}", {"a": {"b": [1]}}),
        ("1.5B", "1.5B"),
        ("yes please", "yes please"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_text(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["yes", "No", "on", "OFF", "y", "010", "-012", "1:30", "190:20:30", "0x1F", "0o17", "1_000"]
)
def test_what_yaml_readers_disagree_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        parse_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: &x [*x]",
        "!!python/object:os.system {}",
        "!!binary aGk=",
        "a: !custom 1",
        "{[1]: 2}",
        "a: {<<: 1}",
        "a: {<<: &x {b: *x}}",
        "a: &x 1\na: &y 2\nb: [*x, *y]",
        "a: [1",
        "\ta: 1",
        "a: 1\n---\nb: 2",
        "a: " + "[" * 100 + "]" * 100,
        "a: \x00",
        "*unknown",
        "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        + "\n".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]" for p, c in zip("bcdefghij", "cdefghijk", strict=False)),
    ],
)
def test_what_a_recipe_may_not_hold(text: str) -> None:
    document = parse(text)
    assert document.problems
    assert all(line >= 1 and message for line, message in document.problems)


def test_aliases_are_allowed() -> None:
    assert parse_text("a: &x 1.5\nb: [*x, *x]") == {"a": 1.5, "b": [1.5, 1.5]}


def test_merge_keys() -> None:
    """A mapping's own keys count, then those of the first that it merges in."""
    text = "a: &a {k: 1, l: 2}\nb: &b {l: 3, m: 4}\nc: {<<: *a, k: 5}\nd: {l: 6, <<: [*b, *a]}"
    found = parse_text(text)
    assert found["c"] == {"k": 5, "l": 2}
    assert found["d"] == {"l": 6, "m": 4, "k": 1}
    document = parse(text)
    assert document.line(("d", "l")) == 4
    assert document.line(("d", "m")) == 2


# Recipes


GOOD = "model: m\nsteps:\n  - rescale: {top_k: 3}\n"


def errors(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return caught.value.message


def test_a_good_recipe() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.model == "m"
    assert recipe.steps[0].operation == "rescale"
    assert recipe.steps[0].parameters == {"top_k": 3}
    assert recipe.steps[0].line == 3


def test_all_mistakes_at_once_with_lines_and_suggestions() -> None:
    text = """\
modle: m
steps:
  - rescael: {top_k: 3}
  - rescale: {top_k: "3", scale: routre}
  - rescale: {topk: 3}
  - rescale: {top_k: 0}
  - rescale:
      top_k: 2
      where: nowhere
  - [1, 2]
max_shard_size: big
"""
    message = errors(text)
    for line, word in {
        "r.yaml:1:": "did you mean 'model'",
        "r.yaml:3:": "did you mean 'rescale'",
        "r.yaml:4:": "expected a whole number",
        "r.yaml:5:": "did you mean 'top_k'",
        "r.yaml:6:": "at least 1",
        "r.yaml:9:": "one of auto, config, scales, weights",
        "r.yaml:10:": "one operation",
        "r.yaml:11:": "not a size",
    }.items():
        assert any(line in row and word in row for row in message.splitlines()), (line, word, message)
    assert "needs top_k" in message


@pytest.mark.parametrize(
    "text", ["", "[]", "steps", "model: m", "model: 3\nsteps: []", "steps: {rescale: {top_k: 3}}", "{"]
)
def test_no_recipe_at_all(text: str) -> None:
    assert errors(text)


def test_an_unreadable_file(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", tmp_path / "none.yaml").code == 2
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    result = cli("run", tmp_path / "latin.yaml")
    assert result.code == 2
    assert "UTF-8" in result.err


def test_a_refusal_names_the_line(cli: Cli, demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {demo}\nsteps:\n  - rescale: {{top_k: 3}}\n  - rescale: {{top_k: 99}}\n")
    result = cli("run", path, "-o", tmp_path / "out")
    assert result.code == 2
    assert f"{path}:4: rescale: top-k 99" in result.err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500 MiB", 500 << 20), ("1.5G", 1_500_000_000), (7, 7), ("10kb", 10_000)],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", 0, -3, True, "5XB", None, 1.5])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


# Commands


def test_the_printed_recipe_gives_the_same_bytes(demo: Path, ok: Cli, tmp_path: Path) -> None:
    arguments = ["--top-k", 4, "--scale", "norm", "--max-shard-size", "3MB"]
    printed = ok("rescale", demo, *arguments, "--print-recipe").out
    (tmp_path / "r.yaml").write_text(printed)
    ok("rescale", demo, *arguments, "-o", tmp_path / "a")
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_several_steps_in_one_pass_equal_the_steps_one_by_one(demo: Path, ok: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps:\n  - rescale: {top_k: 3, scale: 1.1}\n  - rescale: {top_k: 4, scale: 1.3}\n")
    ok("run", recipe, "--model", demo, "-o", tmp_path / "once")
    ok("rescale", demo, "--top-k", 3, "--scale", 1.1, "-o", tmp_path / "one")
    ok("rescale", tmp_path / "one", "--top-k", 4, "--scale", 1.3, "-o", tmp_path / "two")
    for shard in (tmp_path / "once").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    assert (tmp_path / "once" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


def test_the_default_output_is_named_after_model_and_operation(
    demo: Path, ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ok("rescale", demo, "--top-k", 3)
    assert (tmp_path / "model-rescale-k3" / "config.json").exists()


@pytest.mark.parametrize(("folder", "name"), [("模型 ö", "模型-ö"), ("-- ?", "model")])
def test_names_in_any_script(
    demo: Path, ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo, tmp_path / folder)
    ok("rescale", f"./{folder}", "--top-k", 3, "--scale", "none")
    assert f"model: {folder}" in (tmp_path / f"{name}-rescale-k3" / "README.md").read_text().replace("'", "")
    assert f"./{folder}" in ok("rescale", f"./{folder}", "--top-k", 3, "--print-recipe").out


def test_a_recipe_as_json(demo: Path, ok: Cli) -> None:
    options = ("--top-k", 3, "--max-shard-size", "1MB", "--print-recipe")
    found = ok("rescale", demo, *options, "--json").json
    assert found["recipe"] == yaml.safe_load(ok("rescale", demo, *options).out)
    assert found["schema_version"] == 1


def test_schema_is_what_the_parser_accepts(ok: Cli) -> None:
    schema = ok("schema").json
    assert schema == recipe_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(yaml.safe_load(GOOD))
    for wrong in ("model: m\nsteps: [rescale: {}]", "steps: [nothing: {}]", "steps: []\nmodle: m", "model: m"):
        assert list(validator.iter_errors(yaml.safe_load(wrong))), wrong


# What ships


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    load_recipe(path)
    assert path.read_text().startswith("# ")


def test_shipped_recipes_are_listed_and_shown(ok: Cli, cli: Cli) -> None:
    listed = ok("recipes", "ls").out
    for path in (ROOT / "recipes").rglob("*.yaml"):
        name = str(path.relative_to(ROOT / "recipes").with_suffix(""))
        assert name in listed
        assert ok("recipes", "show", name).out.strip() == path.read_text().strip()
    result = cli("recipes", "show", "rescale-topp3")
    assert result.code == 2
    assert "rescale-top3" in result.err


RUNS: dict[str, str] = {
    "rescale-top3": "mixtral",
    "rescale-published": "mixtral",
    "rescale-faster": "qwen3_moe",
    "drop-expert": "mixtral",
    "fused-half": "olmoe",
    "drop-quarter": "mixtral",
    "merge-experts": "mixtral",
    "merge-experts-data": "mixtral",
    "slim-experts": "qwen3_moe",
    "to-dense": "mixtral",
    "upcycle-8x": "llama",
    "upcycle-virtual-groups": "llama",
    "upcycle-shared-expert": "mistral",
    "upcycle-neuron-split": "llama",
    "upcycle-clown-car": "mistral",
    "tie-blocks": "mixtral",
    "repeat-blocks": "mixtral",
    "drop-rescale-tie-cast": "mixtral",
    "mtp-drop": "deepseek_v3",
}
DENSE = {"intermediate_size": 64, "sliding_window": None}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_runs(
    path: Path, models: Any, ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.commands.test_drop_experts import with_prediction_layer
    from tests.tiny import load, logits
    from tests.tokenizer import save_tokenizer

    monkeypatch.chdir(tmp_path)
    upcycles = path.stem.startswith("upcycle")
    model = models(RUNS[path.stem], **DENSE) if upcycles else models(RUNS[path.stem])
    if upcycles:
        save_tokenizer(model)
    if path.stem == "mtp-drop":
        with_prediction_layer(model, tmp_path / "predicting")
        model = tmp_path / "predicting"
    if path.stem.endswith("-data"):  # the command that its comment names makes the files
        (tmp_path / "text.jsonl").write_text(json.dumps({"input_ids": list(range(3, 60)) * 12}))
        groups = ("--group", "reap-centroid", "--by", "reap-sum")
        ok("merge-experts", model, "--to", 6, "--text", "text.jsonl", "--window", 32, *groups, "-o", "merge")
    recipe = tmp_path / path.name
    recipe.write_text(re.sub(r"hf://[^\s,}]+", str(model), path.read_text()))  # other models that the recipe names
    ok("run", recipe, "--model", model, "-o", tmp_path / "out")
    assert bool(logits(load(tmp_path / "out")).isfinite().all())
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert record["recipe"]["steps"]
    ok("validate", tmp_path / "out", "--level", "forward")
