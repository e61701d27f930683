"""`moesurgery validate` on checkpoints that are right, its options, and its reports."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from moesurgery import load_recipe
from moesurgery.cli._app import app
from moesurgery.recipe.registry import operations
from moesurgery.validate.codes import CODES
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import ROOT, Result
from tests.families import ROWS
from tests.quantise import make_fp8, make_mxfp4, rewrite
from tests.tiny import TINY, read_tensors
from tests.unit.recipe.test_recipes import SHIPPED

Cli = Callable[..., Result]
Models = Callable[..., Path]


TOWER = r"talker|code2wav|sam_|vision"
LAYOUTS = [(model_type, False) for model_type in ROWS] + [(model_type, True) for model_type in TINY]


@pytest.mark.parametrize(("model_type", "fused"), LAYOUTS)
def test_every_family_and_layout_passes_with_no_finding(models: Models, model_type: str, fused: bool) -> None:
    path = models(model_type, fused=fused)
    report = validate_checkpoint(path, level="values")
    # Some classes begin with weights of zero, and leave towers as memory came: a tiny model keeps both.
    made = {name for name, tensor in read_tensors(path).items() if not tensor.any() or re.search(TOWER, name)}
    assert [f for f in report.findings if not (f.code.startswith("V0") and f.tensor in made)] == []
    # What was not looked at is said, and it is only what is not there, or what configs leave to the model class.
    assert {code for skip in report.not_checked for code in skip.codes} <= {"S09", "T01", "T02", "C07", "C08"}


@pytest.mark.parametrize(("form", "source"), [(make_fp8, "deepseek_v3"), (make_mxfp4, "gpt_oss")])
def test_every_quantised_form_passes(models: Models, tmp_path: Path, form: Any, source: str) -> None:
    form(models(source, dtype="bfloat16"), tmp_path / "model")
    assert validate_checkpoint(tmp_path / "model", level="values").findings == ()


def test_the_demo_passes_at_every_level(demo: Path) -> None:
    report = validate_checkpoint(demo, level="forward")
    assert report.findings == ()
    assert {code for skipped in report.not_checked for code in skipped.codes} == {"S09"}


def test_an_edit_validates_against_its_model(demo: Path, tmp_path: Path, ok: Cli) -> None:
    out = tmp_path / "out"
    result = ok("rescale", demo, "--top-k", 3, "-o", out, "--validate", "--checksums", "--json")
    assert result.json["validation"]["errors"] == 0
    report = ok("validate", out, "--against", demo, "--json").json
    assert report["findings"] == []
    assert report["not_checked"] == []


def test_our_own_code_is_told_from_any_other(models: Models, tmp_path: Path, ok: Cli) -> None:
    out = tmp_path / "out"
    ok("tie-blocks", models("mixtral"), "-o", out, "--validate")
    found = validate_checkpoint(out, level="container").findings
    assert [(f.code, f.severity, f.file) for f in found] == [("P05", "note", "config.json")]
    with open(out / "modeling_tied.py", "a") as code:
        code.write("import os\n")
    found = validate_checkpoint(out, level="container").findings
    assert [(f.code, f.severity) for f in found] == [("P05", "warning"), ("P05", "warning")]


# Tests of these validate what the command writes: no recipe that ships can name what they need.
BESIDE_RECIPES = {
    "add-expert": "test_add_expert.py",
    "refit": "test_layer_fit.py",
    "mtp-extract": "test_mtp.py",
    "mtp-graft": "test_mtp.py",
}
# Commands that write checkpoints and are no operations; what they write is validated by test_merge.py and test_fit.py.
OTHERS = {"run", "merge", "fit"}


def test_every_command_writes_what_validate_lets_pass() -> None:
    """Shipped recipes are run by test_recipes.py, which validates what they write with a forward pass."""
    steps = {step.operation for path in SHIPPED for step in load_recipe(path).steps}
    assert steps | BESIDE_RECIPES.keys() == set(operations())
    for file in (*BESIDE_RECIPES.values(), "test_merge.py", "test_fit.py", "test_recipes.py"):
        assert re.search(r"validate.*level.*forward", next((ROOT / "tests").rglob(file)).read_text())
    writers = {
        command.name or ""
        for command in app().registered_commands
        if command.callback is not None and "max_shard_size" in inspect.signature(command.callback).parameters
    }
    assert writers <= set(operations()) | OTHERS


def broken(demo: Path, folder: Path) -> Path:
    """A copy with one error and one warning."""
    shutil.copytree(demo, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    (folder / "modeling_evil.py").write_text("")
    return folder


def test_exit_codes(demo: Path, tmp_path: Path, cli: Cli) -> None:
    folder = broken(demo, tmp_path / "model")
    assert cli("validate", demo, "--level", "config").code == 0
    assert cli("validate", folder, "--level", "config").code == 1
    assert cli("validate", folder, "--level", "config", "--ignore", "C06").code == 0
    result = cli("validate", folder, "--level", "config", "--ignore", "C06", "--fail-on", "warning")
    assert result.code == 1
    assert "ignored: 1 C06" in result.out
    for wrong in (["--ignore", "X99"], ["--level", "deep"], ["--format", "xml"], ["--report", "a.doc"]):
        assert cli("validate", demo, *wrong).code == 2, wrong
    assert cli("validate", tmp_path / "nowhere").code == 2
    assert cli("validate", demo, "--level", "container", "--report", tmp_path / "no" / "a.json").code == 2


def test_every_format_says_the_same(demo: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = broken(demo, tmp_path / "model")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    files = {suffix: tmp_path / f"report{suffix}" for suffix in (".txt", ".json", ".xml", ".sarif", ".md")}
    options = [word for file in files.values() for word in ("--report", file)]
    printed = cli("validate", folder, "--level", "config", "--format", "github", *options)
    assert printed.code == 1
    text = {suffix: file.read_text() for suffix, file in files.items()}
    assert "1 error, 1 warning" in text[".txt"]
    assert [f["code"] for f in json.loads(text[".json"])["findings"]] == ["C06", "P05"]
    suite = ElementTree.fromstring(text[".xml"])
    failures = [case.get("name", "")[:3] for case in suite.iter("testcase") if case.find("failure") is not None]
    assert (failures, suite.get("failures")) == (["C06"], "1")
    results = json.loads(text[".sarif"])["runs"][0]["results"]
    assert [(r["ruleId"], r["level"]) for r in results] == [("C06", "error"), ("P05", "warning")]
    assert "| error | C06 |" in text[".md"]
    assert (tmp_path / "summary").read_text() == text[".md"]
    lines = printed.out.splitlines()
    assert lines[0].startswith("::error file=config.json,title=C06")
    assert lines[1].startswith("::warning file=modeling_evil.py,title=P05")


def test_what_is_remote_or_too_deep_is_listed(demo: Path) -> None:
    report = validate_checkpoint(demo, level="container")
    assert report.levels == ("container",)
    assert set(report.checked) <= {code for code, row in CODES.items() if row.level == "container"}


@pytest.mark.parametrize("declared", [0, 1, 2])
def test_declared_prediction_layers_are_no_leftovers(models: Models, tmp_path: Path, ok: Cli, declared: int) -> None:
    """DeepSeek-V3 as it is published: a note for what config.json names, warnings for what it does not."""
    tensors = read_tensors(models("deepseek_v3"))
    for layer in (2, 3)[: max(declared, 1)]:
        tensors |= {
            n.replace("layers.1.", f"layers.{layer}."): t + layer for n, t in tensors.items() if "layers.1." in n
        }
        tensors[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(32, 64)
        tensors |= {f"model.layers.{layer}.{n}.weight": torch.ones(32) for n in ("enorm", "hnorm", "shared_head.norm")}
    rewrite(models("deepseek_v3"), tmp_path / "m", tensors, {"num_nextn_predict_layers": declared})
    report = validate_checkpoint(tmp_path / "m", level="config")
    leftovers = [f for f in report.findings if f.code == "C11"]
    assert bool(leftovers) == (declared == 0)
    notes = [s.reason for s in report.not_checked if "builds no layers for multi-token prediction" in s.reason]
    assert len(notes) == (declared > 0)
    if declared:
        assert not [f for f in report.findings if f.severity != "note"]
        ok("validate", tmp_path / "m", "--fail-on", "warning", "--level", "config")
