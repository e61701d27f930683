"""The documentation is held to the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesurgery.cli._app import app
from moesurgery.recipe.registry import operations
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_up_to_date() -> None:
    program = (
        "import sys; sys.path.insert(0, 'docs'); import generate, json;"
        "print(json.dumps({name: make() for name, make in generate.GENERATED.items()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    for name, text in json.loads(done.stdout).items():
        assert (ROOT / "docs" / name).read_text() == text, "run: python docs/generate.py"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in app().registered_commands:
        assert f"`{command.name}" in readme, command.name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_operation_documents_its_parameters() -> None:
    for found in operations().values():
        assert found.summary.endswith(".")
        for parameter in found.parameters.values():
            assert parameter.param.help
            assert not parameter.param.help.endswith(".")


def test_readme_lists_every_package() -> None:
    readme = (ROOT / "README.md").read_text()
    for package in (ROOT / "moesurgery").iterdir():
        if package.is_dir() and (package / "__init__.py").exists():
            assert f"moesurgery/{package.name}/" in readme
