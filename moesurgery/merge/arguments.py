"""What a recipe gives a method's parameters for one part of the output."""

from __future__ import annotations

from typing import Any

from moesurgery.errors import RecipeError
from moesurgery.merge.filters import Filters
from moesurgery.merge.method import per_model, scalar
from moesurgery.merge.setting import Settings, resolve
from moesurgery.merge.sources import Place, Source, Sources
from moesurgery.merge.stage import Stage
from moesurgery.surgery.parameters import MISSING, Parameter


class Arguments:
    """The arguments of a stage's method, part by part."""

    def __init__(self, stage: Stage, sources: Sources) -> None:
        self.stage, self.sources, self.method = stage, sources, stage.method
        self._filters = Filters()

    def of(self, path: str, place: Place, chosen: list[Source]) -> dict[str, Any]:
        """Return the arguments for one part: a tuple by model for what has a value for each of `chosen`.

        Raises RecipeError, with the line, where one is missing or wrong.
        """
        lead, part = self.sources.lead(place.slice), self.stage.slices[place.slice]
        outer = (part.settings, self.stage.settings)
        key = lead.key(path, place)
        matches = self._filters.matcher(lead.parts, key, place.layer)
        found: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            if per_model(parameter):
                found[name] = tuple(self._of_model(name, scalar(parameter), path, place, s, outer) for s in chosen)
                continue
            value = resolve(name, outer, matches, place.t)
            if value is MISSING:
                if parameter.required:
                    raise self._lacking(name, lead.parts.names(key, place.layer)[0], part.line)
                value = parameter.default
            found[name] = round(value) if parameter.annotation is int else value
        wrong = self.method.refuse(found) if self.method.refuse else None
        if wrong:
            where = lead.parts.names(key, place.layer)[0]
            raise RecipeError(f"{self.sources.origin}:{part.line}: {self.method.name} at {where}: {wrong}")
        return found

    def _of_model(
        self, name: str, parameter: Parameter, path: str, place: Place, source: Source, outer: tuple[Settings, ...]
    ) -> Any:
        key = source.key(path, place)
        matches = self._filters.matcher(source.parts, key, key.layer)
        value = resolve(name, (source.settings, *outer), matches, place.t)
        if value is not MISSING:
            return value
        if parameter.required:
            raise self._lacking(f"{name} of {source.parts.label}", source.parts.names(key, key.layer)[0], source.line)
        return parameter.default

    def _lacking(self, what: str, tensor: str, line: int) -> RecipeError:
        return RecipeError(
            f"{self.sources.origin}:{line}: {self.method.name} needs {what}, and no filter gives it for {tensor}",
            "add a last choice without filter: - value: …",
        )
