"""JSON read strictly and written so that it can always be read again.

Python's own reader lets a repeated key win silently and follows any depth until the stack ends; its writer
fails on half of a surrogate pair, which a config may hold, and writes NaN and Infinity, which are no JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

_MAX_DEPTH = 100
# Strings, and outside of them the literals that only Python's parser accepts as numbers.
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
# A number that is larger than any parser holds is read as infinity, and is JSON; for NaN there is nothing.
_WRITTEN = {"Infinity": "1e999", "-Infinity": "-1e999", "NaN": "null"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Duplicates(dict[str, Any]):
    """A JSON object that records its repeated keys."""

    repeated: tuple[str, ...] = ()


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json: keeps the last value and records repeated keys."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = _Duplicates(pairs)
    seen: set[str] = set()
    marked.repeated = tuple(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
    return marked


def repeated_keys(value: object) -> tuple[str, ...]:
    """Return the keys that were repeated in the JSON object `value`."""
    return value.repeated if isinstance(value, _Duplicates) else ()


def parse_json(data: bytes, *, config: bool = False) -> Any:
    """Parse JSON strictly. Raises ValueError.

    `config`: what Python writes and copies: NaN and Infinity are allowed, the depth is bounded.
    """

    def constant(name: str) -> float:
        if not config:
            raise ValueError(f"{name} is not JSON")
        return float(name)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_object, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if config and _deeper_than(value, _MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether `value` nests more than `limit` objects and lists: what copies or prints it would overflow the stack."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += [v for v in part.values() if type(v) in _NESTING]
            elif isinstance(part, list):
                inner += [v for v in part if type(v) in _NESTING]
        if not inner:
            return False
        level = inner
    return True


_NESTING = frozenset({dict, list, _Duplicates})


def constants(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, literal) for every NaN, Infinity and -Infinity outside the strings of JSON text."""
    line, at = 1, 0
    for match in _CONSTANT.finditer(text):
        if match[0] in _WRITTEN:
            line, at = line + text.count("\n", at, match.start()), match.start()
            yield line, match[0]


def not_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted key, number) for every NaN and infinity in a JSON value."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from not_finite(inner, f"{path}.{key}" if path else str(key))


def write_json(value: Any) -> str:
    """Return `value` as readable JSON text with a final newline; non-ASCII characters stay as they are.

    Infinity is written as 1e999, which every reader takes for it, and NaN as null.
    """
    return _encodable(_dumped(value, indent=2, ensure_ascii=False)) + "\n"


def compact_json(value: Any) -> str:
    """Return `value` as JSON text without spaces, otherwise as `write_json` does."""
    return _encodable(_dumped(value, separators=(",", ":"), ensure_ascii=False))


def ascii_json(value: Any, indent: int | None = 2) -> str:
    """Return `value` as JSON text in ASCII, otherwise as `write_json` does: for a terminal or a log."""
    return _dumped(value, indent=indent)


def _dumped(value: Any, **how: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return _CONSTANT.sub(lambda match: _WRITTEN.get(match[0], match[0]), json.dumps(value, **how))


def _encodable(text: str) -> str:
    """Escape halves of surrogate pairs, which UTF-8 cannot hold."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
