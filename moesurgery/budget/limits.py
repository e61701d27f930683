"""What a machine allows: memory for weights and KV cache, and where asked active parameters and decoding speed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesurgery.budget.costs import Cost
from moesurgery.errors import RecipeError

_COUNT = re.compile(r"(?i)\s*([0-9]+(?:\.[0-9]+)?)\s*([kmbt]?)\s*")
_SPEED = re.compile(r"(?i)\s*([0-9]+(?:\.[0-9]+)?)\s*(?:tok(?:ens?)?/s)?\s*")
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Limits:
    """The most bytes of weights and KV cache, the most active parameters, the least tokens per second."""

    memory: int
    active: int | None = None
    speed: float | None = None

    def allow(self, cost: Cost) -> bool:
        return not self.broken(cost)

    def broken(self, cost: Cost) -> list[str]:
        """Return the names of the limits that a model breaks: memory, active, speed."""
        wrong = ["memory"] if cost.memory > self.memory else []
        if self.active is not None and cost.active > self.active:
            wrong.append("active")
        if self.speed is not None and (cost.tokens_per_second or 0) < self.speed:
            wrong.append("speed")
        return wrong


def parse_tokens(text: str) -> int:
    """Return the tokens that `32k` (32,768) or `4096` mean. Raises RecipeError."""
    return _number(text, "context", _BINARY, "as 4096, 32k or 1M")


def parse_parameters(text: str) -> int:
    """Return the parameters that `3B` or `500M` mean. Raises RecipeError."""
    return _number(text, "active", _DECIMAL, "as 3B or 500M")


def parse_speed(text: str) -> float:
    """Return the tokens per second that `40tok/s` or `40` mean. Raises RecipeError."""
    found = _SPEED.fullmatch(text)
    if found is None or not float(found[1]):
        raise RecipeError(f"--speed is {text!r}, expected tokens per second", "as 40 or 40tok/s")
    return float(found[1])


def _number(text: str, option: str, units: dict[str, int], example: str) -> int:
    found = _COUNT.fullmatch(text)
    unit = units.get(found[2].lower()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise RecipeError(f"--{option} is {text!r}, expected a number above 0", example)
    return int(float(found[1]) * unit)
