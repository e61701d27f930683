"""The types that an operation's parameters may have: checked, described as JSON schema, read from a command line.

A parameter's annotation is the only declaration: `int`, `float`, `bool`, `str`, `Literal[...]`, `list[X]`,
`dict[str, X]` and unions of them, in an `Annotated[..., Param("what it is")]`. Values are never coerced from
strings: a recipe that says `top_k: "3"` is wrong.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Param:
    """What an annotation cannot say: a help text (a sentence without full stop), bounds, a file name."""

    help: str
    minimum: float | None = None
    maximum: float | None = None
    metavar: str | None = None


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
        return "--" + self.name.replace("_", "-")


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the keyword-only parameters of an operation, in order."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, raw in inspect.signature(function).parameters.items():
        if raw.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        annotation, *extras = get_args(hints[name]) if get_origin(hints[name]) is typing.Annotated else (hints[name],)
        param = next((e for e in extras if isinstance(e, Param)), None)
        if param is None:
            raise TypeError(f"{function.__name__}: parameter {name} has no Param")
        found[name] = Parameter(name, annotation, raw.default, param)
    return found


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; the annotation alone where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value`, as YAML or JSON gave it, is of the annotated type."""
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if choice is type(None):
            ok = value is None
        elif origin is Literal:
            ok = any(type(value) is type(c) and value == c for c in get_args(choice))
        elif origin is list:
            ok = isinstance(value, list) and all(fits(v, get_args(choice)[0]) for v in value)
        elif origin is dict:
            key, item = get_args(choice)
            ok = isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
        elif choice is float:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif choice is Any:
            ok = True
        else:
            ok = type(value) is choice
        if ok:
            return True
    return False


def describe(annotation: Any) -> str:
    """Name a type for messages and help: `a whole number`, `one of a, b`."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    found = []
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if origin is Literal:
            found.append("one of " + ", ".join(str(c) for c in get_args(choice)))
        elif origin is list:
            found.append(f"a list, each {describe(get_args(choice)[0])}")
        elif origin is dict:
            key, item = get_args(choice)
            found.append(f"a mapping from {describe(key)} to {describe(item)}")
        else:
            found.append(names.get(choice, "any value"))
    return " or ".join(f for f in found if f != "null")


def check(parameter: Parameter, value: Any) -> str | None:
    """Return what is wrong with `value`, None where it is right."""
    if not fits(value, parameter.annotation):
        shown = f"{value!r}" if not isinstance(value, str) else f"{value!r} (text)"
        return f"{parameter.name} is {shown}, expected {describe(parameter.annotation)}"
    low, high = parameter.param.minimum, parameter.param.maximum
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            return f"{parameter.name} is {value}, expected a finite number"
        if low is not None and value < low:
            return f"{parameter.name} is {value}, expected at least {low:g}"
        if high is not None and value > high:
            return f"{parameter.name} is {value}, expected at most {high:g}"
    return None


def schema_of(annotation: Any, param: Param | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 7) of an annotation."""
    basic = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    found: list[dict[str, Any]] = []
    for choice in _choices(annotation):
        origin = get_origin(choice)
        if origin is Literal:
            found.append({"enum": list(get_args(choice))})
        elif origin is list:
            found.append({"type": "array", "items": schema_of(get_args(choice)[0])})
        elif origin is dict:
            found.append({"type": "object", "additionalProperties": schema_of(get_args(choice)[1])})
        elif choice in basic:
            entry: dict[str, Any] = {"type": basic[choice]}
            if param is not None and choice in (int, float):
                if param.minimum is not None:
                    entry["minimum"] = param.minimum
                if param.maximum is not None:
                    entry["maximum"] = param.maximum
            found.append(entry)
        else:
            found.append({})
    return found[0] if len(found) == 1 else {"anyOf": found}


def from_text(parameter: Parameter, text: str) -> Any:
    """Read a value from a command line: a YAML scalar or flow value, `3,5` for a list. Raises ValueError."""
    from moesurgery.yaml_strict import parse_text

    kinds = [get_origin(c) or c for c in _choices(parameter.annotation)]
    candidates: list[Any] = []
    if list in kinds and not text.lstrip().startswith(("[", "{")):
        candidates.append([parse_text(part) for part in text.split(",") if part.strip()])
    candidates.append(parse_text(text))
    candidates.append(text)
    for candidate in candidates:
        if fits(candidate, parameter.annotation):
            problem = check(parameter, candidate)
            if problem:
                raise ValueError(problem)
            return candidate
    raise ValueError(f"{text!r} is not {describe(parameter.annotation)}")
