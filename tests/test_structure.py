"""The map of the package: imports go down only, function-local ones included, without circles; no file name twice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "moesurgery"
# From the ground up: a module imports from its own entry and from those before it. docs/design.md says what each owns.
ORDER = (
    *("_version", "errors", "escape", "cpu_count", "whole_file", "scheduler", "tied"),
    *("checkpoint", "expr", "families", "plan", "moe", "decoders", "recipe", "count", "stats", "budget", "forward"),
    *("lora", "surgery", "merge", "fitting", "write", "validate", "patch", "cli", "__main__"),
)


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, also for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def entry(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_its_place() -> None:
    assert {entry(module) for module in modules() if module != "moesurgery"} == set(ORDER)


def test_imports_go_down_only() -> None:
    known = modules()
    rank = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{module} imports {other}"
        for module, path in known.items()
        if module != "moesurgery"  # the public API, which names what is in all of them
        for other in imported(path, known)
        if other == "moesurgery" or rank[entry(other)] > rank[entry(module)]
    ]
    assert wrong == []


def test_no_circles() -> None:
    known = modules()
    graph = {module: {other for other in imported(path, known) if other != module} for module, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_no_file_name_twice() -> None:
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_package_says_what_is_public_in_it() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(text.splitlines()) >= 3, f"{path} says neither what is public in it nor what must not be in it"


def test_importing_the_package_changes_nothing_else() -> None:
    import subprocess
    import sys

    program = (
        "import sys; before = list(sys.meta_path), list(sys.path_hooks); import moesurgery;"
        "assert (list(sys.meta_path), list(sys.path_hooks)) == before;"
        "assert not {'torch', 'transformers', 'numpy', 'typer'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
