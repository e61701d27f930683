"""The types that an operation's parameters may have: checked, described as JSON schema, read from a command line.

A parameter's annotation is the only declaration: `int`, `float`, `bool`, `str`, `Literal[...]`, `list[X]`,
`dict[str, X]`, a `TypedDict` whose fields are annotated likewise, and unions of them, in an
`Annotated[..., Param("what it is")]`. Values are never coerced from strings: a recipe that says `top_k: "3"` is wrong.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from moesurgery.checkpoint.strict_json import not_finite

MISSING = inspect.Parameter.empty

Reads = Literal["model", "file"]
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
_LONGEST_RANGE = 100_000


@dataclass(frozen=True)
class Param:
    """What an annotation cannot say: a help text (a sentence without full stop), bounds, what a text names.

    `reads`: a text that is none of the annotation's words names a model, or another file. Records show such texts
    without local paths, and a replay takes nothing that the record alone names. `option`: the command's option, where
    it is not the parameter's name.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    reads: Reads | None = None
    option: str | None = None


@dataclass(frozen=True)
class Parameter:
    """One keyword of an operation."""

    name: str
    annotation: Any
    default: Any
    param: Param

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def option(self) -> str:
        return self.param.option or "--" + self.name.replace("_", "-")


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the keyword-only parameters of an operation, in order."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: _parameter(function.__name__, name, hints[name], raw.default)
        for name, raw in inspect.signature(function).parameters.items()
        if raw.kind is inspect.Parameter.KEYWORD_ONLY
    }


def fields_of(mapping: type) -> dict[str, Parameter]:
    """Return the fields of a `TypedDict`, each declared as a parameter is."""
    hints = typing.get_type_hints(mapping, include_extras=True)
    required: frozenset[str] = getattr(mapping, "__required_keys__", frozenset())
    return {
        name: _parameter(mapping.__name__, name, hint, MISSING if name in required else None)
        for name, hint in hints.items()
    }


def _parameter(owner: str, name: str, hint: Any, default: Any) -> Parameter:
    annotation, *extras = get_args(hint) if get_origin(hint) is typing.Annotated else (hint,)
    param = next((e for e in extras if isinstance(e, Param)), None)
    if param is None:
        raise TypeError(f"{owner}: parameter {name} has no Param")
    return Parameter(name, annotation, default, param)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; the annotation alone where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union besides None."""
    return tuple(choice for choice in _choices(annotation) if choice is not type(None))


def words_of(annotation: Any) -> tuple[str, ...]:
    """Return all words that a value may be; none where it may be something else."""
    return literals_of(annotation) if all(get_origin(kind) is Literal for kind in kinds_of(annotation)) else ()


def literals_of(annotation: Any) -> tuple[str, ...]:
    """Return the words that a value may be, whatever else it may be."""
    return tuple(str(word) for k in kinds_of(annotation) if get_origin(k) is Literal for word in get_args(k))


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether `value`, as YAML or JSON gave it, is of the annotated type."""
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if choice is type(None):
            ok = value is None
        elif origin is Literal:
            ok = any(type(value) is type(c) and value == c for c in get_args(choice))
        elif origin is list:
            ok = isinstance(value, list) and all(is_of_type(v, get_args(choice)[0]) for v in value)
        elif origin is dict:
            key, item = get_args(choice)
            ok = isinstance(value, dict) and all(is_of_type(k, key) and is_of_type(v, item) for k, v in value.items())
        elif typing.is_typeddict(choice):
            ok = isinstance(value, dict) and misfit(value, choice) is None
        elif choice is float:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif choice is Any:
            ok = True
        else:
            ok = type(value) is choice
        if ok:
            return True
    return False


class Misfit(NamedTuple):
    """What is wrong inside a value, and where: the keys and positions that lead there."""

    path: tuple[str | int, ...]
    message: str


