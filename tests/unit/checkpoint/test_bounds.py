"""What comes from outside has a limit of ours: YAML, configs, names, standard output, and what a recipe may reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesurgery.errors import CheckpointError, RecipeError
from moesurgery.forward.model_config import MOST_COUNTED, MOST_PARTS, harmless, load_config
from moesurgery.merge.merge_recipe import parse_merge_recipe
from moesurgery.recipe import yaml_strict
from moesurgery.recipe.reader import parse_recipe
from tests.conftest import ROOT, Result
from tests.fuzz_make import safetensors
from tests.tiny import read_tensors, same_bits

Cli = Callable[..., Result]

# YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: .\nsteps:\n" + "- a\n" * 400_000, "has more than 50,000 values"),
        ("model: .\nsteps: [" + "a," * 400_000 + "]", "has more than 50,000 values"),
        ("{" + "".join(f"k{i}: 1," for i in range(100_000)) + "}", "has more than 50,000 values"),
        ("---\n" * 400_000, "a second one begins here"),
        ("model: " + "x" * 2_000_001, "is larger than 2,000,000 bytes"),
        ("model: " + "[" * 100_000, "is nested too deeply"),
        ("model: " + "{a: " * 100_000, "is nested too deeply"),
        ("a: &a [" + "x," * 30_000 + "]\nb: *a\nsteps: []", "has too many values"),
    ],
    ids=["list", "flow", "mapping", "documents", "bytes", "depth", "depth of mappings", "anchors"],
)
def test_a_large_recipe_is_refused_before_it_is_composed(text: str, message: str, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(text)
    begun = time.process_time()
    result = cli("recipes", "check", file)
    assert time.process_time() - begun < 10
    assert result.code == 1
    assert message in result.out
    assert f"{file}:" in result.out


def test_a_recipe_of_the_largest_size_is_read() -> None:
    steps = "- rescale: {top_k: 3}\n" * 9_000  # five values each
    assert len(parse_recipe(f"model: .\nsteps:\n{steps}").steps) == 9_000


@pytest.mark.parametrize("parse", [parse_recipe, parse_merge_recipe])
def test_mistakes_without_number_are_told_shortly(parse: Callable[[str], Any]) -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\n" if parse is parse_merge_recipe else "model: .\nsteps: []\n"
    text += "".join(f"wrong{i}: {'x' * 3000 if i == 0 else 1}\n" for i in range(20_000))
    with pytest.raises(RecipeError) as raised:
        parse(text)
    lines = raised.value.message.splitlines()
    assert len(lines) == yaml_strict.SHOWN_MISTAKES + 1
    assert lines[-1] == "recipe: and many more mistakes"
    assert "recipe:3: unknown key 'wrong0'" in lines[0]
    assert max(map(len, lines)) < 1200


def test_a_warning_too_many_does_not_empty_a_merge() -> None:
    models = "".join(f"- {{model: m{i}, parameters: {{density: 0.5, weight: 1}}}}\n" for i in range(300))
    recipe = parse_merge_recipe(f"merge_method: linear\nmodels:\n{models}")
    assert len(recipe.stages[0].warnings) == 300


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "1." + "9" * 400 + "GB", "٣GB", "²", "-1", "0", "1e400"])
def test_a_size_of_shards_that_is_none(size: str, demo: Path, cli: Cli) -> None:
    result = cli("convert", demo, "--dtype", "float32", "--max-shard-size", size, "--dry-run")
    assert result.code == 2
    assert "is not a size: write 5GB, 500MB or a number of bytes" in result.err
    with pytest.raises(RecipeError, match=r"recipe:3: max_shard_size: .* is not a size"):
        parse_recipe(f"model: .\nsteps: []\nmax_shard_size: '{size}'\n")


@pytest.mark.parametrize("numbers", ["²,1", "9" * 5000, "٣", "1,,2", "-1"])
def test_layers_by_numbers_that_are_none(numbers: str, demo: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_layers_enum": numbers}))
    for command in (("tie-blocks", "--group-size", 2), ("drop-experts", "--count", 1, "--by", "random")):
        assert cli(command[0], folder, *command[1:], "--dry-run").code in (0, 2)


# What a recipe may reach


def _recipes(demo: Path, url: str) -> list[tuple[str, str, int]]:
    """Recipes that name a model by `url`: the command, the text, and the line."""
    steps = "steps:\n- rescale: {top_k: 3, scale: none}\n"
    return [
        ("run", f"model: {url}\n{steps}", 1),
        ("run", f"model: {demo}\nsteps:\n- add-expert:\n    source: {url}\n", 3),
        ("run", f"base_model: {url}\ngate_mode: random\nexperts: [{{source_model: {demo}}}]\n", 1),
        ("run", f"model: {demo}\nsteps:\n- upcycle: {{sources: ['{url}', {{model: '{url}'}}]}}\n", 3),
        ("merge", f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {demo}\n- model: {url}\n", 5),
        ("merge", f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {demo}+{url}\n", 4),
        ("merge", f"base_model: {url}\nmerge_method: task_arithmetic\nmodels: [{{model: {demo}}}]\n", 1),
        (
            "merge",
            f"merge_method: linear\nparameters: {{weight: 1}}\ntokenizer_source: {url}\nmodels: [{{model: {demo}}}]\n",
            3,
        ),
    ]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1/x", "file://{demo}", "zip://m::file:///a.zip", "memory://x"])
def test_a_recipe_reaches_folders_and_the_hub_alone(
    url: str, number: int, demo: Path, tmp_path: Path, cli: Cli
) -> None:
    url = url.format(demo=demo.resolve())
    command, text, line = _recipes(demo.resolve(), url)[number]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = cli(command, recipe, "-o", tmp_path / "out", "-q")
    assert result.code == 2
    assert f"{recipe}:{line}: {url} is reached by {url.partition('://')[0]}://" in result.err
    assert "hint:  if you trust the recipe: MOESURGERY_PROTOCOLS=" in result.err
    assert not list(tmp_path.glob("out*"))


def test_whoever_runs_a_recipe_allows_protocols(
    demo: Path, tmp_path: Path, cli: Cli, ok: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = demo.resolve().as_uri()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {url}\nsteps:\n- rescale: {{top_k: 3, scale: none}}\n")
    monkeypatch.setenv("MOESURGERY_PROTOCOLS", "s3")
    assert "MOESURGERY_PROTOCOLS=file,s3" in cli("run", recipe, "-o", tmp_path / "out").err
    assert cli("rescale", recipe, "--top-k", 3, "-o", tmp_path / "out").code == 2
    assert cli("perplexity", recipe, recipe).code == 2
    ok("run", recipe, "--model", url, "-o", tmp_path / "own", "-q")
    monkeypatch.setenv("MOESURGERY_PROTOCOLS", "s3, file")
    ok("run", recipe, "-o", tmp_path / "out", "-q")
    (tmp_path / "pair.yaml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {url}}}, {{model: {demo}}}]\n"
    )
    ok("merge", tmp_path / "pair.yaml", "--dry-run")


def test_what_stands_on_the_command_line_is_always_opened(demo: Path, tmp_path: Path, cli: Cli, ok: Cli) -> None:
    url = demo.resolve().as_uri()
    ok("add-expert", url, "--source", url, "--dry-run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {demo}\nsteps:\n- add-expert: {{source: 'ftp://127.0.0.1:1/x'}}\n")
    assert cli("run", recipe, "--dry-run").code == 2
    ok("add-expert", recipe, "--source", url, "--dry-run")
    for strange in ("ftp://127.0.0.1:1/x", "reference://", "zip://a::ftp://127.0.0.1:1/b"):
        result = cli("inspect", strange)
        assert result.code == 2
        assert f"{strange} cannot be opened" in result.err


# Numbers of a config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_labels", 30_000_000),
        ("num_labels", 10**10),
        ("num_hidden_layers", MOST_PARTS + 1),
        ("num_local_experts", MOST_COUNTED + 1),
        ("n_shared_things", 10**9),
        ("depths", [2, 10**9]),
        ("head_dim", 10**9),
        ("vocab_size", 10**12),
        ("text_config", {"num_labels": 10**40}),
        ("moe_layer_freq", [1] * 300_000),
    ],
)
def test_a_config_of_parts_without_end_is_not_built(key: str, value: Any, demo: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    config = json.loads((demo / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    result = cli("validate", folder, "--level", "config")
    assert result.code in (0, 1)
    assert "not checked: C03" in result.out
    assert "no model of that many parts is built" in result.out or "no model is built of it" in result.out
    with pytest.raises(CheckpointError, match="built") as raised:
        load_config(config)
    assert raised.value.hint == "correct config.json"


def test_experts_of_all_layers_are_counted_together() -> None:
    with pytest.raises(CheckpointError, match="900 layers of 2,000 experts are more than are built"):
        harmless({"num_hidden_layers": 900, "num_experts": 2000})
    harmless(
        {"num_hidden_layers": 61, "num_experts": 512, "max_position_embeddings": 10_485_760, "vocab_size": 290_943}
    )


# Names


def _model(folder: Path, demo: Path, extra: dict[str, tuple[str, list[int]]]) -> Path:
    """Return the demo model with more tensors in a shard of their own."""
    shutil.copytree(demo, folder)
    name = "model-00004-of-00004.safetensors"
    (folder / name).write_bytes(safetensors(extra, fill=bytes)[0])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize(
    "name",
    [
        *(EXPERT.format("#", 0), EXPERT.format(0, "#"), EXPERT.format("00", 0), EXPERT.format(0, "007")),
        *(EXPERT.format("٣", 0), EXPERT.format("9" * 40, 0), EXPERT.format(0, "1" * 5000), "#", "layers.#.#", "#.#"),
    ],
)
def test_numbers_that_are_none_belong_to_no_layer(name: str, demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    folder = _model(tmp_path / "model", demo, {name: ("F32", [1])})
    shown = ok("inspect", folder, "--json").json
    (group,) = [group for group in shown["tensors"] if group["tensors"] == name]
    assert (group["count"], group["component"] == "routed_experts") == (1, False)
    assert shown["experts"].startswith("8 per layer")
    assert ok("count-params", folder, "--json").json
    assert cli("validate", folder, "--level", "config").code in (0, 1)
    ok("rescale", folder, "--top-k", 3, "--scale", "none", "-o", tmp_path / "out", "-q")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(folder).keys()


@pytest.mark.parametrize("shape", [[], [8], [0]])
def test_an_expert_of_the_wrong_shape_is_named(shape: list[int], demo: Path, tmp_path: Path, cli: Cli, ok: Cli) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    config = json.loads((demo / "config.json").read_text())
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    layer = "model.layers.0.block_sparse_moe."
    names = {f"{layer}experts.{e}.{w}.weight": ("F32", shape) for e in range(8) for w in ("w1", "w2", "w3")}
    names[f"{layer}gate.weight"] = ("F32", [8, config["hidden_size"]])
    (folder / "model.safetensors").write_bytes(safetensors(names, fill=bytes)[0])
    ok("inspect", folder)
    result = cli("rescale", folder, "--top-k", 3, "--scale", 1.5)
    assert result.code == 2
    assert f"has shape {shape}, expected 2 dimensions or more" in result.err


def test_a_shard_of_the_longest_name_is_written(demo: Path, tmp_path: Path, ok: Cli) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    text = (folder / "model.safetensors.index.json").read_text()
    for i, file in enumerate(sorted(folder.glob("*.safetensors"))):
        name = f"{i}{'n' * 242}.safetensors"
        file.rename(folder / name)
        text = text.replace(file.name, name)
    (folder / "model.safetensors.index.json").write_text(text)
    for command in (("convert", "--dtype", "float32"), ("rescale", "--top-k", 3, "--scale", "none")):
        ok(command[0], folder, *command[1:], "-o", tmp_path / command[0], "-q")
    expected, found = read_tensors(folder), read_tensors(tmp_path / "rescale")
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("length", [239, 250, 255, 300])
def test_an_output_of_too_long_a_name_is_refused(length: int, demo: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("convert", demo, "--dtype", "float32", "-o", tmp_path / ("o" * length))
    assert result.code == 2
    assert f"the output's name is {length} bytes long, and may have 238" in result.err
    assert "choose a shorter one with -o" in result.err


@pytest.mark.parametrize(
    "reference", ["x" * 9999, "~nobody-of-this-name/model", "a\0b", "hf://" + "x" * 9999, "y" * 300 + ".yaml"]
)
def test_references_that_no_file_can_have(reference: str, tmp_path: Path, cli: Cli) -> None:
    assert cli("inspect", reference).code == 2
    assert cli("rescale", reference, "--top-k", 1).code == 2
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": reference}]}))
    assert cli("merge", tmp_path / "r.yaml").code == 2


# Standard output, memory, threads


def shell(demo: Path, arguments: str, redirected: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -m moesurgery {arguments} {redirected}', sys.executable],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DEMO": str(demo)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("redirected", [">&-", "> /dev/full"])
@pytest.mark.parametrize("arguments", ["inspect $DEMO", "inspect $DEMO --json", "schema", "--help", "--version"])
def test_an_answer_that_cannot_be_written_is_an_error(arguments: str, redirected: str, demo: Path) -> None:
    done = shell(demo, arguments, redirected)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "standard output" in lines[0]
    assert ("Bad file descriptor" if "&-" in redirected else "No space left on device") in lines[0]
    assert lines[1].startswith("hint:  ")


@pytest.mark.parametrize("redirected", ["2>&-", "2> /dev/full", "<&-", "| head -c 1"])
def test_other_closed_streams_change_no_answer(redirected: str, demo: Path) -> None:
    done = shell(demo, "inspect $DEMO --json", redirected)
    assert done.returncode == 0
    assert done.stdout[:1] == "{"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_closed_stdout_is_not_a_shard(demo: Path, tmp_path: Path) -> None:
    """The first file that is opened would take the place of what was closed."""
    for name, redirected in (("a", ">&- 2>&-"), ("b", "")):
        shell(demo, f"rescale $DEMO --top-k 3 --scale none --no-fsync -o {tmp_path / name}", redirected)
    expected, found = read_tensors(tmp_path / "b"), read_tensors(tmp_path / "a")
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (MemoryError(), "there is not enough memory", "--jobs 1"),
        (RuntimeError("can't start new thread"), "the system allows no more threads", "ulimit -u"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied", "MOESURGERY_DEBUG=1"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(
    error: Exception, message: str, hint: str, demo: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("moesurgery.checkpoint.checkpoint.scan_checkpoint", fail)
    result = cli("inspect", demo)
    assert result.code == 2
    assert message in result.err
    assert hint in result.err
    assert "bug" not in result.err
    monkeypatch.setattr("moesurgery.checkpoint.checkpoint.scan_checkpoint", lambda *_, **__: 1 / 0)
    assert "this is a bug in moesurgery: ZeroDivisionError" in cli("inspect", demo).err


def test_a_message_of_any_length_is_cut(cli: Cli) -> None:
    result = cli("inspect", "hf://" + "x" * 9999)
    assert max(map(len, result.err.splitlines())) < 2200
