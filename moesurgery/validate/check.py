"""What a check is: a small function that yields findings, and says what it could not look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.validate.codes import CODES, Level

if TYPE_CHECKING:
    from moesurgery.validate.context import Context


@dataclass(frozen=True)
class NotChecked:
    """Something that was asked for and could not be looked at: never passed over in silence."""

    codes: tuple[str, ...]
    reason: str


Outcome = Iterator[Finding | NotChecked]


@dataclass(frozen=True)
class Check:
    """A check with the codes that it may yield."""

    codes: tuple[str, ...]
    level: Level
    function: Callable[[Context], Outcome]


CHECKS: list[Check] = []


def check(
    *codes: str, level: Level | None = None
) -> Callable[[Callable[[Context], Outcome]], Callable[[Context], Outcome]]:
    """Register a function as the check for `codes`; it runs at `level`, or at the level of the first."""

    def register(function: Callable[[Context], Outcome]) -> Callable[[Context], Outcome]:
        CHECKS.append(Check(codes, level or CODES[codes[0]].level, function))
        return function

    return register


def finding(
    code: str,
    message: str,
    file: str | None = None,
    tensor: str | None = None,
    *,
    hint: str | None = None,
    severity: Severity | None = None,
) -> Finding:
    """Return a finding, of the code's usual severity unless another is given."""
    return Finding(code, message, file, tensor, hint, severity or CODES[code].severity)


def and_more(names: list[str]) -> str:
    """Say how many others a finding about the first of `names` stands for."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
