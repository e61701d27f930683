"""Callbacks for messages and progress. Nothing in this package prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesurgery.forward.batch_passes import Progress


@contextmanager
def _unseen(what: str, total: int) -> Iterator[Progress]:
    yield lambda count: None


@dataclass(frozen=True)
class Reporter:
    """Callbacks: `note` takes a line; `progress(what, total)` is a context manager for one task.

    It yields a function that takes the amount done since the last call, of `total`. Where there is
    `layer_progress(what, tokens, layers)`, it is used instead for passes over layers, and counts tokens times layers.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _unseen
    layer_progress: Callable[[str, int, int], AbstractContextManager[Progress]] | None = None

    def through_layers(self, what: str, tokens: int, layers: int) -> AbstractContextManager[Progress]:
        """Report progress of `tokens` in `layers`, counted as tokens times layers."""
        if self.layer_progress is None:
            return self.progress(what, tokens * layers)
        return self.layer_progress(what, tokens, layers)


SILENT = Reporter()
