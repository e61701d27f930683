"""`moesurgery families`: what the family table knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from moesurgery.cli._common_options import Json
from moesurgery.cli._console import console
from moesurgery.cli._help import completed
from moesurgery.errors import RecipeError
from moesurgery.families.overview import CLASSES, HEADER, Overview, about, meaning, overview
from moesurgery.families.table import FAMILIES
from moesurgery.recipe.registry import did_you_mean


def _names() -> Iterable[str]:
    return sorted({word for f in FAMILIES for word in (f.name, *f.model_types)})


def families_command(
    name: Annotated[
        str | None,
        typer.Argument(help="Show everything about one family or model_type.", autocompletion=completed(_names)),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which model families are known, and what can be done with each."""
    chosen = [overview(f) for f in FAMILIES if name is None or name == f.name or name in f.model_types]
    if not chosen:
        raise RecipeError(
            f"no family or model_type is called {name!r}",
            did_you_mean(name or "", _names())
            or "`moesurgery families` lists all; docs/families.md shows how to add one",
        )
    if as_json:
        console.json({"schema_version": 1, "families": [family.as_json() for family in chosen]})
    elif name is None:
        console.table(HEADER, [family.row for family in chosen])
        console.result()
        for letter, words in CLASSES.items():
            console.result(f"{letter}  {words}")
        console.result()
        console.result(
            f"{len(chosen)} families; all count exactly. `moesurgery families NAME` says what is refused, and why"
        )
    else:
        for family in chosen:
            _show(family)


def _show(found: Overview) -> None:
    family = found.family
    types = f"model_type {', '.join(family.model_types)}" if family.model_types else "known by its architectures"
    console.result(f"{family.name}: {types}")
    if family.architectures:
        console.result(f"  architectures: {', '.join(family.architectures)}")
    if family.note:
        console.result(f"  {family.note}")
    for layout in family.layouts:
        console.result(f"  {layout.kind}")
        for part in layout.parts:
            console.result(f"    {part.path}: {meaning(part)}")
    for further in family.sets:
        for layout in further.layouts:
            console.result(f"  {further.name}, a further set of experts: {layout.kind}")
            for part in layout.parts:
                console.result(f"    {part.path}: {meaning(part)}")
    console.result("  router")
    for along in family.along:
        console.result(f"    {along.path}: {about(along)}")
    if family.shared:
        console.result(f"  always on: {', '.join(family.shared)}")
    console.result(f"  routing class {found.classes}: {CLASSES[found.classes[0]]}")
    for operation, words in (("rescale", found.factor), ("drop-experts", found.drop)):
        console.result(f"  {operation}: {words}")
    for operation in found.refusals.keys() - {"rescale", "drop-experts"}:
        console.result(f"  {operation}: refused: {found.refusals[operation]}")
