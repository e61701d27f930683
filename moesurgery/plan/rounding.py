"""How far quantised matrices are from the numbers that they were made of, recorded while they are written.

The error of a matrix is ‖q - x‖ / ‖x‖, q being what its codes stand for. It is measured on all rows of matrices of up
to 65,536 numbers, and on every eighth row of larger ones. A record is plain data, by form: how many `matrices`, the
`mean` of their errors, the `largest` and the tensor that has it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from moesurgery.checkpoint.file_reader import FileReader

Rounding = dict[str, dict[str, Any]]
_LONGEST_NAME = 200


class RoundingRecord:
    """Sums of squares, added to by the threads that write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str, int], dict[int, tuple[float, float]]] = {}

    def add(self, form: str, name: str, matrix: int, row: int, squares: tuple[float, float]) -> None:
        """Add the sums of (q - x)^2 and of x^2 over the rows of a matrix that begin with `row`."""
        with self._lock:
            self._sums.setdefault((form, name, matrix), {})[row] = squares

    def summary(self) -> Rounding:
        """Return the record, the same for any order of additions."""
        found: dict[str, list[tuple[float, str]]] = {}
        for (form, name, _), parts in sorted(self._sums.items()):
            error, size = (math.fsum(part[i] for part in parts.values()) for i in range(2))
            found.setdefault(form, []).append((math.sqrt(error / size) if size else 0.0, name))
        return {form: _entry(errors) for form, errors in found.items()}


class RecordingReader(FileReader):
    """A reader for what is written: quantised matrices add their rounding to its record."""

    def __init__(self, record: RoundingRecord) -> None:
        super().__init__()
        self.record = record


def _entry(errors: list[tuple[float, str]]) -> dict[str, Any]:
    largest, name = max(errors, key=lambda each: each[0])
    mean = math.fsum(error for error, _ in errors) / len(errors)
    # Three digits: the last bits of a sum are those of the machine.
    entry: dict[str, Any] = {"matrices": len(errors), "mean": float(f"{mean:.3g}"), "largest": float(f"{largest:.3g}")}
    return entry | {"tensor": name[:_LONGEST_NAME]}


def together(records: Iterable[Mapping[str, Mapping[str, Any]]]) -> Rounding:
    """Return the record of several shards as one."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for form, entry in record.items():
            found.setdefault(form, []).append(entry)
    whole: Rounding = {}
    for form, entries in sorted(found.items()):
        count = sum(e["matrices"] for e in entries)
        mean = sum(e["mean"] * e["matrices"] for e in entries) / count
        worst = max(entries, key=lambda e: e["largest"])
        whole[form] = {**worst, "matrices": count, "mean": float(f"{mean:.3g}")}
    return whole


def rounding_lines(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in words what a record says."""
    return [
        f"{entry['matrices']:,} matrices in {form} are rounded by {100 * entry['mean']:.3g} % of their norm on average,"
        f" by {100 * entry['largest']:.3g} % at most ({entry['tensor']})"
        for form, entry in record.items()
    ]
