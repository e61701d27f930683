"""What records call the models and files that a plan was made from: by name, never by local path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import RecipeError
from moesurgery.plan.plan import Step
from moesurgery.recipe.parameters import with_texts
from moesurgery.recipe.registry import find_operation


class SourceNames:
    """The models of a plan, each once, under names of their own: `hf://org/name@commit`, or `./folder`.

    A second folder of one name is `./folder#2`.
    """

    def __init__(self, sources: Sequence[Checkpoint]) -> None:
        self._names: dict[Path | str, str] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        for checkpoint in sources:
            if _place(checkpoint) in self._names:
                continue
            identity = checkpoint.source.identity
            name = plain = identity if "://" in identity else f"./{identity}"
            count = 1
            while name in self._checkpoints:
                count += 1
                name = f"{plain}#{count}"
            self._names[_place(checkpoint)] = name
            self._checkpoints[name] = checkpoint

    def __iter__(self) -> Iterator[tuple[str, Checkpoint]]:
        return iter(self._checkpoints.items())

    def parameters(self, step: Step) -> dict[str, Any]:
        """Return a step's parameters with models and files under the names that records have for them."""
        return with_texts(step.parameters, {path: self._shown(step, text) for path, text in _places(step)})

    def _shown(self, step: Step, text: str) -> str:
        parts = step.parents.get(text)
        return Path(text).name if parts is None else "+".join(map(self._name, parts))

    def _name(self, part: Checkpoint | str) -> str:
        return part if isinstance(part, str) else self._names[_place(part)]


def _places(step: Step) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield where in a step's parameters models and files are named, and how."""
    if step.places is not None:
        yield from step.places.items()
        return
    try:
        operation = find_operation(step.operation)
    except RecipeError:
        return  # a step of somebody's own, whose parameters are theirs
    yield from ((path, text) for path, text, _ in operation.named(step.parameters))


def _place(checkpoint: Checkpoint) -> Path | str:
    """Return what tells a model from all others, however it was referred to."""
    source = checkpoint.source
    return source.root.resolve() if isinstance(source, LocalSource) else source.identity
