"""The GitHub action: its steps as the runner runs them, in the checkout of a stranger's pull request."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesurgery import write_plan
from moesurgery.merge.merge_recipe import parse_merge_recipe
from tests.conftest import ROOT

SHADOWED = ("json", "pip", "moesurgery", "typer", "yaml", "re", "torch", "os", "sitecustomize", "usercustomize")
GOOD = {"LEVEL": "container", "AGAINST": "", "FAIL_ON": "error", "IGNORE": ""}


def action() -> Any:
    return yaml.safe_load((ROOT / "action.yml").read_text())


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `python` that has this very moesurgery installed, and a pip that only says what it is asked."""
    folder = tmp_path_factory.mktemp("programs")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "all.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text("import sys; print('asked of pip:', *sys.argv[1:])\n")
    return folder / "bin"


class Runner:
    """Runs steps of the action in `checkout`, with the files that GitHub gives them."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.checkout = programs, folder, folder / "checkout"
        self.checkout.mkdir()
        (folder / "temp").mkdir()

    def run(self, step_id: str | None, more: dict[str, str], **given: str) -> subprocess.CompletedProcess[str]:
        (step,) = [step for step in action()["runs"]["steps"] if step.get("id") == step_id]
        assert set(given) == set(step["env"])
        assert step["shell"] == "bash"
        files = {"GITHUB_OUTPUT": str(self.folder / "output"), "GITHUB_STEP_SUMMARY": str(self.folder / "summary")}
        (self.folder / "output").write_text("")
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.checkout,
            env={**os.environ, **given, **files, "RUNNER_TEMP": str(self.folder / "temp"), "PATH": path, **more},
            capture_output=True,
            text=True,
        )

    def validate(self, **given: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        """Run the step that validates, and return its outputs too."""
        done = self.run("validate", {}, **given)
        return done, self.outputs

    @property
    def outputs(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.folder / "output").read_text().splitlines())


@pytest.fixture
def runner(programs: Path, tmp_path: Path) -> Runner:
    return Runner(programs, tmp_path)


def test_inputs_are_never_pasted_into_a_script() -> None:
    for step in action()["runs"]["steps"]:
        assert "${{" not in step["run"]
    assert set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text())) == set(action()["inputs"])


@pytest.mark.parametrize("path", [None, ".", "", "src:."], ids=["unset", "here", "empty", "two"])
@pytest.mark.parametrize("package", [False, True])
def test_nothing_of_the_checkout_is_run(runner: Runner, demo: Path, package: bool, path: str | None) -> None:
    """Modules named as those that pip and moesurgery import, whatever the workflow has in PYTHONPATH."""
    for name in SHADOWED:
        target = runner.checkout / name / "__init__.py" if package else runner.checkout / f"{name}.py"
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"open({str(runner.folder)!r} + '/OWNED-{name}', 'w')\nraise SystemExit(0)\n")
        if package:
            shutil.copy(target, target.with_name("__main__.py"))
    more = {} if path is None else {"PYTHONPATH": path, "PYTHONSTARTUP": "json.py", "PYTHONINSPECT": "1"}
    installed = runner.run(None, more, VERSION="", SOURCE=str(ROOT))
    assert installed.returncode == 0, installed.stderr
    assert f"asked of pip: install --quiet {ROOT}" in installed.stdout.splitlines()
    done = runner.run("validate", more, TARGET=str(demo), **GOOD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.outputs["errors"] == "0"
    assert not list(runner.folder.glob("OWNED-*"))


def test_a_version_is_one_requirement(runner: Runner) -> None:
    done = runner.run(None, {}, VERSION="1.2 --index-url x", SOURCE=str(ROOT))
    assert "asked of pip: install --quiet moesurgery==1.2 --index-url x" in done.stdout


def test_two_uses_in_a_job_have_reports_of_their_own(runner: Runner, demo: Path) -> None:
    _, first = runner.validate(TARGET=str(demo), **GOOD)
    kept = Path(first["report"]).read_text()
    _, second = runner.validate(TARGET=str(runner.checkout), **GOOD)
    paths = [outputs[key] for outputs in (first, second) for key in ("report", "sarif")]
    assert len(set(paths)) == 4
    assert all(Path(path).is_file() for path in paths)
    assert Path(first["report"]).read_text() == kept
    assert (first["errors"], second["errors"]) != ("0", "0")


@pytest.mark.parametrize(
    ("target", "level", "said"),
    [
        ("no such folder", "config", "no such directory"),
        ("100%\r\n::set-output name=errors::0\n##[set-output name=errors]0", "config", "no such directory"),
        (".", "thorough", "--level thorough: unknown"),
        (".", "--against", "--level"),
    ],
    ids=["missing", "hostile", "level", "usage"],
)
def test_what_could_not_be_validated_is_an_annotation(runner: Runner, target: str, level: str, said: str) -> None:
    done, outputs = runner.validate(TARGET=target, LEVEL=level, AGAINST="", FAIL_ON="error", IGNORE="")
    assert (done.returncode, outputs) == (2, {})
    lines = done.stdout.splitlines()
    (annotation,) = [line for line in lines if line.startswith("::error ")]
    assert annotation.startswith("::error title=moesurgery could not validate (exit 2)::error: ")
    assert said in annotation
    assert said in done.stdout.replace(annotation, "")  # and in the log, as it was said
    start = next(i for i, line in enumerate(lines) if line.startswith("::stop-commands::"))
    token = lines[start].removeprefix("::stop-commands::")
    stop = lines.index(f"::{token}::")
    outside = lines[:start] + lines[stop + 1 :]
    assert len(token) == 10
    assert not [line for line in outside if "set-output" in line and line != annotation]
    assert "set-output" not in re.split(r"%0A", annotation)[0].partition("::error: ")[0]


def test_a_moesurgery_that_cannot_start_is_an_annotation(runner: Runner, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    runner.programs = bare / "bin"
    done, outputs = runner.validate(TARGET=".", **GOOD)
    assert (done.returncode, outputs) == (1, {})
    assert "::error title=moesurgery could not validate (exit 1)::" in done.stdout
    assert "No module named moesurgery" in done.stdout


def test_codes_to_ignore_may_stand_on_lines(runner: Runner, demo: Path) -> None:
    given = {**GOOD, "LEVEL": "config", "IGNORE": "C03\nC14 C06\n"}
    folder = runner.checkout / "model"
    shutil.copytree(demo, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 99}))
    done, outputs = runner.validate(TARGET="model", **given)
    assert (done.returncode, outputs["errors"]) == (0, "0"), done.stdout


def test_the_action_takes_several_references(runner: Runner, demo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other one"
    shutil.copytree(demo, other)
    text = f"models: [{demo}, {other}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    write_plan(parse_merge_recipe(text).plan(), tmp_path / "out")
    inputs = {"TARGET": str(tmp_path / "out"), "LEVEL": "container", "FAIL_ON": "warning", "IGNORE": ""}
    done, _ = runner.validate(AGAINST=f"{other}\n{demo}\n", **inputs)
    assert done.returncode == 0, done.stdout + done.stderr
    done, _ = runner.validate(AGAINST=str(demo), **inputs)
    assert done.returncode == 1
    assert "its recipe needs other one" in done.stdout


@pytest.mark.parametrize(("top_k", "code"), [(2, 0), (99, 1)])
def test_the_action_validates(runner: Runner, demo: Path, tmp_path: Path, top_k: int, code: int) -> None:
    folder = tmp_path / "; rm -rf $(pwd) --level"
    folder.mkdir()
    for path in demo.iterdir():
        os.link(path, folder / path.name) if path.name != "config.json" else None
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    given = {"TARGET": str(folder), "LEVEL": "config", "AGAINST": "", "FAIL_ON": "error", "IGNORE": "C03 C14"}
    done, output = runner.validate(**given)
    assert done.returncode == code, done.stderr
    assert output["errors"] == str(code)
    assert json.loads(Path(output["report"]).read_text())["errors"] == code
    assert Path(output["sarif"]).exists()
    assert ("::error file=config.json,title=C06" in done.stdout) == bool(code)
    assert (tmp_path / "summary").read_text().startswith("### moesurgery validate")
