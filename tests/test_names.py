"""One meaning per name: no public name is defined by two modules of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import moesurgery

PACKAGE = Path(moesurgery.__file__).parent


def defined(module: ast.Module) -> Iterator[str]:
    """Yield the names that the statements of a module define; what it imports is defined elsewhere."""
    for statement in module.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_no_public_name_has_two_meanings() -> None:
    homes = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for name in defined(ast.parse(path.read_text())):
            if not name.startswith("_"):
                homes[name].add(str(path.relative_to(PACKAGE)))
    twice = {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1}
    assert "open_checkpoint" in homes
    assert not twice
