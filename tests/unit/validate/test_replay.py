"""`validate --against`: what several models were made into is what their recipe makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.golden.models import write
from tests.golden.moe import RECIPES, placed, write_models
from tests.tiny import read_tensors
from tests.unit.stats.test_factors import collected

Cli = Callable[..., Result]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixtrals")
    return [write("mixtral", i, folder / f"mixtral{i}") for i in range(3)]


def found(out: Path, *against: object) -> list[tuple[str, str, str]]:
    """Return code, severity and message of all findings, and demand that everything was looked at."""
    report = validate_checkpoint(out, against=list(map(str, against)))
    assert not [skip for skip in report.not_checked if {"R01", "R03"} & set(skip.codes)]
    return [(f.code, f.severity, f.message) for f in report.findings]


def codes(out: Path, *against: object) -> set[str]:
    return {code + ("" if severity == "error" else "?") for code, severity, _ in found(out, *against)}


def merged(ok: Cli, tmp_path: Path, text: str, *options: object) -> Path:
    (tmp_path / "r.yaml").write_text(text)
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force", *options)
    return tmp_path / "out"


def edited(path: Path, folder: Path, name: str = Q) -> Path:
    """Copy a model with one number changed."""
    shutil.copytree(path, folder)
    held = read_tensors(folder)
    held[name][0, 0] += 1
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


TIES = """\
models:
  - {{model: {1}, parameters: {{weight: 0.5, density: 0.5}}}}
  - {{model: {2}, parameters: {{weight: 0.5, density: 0.7}}}}
merge_method: dare_ties
base_model: {0}
"""


def test_a_merge_is_replayed_on_all_that_were_merged(mixtrals: list[Path], ok: Cli, cli: Cli, tmp_path: Path) -> None:
    out = merged(ok, tmp_path, TIES.format(*mixtrals))
    options = [word for path in reversed(mixtrals) for word in ("--against", path)]
    assert ok("validate", out, *options, "--json").json["findings"] == []
    # One that was changed, one in another's place, one too few, one too many, one that is named wrongly.
    other = edited(mixtrals[1], tmp_path / "mixtral1")
    ((code, severity, message),) = found(out, *mixtrals[::2], other)
    assert (code, severity) == ("R03", "error")
    assert message.startswith("is not what the recipe computes, from byte ")
    assert codes(out, mixtrals[0], f"mixtral1={mixtrals[2]}", f"mixtral2={mixtrals[1]}") == {"R03"}
    assert found(out, *mixtrals[:2]) == [("R01", "error", "its recipe needs mixtral2, which was not given")]
    assert [m for _, _, m in found(out, *mixtrals, other)] == [f"it names no model for --against {other}"]
    assert {m for _, _, m in found(out, *mixtrals[:2], f"mixtral9={mixtrals[2]}")} == {
        "it names no mixtral9",
        "its recipe needs mixtral2, which was not given",
    }
    result = cli("validate", out, "--against", mixtrals[0], "--against", mixtrals[1])
    assert result.code == 1
    assert "add --against mixtral2=PATH" in result.out
    # The output itself.
    assert codes(edited(out, tmp_path / "changed"), *mixtrals) == {"R03", "S09"}
    kept = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**kept, "rope_theta": 5.0}))
    assert codes(out, *mixtrals) == {"R05", "S09?"}


def test_folders_of_one_name_keep_apart(mixtrals: list[Path], ok: Cli, tmp_path: Path) -> None:
    """Checkpoints of one training run are called alike; so is a stage, or what a recipe's words mean."""
    paths = [tmp_path / name / "base" for name in "ab"]
    for source, path in zip(mixtrals, paths, strict=False):
        shutil.copytree(source, path)
    text = (
        "name: mixtral2\nmodels: [{model: %s}, {model: %s}]\nmerge_method: linear\nparameters: {weight: 1}\n---\n"
        "models: [mixtral2, %s, %s]\nmerge_method: task_arithmetic\nbase_model: %s\nparameters: {weight: 0.3}\n"
    )
    out = merged(ok, tmp_path, text % (*paths, paths[1], mixtrals[2], paths[0]))
    record = (out / "moesurgery.json").read_text()
    assert str(tmp_path) not in record + (out / "README.md").read_text()
    first, second = json.loads(record)["recipe"]["steps"]
    names = [entry["name"] for entry in json.loads(record)["inputs"]]
    assert names == ["./base", "./base#2", "./mixtral2"]
    assert [m["model"] for m in first["merge"]["recipe"]["models"]] == ["./base", "./base#2"]
    assert second["merge"]["recipe"]["models"] == ["mixtral2", "./base#2", "./mixtral2"]
    assert codes(out, *paths, mixtrals[2]) == set()
    assert codes(out, mixtrals[2], f"base#2={paths[1]}", f"base={paths[0]}") == set()
    assert codes(out, paths[1], paths[0], mixtrals[2]) == {"R03"}


