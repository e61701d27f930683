"""Validation of the metadata of measurement files when they are read: they may be damaged or untrusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moesurgery.checkpoint.strict_json import parse_json
from moesurgery.escape import one_line


class EntryRule(NamedTuple):
    """What an entry must be, in words and as a test."""

    what: str
    fits: Callable[[Any], bool]


A_TEXT = EntryRule("text", lambda v: isinstance(v, str))
COUNT = EntryRule("a whole number", lambda v: type(v) is int and 0 <= v < 2**53)
NUMBER = EntryRule("a finite number", lambda v: type(v) in (int, float) and abs(v) < 2**1000 and math.isfinite(v))
ANY_NUMBER = EntryRule("a number", lambda v: NUMBER.fits(v) or (type(v) is float and not math.isfinite(v)))
SWITCH = EntryRule("true or false", lambda v: type(v) is bool)


def listed(rule: EntryRule) -> EntryRule:
    """Return the rule of a list of what fits `rule`."""
    return EntryRule(f"a list, each {rule.what}", lambda v: isinstance(v, list) and all(map(rule.fits, v)))


def mapping_to(rule: EntryRule) -> EntryRule:
    """Return the rule of an object whose values fit `rule`."""
    return EntryRule(
        f"an object, each entry {rule.what}", lambda v: isinstance(v, dict) and all(map(rule.fits, v.values()))
    )


def maybe(rule: EntryRule) -> EntryRule:
    """Return the rule of null or what fits `rule`."""
    return EntryRule(f"{rule.what} or null", lambda v: v is None or rule.fits(v))


FILES = EntryRule(
    "a list of files with their names",
    lambda v: isinstance(v, list) and all(isinstance(e, dict) and isinstance(e.get("file"), str) for e in v),
)


def read_document(
    data: bytes | str, rules: Mapping[str, EntryRule], optional: Mapping[str, EntryRule]
) -> dict[str, Any]:
    """Parse a JSON object and check its entries. Raises ValueError with the entry and what is wrong."""
    document = parse_json(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data, config=True)
    check_entries(document, rules, optional)
    checked: dict[str, Any] = document
    return checked


def check_entries(
    document: Any, rules: Mapping[str, EntryRule], optional: Mapping[str, EntryRule], where: str = ""
) -> None:
    """Raise ValueError where an entry is missing or of another kind; entries without a rule are ignored."""
    if not isinstance(document, dict):
        raise ValueError(f"{where}it is not a JSON object")
    for key, rule in {**optional, **rules}.items():
        if key not in document:
            if key in rules:
                raise ValueError(f"{where}{key} is missing")
        elif not rule.fits(document[key]):
            raise ValueError(f"{where}{key} is {one_line(repr(document[key]), 80)}, expected {rule.what}")
