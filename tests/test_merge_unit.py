"""What a thread holds of a unit between passes: nothing is read twice where it is small, and no byte is another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from moesurgery.merge import unit
from moesurgery.merge.merged import Merged
from moesurgery.merge.method import find_method, methods, per_model, scalar
from moesurgery.plan.expr import Reader
from moesurgery.plan.reader import FileReader
from moesurgery.plan.tensors import Values
from moesurgery.surgery.parameters import MISSING

SHAPE = (700, 513)  # two chunks
GIVEN: dict[str, Any] = {
    "weight": (0.6, 0.3),
    "t": 0.3,
    "density": (0.4, 0.7),
    "select_topk": 0.4,
    "nuslerp_flatten": True,
}


@dataclass(frozen=True)
class Counted(Values):
    """Values that count how often each part is asked for."""

    number: int = 0

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        asked[self.number, start, stop] += 1
        return super().array(start, stop, reader)


asked: Counter[tuple[int, int, int]] = Counter()


def merge(name: str) -> Merged:
    """Return a merge of two models, and of a base where the method takes one, by fixed parameters."""
    method = find_method(name)
    random = np.random.Generator(np.random.PCG64(5))
    base = random.standard_normal(SHAPE)
    inputs = [
        Counted((base + 0.1 * i * random.standard_normal(SHAPE)).astype(np.float32).tobytes(), "F32", SHAPE, i)
        for i in range(3)
    ]
    values: dict[str, Any] = {}
    for key, parameter in method.parameters.items():
        default = scalar(parameter).default
        value = GIVEN.get(key, MISSING)
        if value is MISSING:
            value = (default, default) if per_model(parameter) else default
        values[key] = value[0] if isinstance(value, tuple) and not per_model(parameter) else value
    own_base = inputs[0] if method.base in ("required", "optional") else None
    key = 77 if method.random else 0
    return Merged(name, tuple(inputs[1:]), own_base, tuple(values.items()), "F32", SHAPE, "a.weight", key)


def written(expr: Merged) -> bytes:
    """Evaluate in two parts, as two units of work of one thread."""
    reader = FileReader()
    half = expr.numel // expr.granule // 2 * expr.granule
    return b"".join(bytes(expr.raw(*part, reader)) for part in ((0, half), (half, expr.numel)) if part[0] < part[1])


SEVERAL_PASSES = [n for n, m in methods().items() if m.kind in ("combination", "streamed") and m.models[0] <= 2]


@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_what_is_held_changes_no_byte(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = written(merge(name))
    monkeypatch.setattr(unit, "HELD_BYTES", 0)
    assert written(merge(name)) == found


@pytest.mark.parametrize("name", ["slerp", "karcher", "model_stock", "dare_ties"])
def test_small_units_are_read_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked.clear()
    expr = merge(name)
    reader = FileReader()
    expr.raw(0, expr.numel, reader)
    assert set(asked.values()) == {1}
    assert reader.held is None or reader.held[1] == {}  # nothing stays
    if name == "dare_ties":  # which looks once
        return
    asked.clear()
    monkeypatch.setattr(unit, "HELD_BYTES", 0)
    expr = merge(name)
    expr.raw(0, expr.numel, FileReader())
    assert set(asked.values()) == {2}


def test_a_thread_holds_one_unit_at_a_time() -> None:
    reader = FileReader()
    first, second = merge("slerp"), merge("ties")
    first.raw(0, first.numel // 2, reader)
    second.raw(0, second.numel // 2, reader)
    assert reader.held is not None
    assert reader.held[0] is second._memo
    assert first.raw(0, first.numel, reader) == merge("slerp").raw(0, first.numel, FileReader())