@pytest.fixture(scope="module")
def adapter(mixtrals: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    shape = read_tensors(mixtrals[0])[Q].shape
    at = "base_model.model.model.layers.0.self_attn.q_proj."
    factors = {"lora_A": (2, shape[1]), "lora_B": (shape[0], 2)}
    save_file(
        {f"{at}{k}.weight": torch.randn(s, generator=generator) for k, s in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def recipes(mixtrals: list[Path], adapter: Path) -> Iterator[tuple[str, list[Path]]]:
    a, b, c = mixtrals
    yield f"models: [{{model: {a}+{adapter}}}]\nmerge_method: passthrough\n", [a, adapter]
    yield (
        f"models:\n- model: {{model: {{path: {b}}}, lora: {adapter}}}\n  parameters: {{weight: 0.4}}\n"
        f"- {{model: {c}, parameters: {{weight: [0, 1]}}}}\nmerge_method: linear\n",
        [b, c, adapter],
    )
    yield (
        f"slices:\n- sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [0, 2]}}]\n"
        f"  base_model: {a}\n  parameters: {{t: 0.3}}\n- sources: [{{model: {b}, layer_range: [1, 2]}},"
        f" {{model: {c}, layer_range: [0, 1]}}]\n  base_model: {c}\n  parameters: {{t: [0, 1]}}\nmerge_method: slerp\n",
        [a, b, c],
    )
    yield f"modules: {{default: {{models: [{b}, {c}]}}}}\nbase_model: {a}\nmerge_method: karcher\n", [a, b, c]
    yield (
        f"models: [{b}, {c}]\nbase_model: {a}\nmerge_method: della\nseed: 7\ngranularity: tensor\nalign: experts\n"
        "parameters: {weight: 1, density: 0.5}\ndtype: bfloat16\n",
        [a, b, c],
    )


@pytest.mark.parametrize("number", range(5))
def test_every_form_of_a_recipe_replays(
    number: int, mixtrals: list[Path], adapter: Path, ok: Cli, tmp_path: Path
) -> None:
    text, parents = list(recipes(mixtrals, adapter))[number]
    out = merged(ok, tmp_path, text)
    record = (out / "moesurgery.json").read_text()
    assert str(mixtrals[0].parent) not in record
    assert str(adapter.parent) not in record
    assert codes(out, *parents) == set()
    changed = edited(parents[0], tmp_path / parents[0].name)
    assert codes(out, changed, *parents[1:]) & {"R02", "R03"}


def test_tokenizer_and_template_are_part_of_it(ok: Cli, dense: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(dense["B"], tmp_path / "other")
    held = json.loads((other / "tokenizer.json").read_text())
    held["model"]["vocab"]["<new>"] = max(held["model"]["vocab"].values()) + 1
    (other / "tokenizer.json").write_text(json.dumps(held))
    text = f"models: [{dense['A']}, {other}]\nmerge_method: linear\nparameters: {{weight: 1}}\nchat_template: chatml\n"
    row = f"{{source: {{kind: model_token, model: {other}, token: a}}, force: true}}"
    out = merged(ok, tmp_path, text + f"tokenizer: {{source: {other}, tokens: {{<new>: {row}}}}}\n")
    assert codes(out, dense["A"], other) == set()
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "tokenizer.json").unlink()
    assert codes(out, dense["A"], other) >= {"R06"}


METHOD = """\
from moesurgery import merge_method

@merge_method("{name}", models=(2, 2))
def mine(models):
    \"\"\"The first {times} times.\"\"\"
    return models[0] * {times}
"""


def test_a_method_of_ones_own_is_named_to_replay_it(mixtrals: list[Path], ok: Cli, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD.format(name="mine-1", times=2))
    out = merged(
        ok,
        tmp_path,
        f"models: [{mixtrals[0]}, {mixtrals[1]}]\nmerge_method: mine-1\n",
        "--methods",
        tmp_path / "mine.py",
    )
    assert codes(out, *mixtrals[:2]) == set()
    record = json.loads((out / "moesurgery.json").read_text())
    assert record["recipe"]["steps"][0]["merge"]["methods"]["file"] == "mine.py"
    record["recipe"]["steps"][0]["merge"]["recipe"]["merge_method"] = "mine-2"
    (out / "moesurgery.json").write_text(json.dumps(record))
    against = [word for path in mixtrals[:2] for word in ("--against", path)]
    result = cli("validate", out, *against)
    assert result.code == 1
    assert "needs the merge method 'mine-2' of mine.py" in result.out
    (tmp_path / "other.py").write_text(METHOD.format(name="mine-2", times=3))
    result = cli("validate", out, *against, "--methods", tmp_path / "other.py")
    assert "which is another file than" in result.out


def test_a_device_that_is_not_here_is_said(mixtrals: list[Path], ok: Cli, tmp_path: Path) -> None:
    out = merged(ok, tmp_path, f"models: [{mixtrals[0]}, {mixtrals[1]}]\nmerge_method: karcher\n")
    record = json.loads((out / "moesurgery.json").read_text())
    record["recipe"]["steps"][0]["merge"]["device"] = "cuda:97"
    (out / "moesurgery.json").write_text(json.dumps(record))
    report = validate_checkpoint(out, against=mixtrals[:2])
    assert report.errors == 0
    assert [skip.reason for skip in report.not_checked if "R03" in skip.codes] == [
        "it was merged on cuda:97, which is not here: its last bits are of that"
    ]


def test_nothing_that_the_record_alone_names_is_opened(
    mixtrals: list[Path], ok: Cli, tmp_path: Path, models: Any
) -> None:
    out = merged(
        ok, tmp_path, f"models: [{mixtrals[0]}, {mixtrals[1]}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    )
    record = json.loads((out / "moesurgery.json").read_text())
    record["recipe"]["steps"][0]["merge"]["recipe"]["models"][1] = str(mixtrals[2])
    (out / "moesurgery.json").write_text(json.dumps(record))
    (message,) = [m for code, _, m in found(out, *mixtrals[:2]) if code == "R01"]
    assert f"names {mixtrals[2]}, and nothing says where that is" in message
    record["recipe"]["steps"] = [{"add-expert": {"source": str(mixtrals[1])}}]
    (out / "moesurgery.json").write_text(json.dumps(record))
    (message,) = [m for code, _, m in found(out, *mixtrals[:2]) if code == "R01"]
    assert f"names {mixtrals[1]}, and nothing says where that is" in message


def test_other_operations_on_several_models(models: Any, ok: Cli, tmp_path: Path) -> None:
    model, other = models("mixtral"), models("mixtral", rope_theta=5e5, num_local_experts=4)
    out = tmp_path / "more"
    ok("add-expert", model, "--source", other, "--experts", "3,1", "-o", out)
    record = (out / "moesurgery.json").read_text()
    assert str(other) not in record
    assert codes(out, model, other) == set()
    assert codes(out, other, model) & {"R01?", "R01"}
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert codes(out, model, edited_shards(other, tmp_path / other.name, name)) == {"R03"}
    steps = f"- add-expert: {{source: {model}}}\n- rescale: {{top_k: 3}}\n"
    (tmp_path / "r.yaml").write_text(f"model: {model}\nsteps:\n{steps}")
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "twice")
    assert codes(tmp_path / "twice", model) == {"V03?"}  # each expert is there twice


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("dense"))


def test_upcycles_of_several_models(dense: dict[str, Path], ok: Cli, tmp_path: Path) -> None:
    rows = {f"layers.{i}": torch.randn(3, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    save_file(rows, tmp_path / "rows.safetensors")
    entries = f"[{{model: {dense['B']}, residual_scale: 0.3}}, {{}}, {dense['M']}]".replace("M", "B")
    step = f"{{sources: {entries}, router: {tmp_path / 'rows.safetensors'}, reinit: 0.1, seed: 3, proof: false}}"
    (tmp_path / "r.yaml").write_text(f"model: {dense['A']}\nsteps: [upcycle: {step}]\n")
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "moesurgery.json").read_text()
    router = tmp_path / "rows.safetensors"
    assert codes(tmp_path / "out", dense["A"], dense["B"], router) == set()
    assert codes(tmp_path / "out", dense["A"], dense["B"]) == {"R01"}
    assert codes(tmp_path / "out", f"A={dense['B']}", f"B={dense['A']}", router) >= {"R02", "R03"}


@pytest.mark.parametrize("name", ["scales", "hidden", "shared"])
def test_mergekit_moe_recipes(name: str, dense: dict[str, Path], ok: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(placed(RECIPES[name], dense))
    ok("upcycle", tmp_path / "r.yaml", "--no-proof", "-o", tmp_path / "out")
    assert str(dense["A"].parent) not in (tmp_path / "out" / "moesurgery.json").read_text()
    base, other = ("M", "N") if name == "hidden" else ("A", "B")
    of_the_values = {"V02?", "V03?"}  # a gate of zeros, two experts that are the base's
    assert codes(tmp_path / "out", dense[base], dense[other]) <= of_the_values
    changed = edited(dense[other], tmp_path / other, "model.layers.1.mlp.up_proj.weight")
    assert codes(tmp_path / "out", dense[base], changed) - of_the_values == {"R03"}


def test_statistics_are_given_as_models_are(models: Any, ok: Cli, tmp_path: Path) -> None:
    path = models("mixtral")
    stats = collected(path, 3).save(tmp_path / "s")
    ok("rescale", path, "--top-k", 3, "--scale", "measured", "--stats", stats, "-o", tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "moesurgery.json").read_text()
    assert codes(tmp_path / "out", path, stats) == set()
    assert found(tmp_path / "out", path)[0][2] == f"its recipe needs {stats.name}, which was not given"


def edited_shards(path: Path, folder: Path, name: str) -> Path:
    """Copy a sharded model with one number changed."""
    from safetensors.torch import load_file

    shutil.copytree(path, folder)
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name][0, 0] += 1
            save_file(held, file, {"format": "pt"})
    return folder
