"""Which tensors a recipe's filter means: those whose name holds it, in the checkpoint's own names before all others.

A filter that no name of the checkpoint holds is looked for in the names of the family's other layouts: `w2` works on
fused experts, and `mlp.experts.down_proj` on Mixtral as the Hub has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from moesurgery.errors import RecipeError
from moesurgery.merge.recipe.parameter_values import ParameterValues
from moesurgery.merge.recipe.stage import Stage
from moesurgery.moe.canonical_names import CanonicalName, CanonicalTensors
from moesurgery.recipe.registry import did_you_mean


class Filters:
    """Matches filters with parts, knowing which of them are written for the checkpoint's own names.

    That is asked of experts, of routers and of all else apart: `gate_proj` may be a name of dense layers here, and of
    experts in another layout. A name that a filter begins within a word of (`up_proj` in `gate_up_proj`) is meant only
    where no layout has one that it begins.
    """

    def __init__(self) -> None:
        self._native: dict[tuple[int, str, str], bool] = {}
        self._names: dict[tuple[int, str], tuple[set[str], set[str]]] = {}

    def matcher(self, parts: CanonicalTensors, key: CanonicalName, layer: int | None) -> Callable[[str], bool]:
        """Return the function that tells whether a filter means a part; `layer` is the number in its name."""

        def matches(text: str) -> bool:
            own, others = parts.names(key, layer)
            if not others:
                return text in own
            return text in own if self._is_native(parts, key, text) else any(text in name for name in others)

        return matches

    def _is_native(self, parts: CanonicalTensors, key: CanonicalName, text: str) -> bool:
        kind = parts.kind(key)
        question = (id(parts), kind, text)
        if question not in self._native:
            if question[:2] not in self._names:
                names = [parts.names(k, k.layer) for k in parts.stored_in if parts.kind(k) == kind]
                self._names[question[:2]] = {own for own, _ in names}, {name for _, others in names for name in others}
            own, others = self._names[question[:2]]
            begins = re.compile((r"(?<!\w)" if text[:1].isalnum() else "") + re.escape(text))
            self._native[question] = any(map(begins.search, own)) or (
                any(text in name for name in own) and not any(map(begins.search, others))
            )
        return self._native[question]


def filters_of(stage: Stage) -> Iterator[tuple[str, int]]:
    """Yield all filters of a stage with their lines."""
    scopes: list[ParameterValues] = [stage.parameters]
    for part in stage.slices:
        scopes += [part.parameters, *(entry.parameters for entry in part.inputs)]
    for scope in scopes:
        for value in scope.values():
            for choice in value.choices:
                if choice.filter is not None:
                    yield choice.filter, choice.line


def check_filters(stage: Stage, names: Iterable[str], models: Iterable[CanonicalTensors], origin: str) -> None:
    """Refuse a recipe with a filter that no name holds. Raises RecipeError with the lines."""
    wanted: dict[str, int] = {}
    for text, line in filters_of(stage):
        wanted.setdefault(text, line)
    known = set(names)
    for parts in models:
        if wanted:
            known.update(parts.plan.tensors)
            for key in parts.stored_in:
                known.update(parts.names(key, key.layer)[1])
    wrong = []
    for text, line in wanted.items():
        if not any(text in name for name in known):
            words = {word for name in known for word in (name, *name.split("."), ".".join(name.split(".")[-2:]))}
            hint = did_you_mean(text, sorted(words))
            wrong.append(f"{origin}:{line}: the filter {text!r} matches no tensor" + (f": {hint}" if hint else ""))
    if wrong:
        raise RecipeError(
            "\n".join(wrong), "`moesurgery inspect MODEL` shows the names of its tensors; or delete the line"
        )