def misfit(value: Any, annotation: Any) -> Misfit | None:
    """Return the first thing wrong with `value`, as deep as it can be told; None where it fits."""
    choices = _choices(annotation)
    for choice in choices:
        if isinstance(value, list) and get_origin(choice) is list:
            for i, item in enumerate(value):
                if inner := misfit(item, get_args(choice)[0]):
                    return Misfit((i, *inner.path), inner.message)
            return None
        if isinstance(value, dict) and typing.is_typeddict(choice):
            return _misfit_of_mapping(value, fields_of(choice))
    return None if is_of_type(value, annotation) else Misfit((), f"{_shown(value)}, expected {describe(annotation)}")


def _misfit_of_mapping(value: dict[Any, Any], fields: dict[str, Parameter]) -> Misfit | None:
    for key, item in value.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}"
            return Misfit((key,), f"unknown: {hint}")
        if inner := misfit(item, fields[key].annotation):
            return Misfit((key, *inner.path), inner.message)
        if problem := _out_of_bounds(item, fields[key].param):
            return Misfit((key,), problem)
    missing = [field.name for field in fields.values() if field.required and field.name not in value]
    return Misfit((), f"{missing[0]} is missing") if missing else None


def _shown(value: Any) -> str:
    return f"{value!r} (text)" if isinstance(value, str) else f"{value!r}"


_ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_SEVERAL = {int: "whole numbers, as 0-6,9", float: "numbers", str: "texts", bool: "words true and false"}


def describe(annotation: Any) -> str:
    """Name a type for messages and help: `a whole number`, `one of a, b`, `a list of whole numbers, as 0-6,9`."""
    names = [_described(choice) for choice in kinds_of(annotation)]
    return ", or ".join(dict.fromkeys(names))


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in inner)
    if origin is list:
        return f"a list of {_SEVERAL[inner[0]]}" if inner[0] in _SEVERAL else f"a list, each {describe(inner[0])}"
    if origin is dict:
        if kinds_of(inner[1]) == (list[int],):
            return "such a list for each layer, as '{0: [3], 1: [6]}'"
        return f"{describe(inner[1])} for each layer, as '{{0: …, 1: …}}'"
    if typing.is_typeddict(kind):
        return f"a mapping with {', '.join(fields_of(kind))}"
    return _ONE.get(kind, "any value")


def check_value(parameter: Parameter, value: Any) -> Misfit | None:
    """Return what is wrong with `value`, None where it is right. The path begins with the parameter's name."""
    if wrong := misfit(value, parameter.annotation):
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in wrong.path)
        return Misfit((parameter.name, *wrong.path), f"{parameter.name}{where} is {wrong.message}")
    if problem := _out_of_bounds(value, parameter.param):
        return Misfit((parameter.name,), f"{parameter.name} is {problem}")
    for where, number in not_finite(value, parameter.name):
        return Misfit((parameter.name,), f"{where} is {number}, expected a finite number")
    return None


class NamedFile(NamedTuple):
    """Where in a step's parameters a model or another file is named, and how."""

    path: tuple[str | int, ...]
    text: str
    reads: Reads


def named(parameter: Parameter, value: Any) -> Iterator[NamedFile]:
    """Yield where a parameter's value names models and files."""
    yield from _named(value, parameter.annotation, parameter.param.reads, (parameter.name,))


def _named(value: Any, annotation: Any, reads: Reads | None, path: tuple[str | int, ...]) -> Iterator[NamedFile]:
    choices = _choices(annotation)
    if isinstance(value, str):
        words = {word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)}
        if reads is not None and value not in words:
            yield NamedFile(path, value, reads)
    for choice in choices:
        if isinstance(value, list) and get_origin(choice) is list:
            for i, item in enumerate(value):
                yield from _named(item, get_args(choice)[0], reads, (*path, i))
        elif isinstance(value, dict) and typing.is_typeddict(choice):
            for field in fields_of(choice).values():
                if field.name in value:
                    yield from _named(value[field.name], field.annotation, field.param.reads, (*path, field.name))


