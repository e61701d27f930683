"""Parameters as recipes give them: one value, values along the layers, or values by tensor name.

t: 0.5                                   # one value
t: [0, 0.5, 1]                           # along the layers of the slice, interpolated between the points
t:                                       # by filter: the first that is part of the tensor's name
  - {filter: self_attn, value: [0, 1]}
  - value: 0.5                           # all others
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EVERYTHING = "*"


@dataclass(frozen=True)
class FilteredValue:
    """A value, or values along the layers, for tensors whose name holds `filter` (None: all)."""

    filter: str | None
    value: Any
    line: int

    def at(self, t: float) -> Any:
        """Return the value at `t` from 0 to 1 along the layers. Words and switches do not interpolate."""
        if not isinstance(self.value, tuple):
            return self.value
        last = len(self.value) - 1
        position = t * last
        at = min(int(position), last)
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.value):
            return self.value[at]
        share = position - at
        return (1 - share) * self.value[at] + share * self.value[min(at + 1, last)]


@dataclass(frozen=True)
class ParameterValue:
    """All choices of one parameter at one point of a recipe."""

    choices: tuple[FilteredValue, ...]

    def chosen(self, matches: Callable[[str], bool]) -> FilteredValue | None:
        """Return the first choice whose filter matches."""
        return next((c for c in self.choices if c.filter is None or matches(c.filter)), None)


ParameterValues = Mapping[str, ParameterValue]


def read_parameter_value(value: Any, line_of: Callable[..., int]) -> ParameterValue:
    """Read what a recipe gives a parameter; `line_of` gives the line of a path below it.

    Raises ValueError with a line and a reason.
    """
    if isinstance(value, dict):
        return ParameterValue((_choice(value, line_of()),))
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return ParameterValue(tuple(_choice(entry, line_of(i)) for i, entry in enumerate(value)))
    return ParameterValue((FilteredValue(None, _values(value, line_of()), line_of()),))


def _choice(entry: Any, line: int) -> FilteredValue:
    if not isinstance(entry, dict) or "value" not in entry or not entry.keys() <= {"filter", "value"}:
        raise ValueError(line, "a choice is a mapping of `filter` and `value`: - {filter: self_attn, value: 0.5}")
    text = entry.get("filter")
    if text is not None and not isinstance(text, str):
        raise ValueError(line, f"filter is {text!r}, expected a part of a tensor's name")
    return FilteredValue(None if text in (None, EVERYTHING) else text, _values(entry["value"], line), line)


def _values(value: Any, line: int) -> Any:
    if not isinstance(value, list):
        if isinstance(value, dict) or value is None:
            raise ValueError(line, f"{value!r} is no value")
        return value
    if not value or any(isinstance(entry, (list, dict)) or entry is None for entry in value):
        raise ValueError(line, "values along the layers are a list of numbers, such as [0, 0.5, 1]")
    return tuple(value)


def scalars(given: ParameterValue) -> Iterator[tuple[Any, int]]:
    """Yield every single value of a parameter with its line."""
    for choice in given.choices:
        for value in choice.value if isinstance(choice.value, tuple) else (choice.value,):
            yield value, choice.line


def converted(given: ParameterValue, convert: Callable[[Any], Any]) -> ParameterValue:
    """Return the choices with every single value converted."""
    return ParameterValue(
        tuple(
            FilteredValue(
                c.filter, tuple(map(convert, c.value)) if isinstance(c.value, tuple) else convert(c.value), c.line
            )
            for c in given.choices
        )
    )
