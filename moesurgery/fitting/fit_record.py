"""The record of a search beside its output, `OUT.fit.json`: the same search is not made twice.

It holds what the search was asked, what it measured by name of shape, and the winner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.strict_json import write_json
from moesurgery.errors import OutputError
from moesurgery.fitting.heldout import HeldOut
from moesurgery.whole_file import whole_file


@dataclass(frozen=True)
class FitRecord:
    """Loss increases by name of shape, as edited and repaired; prices by axis; the criterion; what was measured.

    `further` are loss increases on `further_tokens` tokens more, of the shapes that were told apart there.
    """

    taken: str
    by: str
    prices: tuple[float, ...]
    measured: Mapping[str, float]
    repaired: Mapping[str, float]
    heldout: HeldOut
    further: Mapping[str, float]
    further_tokens: int

    def save(self, path: Path, asked: Mapping[str, Any]) -> None:
        held = self.heldout
        document = {
            "schema_version": 1,
            "asked": asked,
            "taken": self.taken,
            "by": self.by,
            "prices": list(self.prices),
            "measured": dict(self.measured),
            "repaired": dict(self.repaired),
            "heldout": {
                "tokens": held.tokens,
                "nats": dict(held.nats),
                "intervals": {name: list(ends) for name, ends in held.intervals.items()},
                "domains": {name: dict(losses) for name, losses in held.domains.items()},
                "chosen": held.chosen,
            },
            "further": dict(self.further),
            "further_tokens": self.further_tokens,
        }
        with whole_file(path) as new:
            new.write_text(write_json(document))


def read_fit_record(path: Path, asked: Mapping[str, Any]) -> FitRecord | None:
    """Return the record of the same search; None where there is none.

    Raises OutputError where the file is none, or that of another search.
    """
    if not path.exists():
        return None
    hint = "use --force to search again, or another -o"
    try:
        document = json.loads(path.read_text())
        held = document["heldout"]
        intervals = {name: (float(low), float(high)) for name, (low, high) in held["intervals"].items()}
        record = FitRecord(
            str(document["taken"]),
            str(document["by"]),
            tuple(float(price) for price in document["prices"]),
            {str(name): float(value) for name, value in document["measured"].items()},
            {str(name): float(value) for name, value in document["repaired"].items()},
            HeldOut(int(held["tokens"]), dict(held["nats"]), intervals, dict(held["domains"]), held["chosen"]),
            {str(name): float(value) for name, value in document["further"].items()},
            int(document["further_tokens"]),
        )
        before = document["asked"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} cannot be read as the record of a search: {error}", hint) from None
    differs = [name for name in {**asked, **before} if before.get(name) != json.loads(json.dumps(asked.get(name)))]
    if differs:
        raise OutputError(f"{path} is the record of another search: it differs in {', '.join(sorted(differs))}", hint)
    return record