def with_texts(parameters: Mapping[str, Any], texts: Mapping[tuple[str | int, ...], str]) -> dict[str, Any]:
    """Return a copy of a step's parameters with other texts at some paths."""
    changed: dict[str, Any] = copy.deepcopy(dict(parameters))
    for path, text in texts.items():
        place: Any = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = text
    return changed


def _out_of_bounds(value: Any, param: Param) -> str | None:
    low, high = param.minimum, param.maximum
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            return f"{value}, expected a finite number"
        if low is not None and value < low:
            return f"{value}, expected at least {low:g}"
        if high is not None and value > high:
            return f"{value}, expected at most {high:g}"
    return None


def schema_of(annotation: Any, param: Param | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 7) of an annotation."""
    basic = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    schemas: list[dict[str, Any]] = []
    entry: dict[str, Any]
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if origin is Literal:
            schemas.append({"enum": list(get_args(choice))})
        elif origin is list:
            schemas.append({"type": "array", "items": schema_of(get_args(choice)[0])})
        elif origin is dict:
            schemas.append({"type": "object", "additionalProperties": schema_of(get_args(choice)[1])})
        elif typing.is_typeddict(choice):
            fields = fields_of(choice).values()
            entry = {"type": "object", "additionalProperties": False, "properties": {}}
            for field in fields:
                entry["properties"][field.name] = {
                    "description": field.param.help,
                    **schema_of(field.annotation, field.param),
                }
            if required := [field.name for field in fields if field.required]:
                entry["required"] = required
            schemas.append(entry)
        elif choice in basic:
            entry = {"type": basic[choice]}
            if param is not None and choice in (int, float):
                if param.minimum is not None:
                    entry["minimum"] = param.minimum
                if param.maximum is not None:
                    entry["maximum"] = param.maximum
            schemas.append(entry)
        else:
            schemas.append({})
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def from_text(parameter: Parameter, text: str) -> Any:
    """Read a value from a command line: a YAML scalar or flow value, `3,5` for a list. Raises ValueError.

    Where one number may be meant, `3` is that, and `[3]` the list. In lists of whole numbers `0-6` is a range.
    """
    from moesurgery.recipe.yaml_strict import parse_text

    kinds = [get_origin(c) or c for c in _choices(parameter.annotation)]
    candidates: list[Any] = []
    if int in kinds and type(number := parse_text(text)) is int:
        candidates.append(number)
    if list in kinds and not text.lstrip().startswith(("[", "{")):
        candidates.append(_with_ranges([parse_text(part) for part in text.split(",") if part.strip()]))
    candidates += [_with_ranges(parse_text(text)) if list in kinds else parse_text(text), text]
    for candidate in candidates:
        if is_of_type(candidate, parameter.annotation):
            problem = check_value(parameter, candidate)
            if problem:
                raise ValueError(problem.message)
            return candidate
    raise ValueError(f"{text!r} is not {describe(parameter.annotation)}")


def _with_ranges(value: Any) -> Any:
    """Return a value with the ranges in its lists written out: `[0-2, 5]` is 0, 1, 2, 5. Raises ValueError."""
    if isinstance(value, dict):
        return {key: _with_ranges([v] if _range_of(v) else v) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    written_out: list[Any] = []
    for item in value:
        numbers = _range_of(item)
        written_out += [_with_ranges(item)] if numbers is None else numbers
    return written_out


def _range_of(item: Any) -> range | None:
    matched = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if matched is None:
        return None
    first, last = int(matched[1]), int(matched[2])
    if last < first:
        raise ValueError(f"the range {item} ends before it begins: write {last}-{first}")
    if last - first >= _LONGEST_RANGE:
        raise ValueError(f"the range {item} has more than {_LONGEST_RANGE:,} numbers")
    return range(first, last + 1)
