"""The recipes that ship with moesurgery, and what a recipe file on the command line may be mistaken for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from moesurgery.errors import RecipeError


def shipped_recipes() -> dict[str, str]:
    """Return the text of every shipped recipe by its name: `rescale-top3`, `merge/linear`."""
    return dict(_recipes_in(_folder(), ""))


def _folder() -> Traversable:
    """Return where the recipes are: in the installed package, or at the top of a source checkout."""
    packaged = resources.files("moesurgery") / "recipes_shipped"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


def _recipes_in(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda e: (e.is_dir(), e.name)):
        if entry.is_dir():
            yield from _recipes_in(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")


def check_recipe_file(file: Path) -> None:
    """Refuse what is no file but the name of a shipped recipe, `-`, or a folder. Raises RecipeError."""
    name = str(file)
    if name == "-":
        raise RecipeError("a recipe is read from a file, not from standard input", "save it, then name the file")
    if file.is_dir():
        raise RecipeError(
            f"{file} is a folder, and a recipe is a YAML file", "moesurgery recipes ls lists those that ship"
        )
    if not file.exists() and name.removesuffix(".yaml") in shipped_recipes():
        name = name.removesuffix(".yaml")
        raise RecipeError(
            f"{name} is the name of a recipe that ships, not of a file here",
            f"save it, and write your model into it: moesurgery recipes show {name} > {name.rsplit('/', 1)[-1]}.yaml",
        )
