"""What a recipe gives a method's parameters for one part of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moesurgery.errors import RecipeError
from moesurgery.merge.compute.method import per_model, scalar
from moesurgery.merge.filters import Filters
from moesurgery.merge.recipe.parameter_values import ParameterValue, ParameterValues
from moesurgery.merge.recipe.stage import Stage
from moesurgery.merge.sources import MergeSource, MergeSources, OutputPosition
from moesurgery.recipe.parameters import MISSING, Parameter


class Arguments:
    """The arguments of a stage's method, part by part."""

    def __init__(self, stage: Stage, sources: MergeSources) -> None:
        self.stage, self.sources, self.method = stage, sources, stage.method
        self._filters = Filters()
        self._used: dict[
            int, tuple[str, ParameterValue, set[int]]
        ] = {}  # values of parameters, and the choices of them that counted

    def of(self, path: str, position: OutputPosition, chosen: list[MergeSource]) -> dict[str, Any]:
        """Return the arguments for one part: a tuple by model for what has a value for each of `chosen`.

        Raises RecipeError, with the line, where one is missing or wrong.
        """
        lead, part = self.sources.lead(position.slice), self.stage.slices[position.slice]
        outer = (part.parameters, self.stage.parameters)
        key = lead.key(path, position)
        matches = self._filters.matcher(lead.parts, key, position.layer)
        arguments: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            if per_model(parameter):
                arguments[name] = tuple(
                    self._of_model(name, scalar(parameter), path, position, s, outer) for s in chosen
                )
                continue
            value = self._resolved(name, outer, matches, position.t)
            if value is MISSING:
                if parameter.required:
                    raise self._lacking(name, name, outer, lead.parts.names(key, position.layer)[0], part.line)
                value = parameter.default
            arguments[name] = round(value) if parameter.annotation is int else value
        wrong = self.method.refuse(arguments) if self.method.refuse else None
        if wrong:
            where = lead.parts.names(key, position.layer)[0]
            raise RecipeError(f"{self.sources.origin}:{part.line}: {self.method.name} at {where}: {wrong}")
        return arguments

    def idle(self) -> Iterator[tuple[int, str]]:
        """Yield, with its line, every choice by filter that has counted for no part so far."""
        for name, value, counted in self._used.values():
            for i, choice in enumerate(value.choices):
                if i not in counted and (choice.filter is not None or i < len(value.choices) - 1):
                    what = f"the filter {choice.filter!r}" if choice.filter is not None else "this value"
                    why = "choices before it take all that it means, or the layers in use hold none of that"
                    yield choice.line, f"{what} of {name} has no effect: {why}"

    def _of_model(
        self,
        name: str,
        parameter: Parameter,
        path: str,
        position: OutputPosition,
        source: MergeSource,
        outer: tuple[ParameterValues, ...],
    ) -> Any:
        key = source.key(path, position)
        matches = self._filters.matcher(source.parts, key, key.layer)
        scopes = (source.parameters, *outer)
        value = self._resolved(name, scopes, matches, position.t)
        if value is not MISSING:
            return value
        if parameter.required:
            what, tensor = f"{name} of {source.parts.label}", source.parts.names(key, key.layer)[0]
            raise self._lacking(name, what, scopes, tensor, source.line)
        return parameter.default

    def _resolved(
        self, name: str, scopes: tuple[ParameterValues, ...], matches: Callable[[str], bool], t: float
    ) -> Any:
        """Return the value of a parameter from the first scope that has one for a tensor; MISSING if none has."""
        for scope in scopes:
            given = scope.get(name)
            if given is None:
                continue
            choice = given.chosen(matches)
            counted = self._used.setdefault(id(given), (name, given, set()))[2]
            if choice is not None:
                counted.add(given.choices.index(choice))
                return choice.at(t)
        return MISSING

    def _lacking(
        self, name: str, what: str, scopes: tuple[ParameterValues, ...], tensor: str, line: int
    ) -> RecipeError:
        needs = f"{self.sources.origin}:{line}: {self.method.name} needs {what}"
        if any(name in scope for scope in scopes):
            return RecipeError(f"{needs}, and no filter gives it for {tensor}", "add a last choice: - value: …")
        return RecipeError(needs, f"add `parameters: {{{name}: …}}`, there or for the whole recipe")
