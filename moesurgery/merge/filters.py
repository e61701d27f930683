"""Which tensors a recipe's filter means: those whose name holds it, in the checkpoint's own names before all others.

A filter that no name of the checkpoint holds is looked for in the names of the family's other layouts: `w2` works on
fused experts, and `mlp.experts.down_proj` on Mixtral as the Hub has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from moesurgery.errors import RecipeError
from moesurgery.merge.parts import Key, Parts
from moesurgery.merge.setting import Settings
from moesurgery.merge.stage import Stage
from moesurgery.surgery.operation import did_you_mean


class Filters:
    """Matches filters with parts, knowing which of them are written for the checkpoint's own names."""

    def __init__(self) -> None:
        self._native: dict[tuple[int, str], bool] = {}

    def matcher(self, parts: Parts, key: Key, layer: int | None) -> Callable[[str], bool]:
        """Return the function that tells whether a filter means a part; `layer` is the number in its name."""

        def matches(text: str) -> bool:
            if (id(parts), text) not in self._native:
                self._native[id(parts), text] = any(text in name for name in parts.plan.tensors)
            own, others = parts.names(key, layer)
            return text in own or (not self._native[id(parts), text] and any(text in name for name in others))

        return matches


def filters_of(stage: Stage) -> Iterator[tuple[str, int]]:
    """Yield all filters of a stage with their lines."""
    scopes: list[Settings] = [stage.settings]
    for part in stage.slices:
        scopes += [part.settings, *(entry.settings for entry in part.inputs)]
    for scope in scopes:
        for setting in scope.values():
            for choice in setting.choices:
                if choice.filter is not None:
                    yield choice.filter, choice.line


def check_filters(stage: Stage, names: Iterable[str], models: Iterable[Parts], origin: str) -> None:
    """Refuse a recipe with a filter that no name holds. Raises RecipeError with the lines."""
    wanted: dict[str, int] = {}
    for text, line in filters_of(stage):
        wanted.setdefault(text, line)
    known = set(names)
    for parts in models:
        if wanted:
            known.update(parts.plan.tensors)
            for key in parts.home:
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
