"""Losses measured so far, in a file, so that a probe that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesurgery.forward import scratch


@dataclass
class KeptLosses:
    """Losses by a name, of a probe that `about` identifies: a file with another `about` is discarded.

    Without a `path` nothing is kept. JSON keeps every bit of a float.
    """

    path: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        try:
            document = json.loads(self.path.read_text())
            if document["about"] == json.loads(json.dumps(self.about)):
                self.losses = {str(name): float(nats) for name, nats in document["losses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.losses = {}

    def add(self, losses: Mapping[str, float]) -> None:
        """Add losses; write all at most once in `scratch.SAVE_SECONDS`. Where that fails, nothing is kept."""
        self.losses |= losses
        if self.path is None or time.monotonic() - self._saved < scratch.SAVE_SECONDS:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_text(json.dumps({"about": self.about, "losses": self.losses}))
            os.replace(new, self.path)
        except OSError:
            self.path = None
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file, and the folder where nothing else is in it."""
        if self.path is None:
            return
        for file in (self.path, self.path.with_name(f"{self.path.name}.new")):
            file.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()
