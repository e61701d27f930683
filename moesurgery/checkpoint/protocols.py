"""The protocols that a recipe may use: local folders, the Hub, and those that the user has allowed.

A recipe may be untrusted, and fsspec has protocols that log in to servers, read archives inside of archives or copy to
a cache. References on the command line, or passed to the Python API, come from the user and are not restricted.
"""

from __future__ import annotations

import os

from moesurgery.errors import RecipeError

VARIABLE = "MOESURGERY_PROTOCOLS"
HUB = "hf"


def protocols_of(reference: str) -> list[str]:
    """Return the protocols that fsspec would use for a reference, `zip://a::s3://b` has two; none for a folder."""
    return [part.partition("://")[0] for part in reference.split("::")] if "://" in reference else []


def allowed_in_recipes() -> set[str]:
    """Return the protocols that a recipe may use: the Hub's, and what MOESURGERY_PROTOCOLS lists with commas."""
    return {HUB, *(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())}


def refuse_unlisted(reference: str) -> None:
    """Raise RecipeError where a recipe names a model by a protocol that is not allowed."""
    known = allowed_in_recipes()
    unlisted = [name for name in dict.fromkeys(protocols_of(reference)) if name not in known]
    if unlisted:
        wanted = ",".join(sorted({*known, *unlisted} - {HUB}))
        raise RecipeError(
            f"{reference} is reached by {' and '.join(f'{name}://' for name in unlisted)}, and a recipe may name"
            " folders and hf:// alone",
            f"if you trust the recipe: {VARIABLE}={wanted} moesurgery …; a model on the command line is always opened",
        )
