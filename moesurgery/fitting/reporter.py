"""Where work that takes long says what it does. Nothing in this package prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesurgery.forward.engine import Progress


@contextmanager
def _unseen(what: str, total: int) -> Iterator[Progress]:
    yield lambda count: None


@dataclass(frozen=True)
class Reporter:
    """Callbacks: `note` takes a line; `progress(what, total)` is open while something goes on.

    It gives a function that takes how much has been done since the last call, of `total`. Where there is
    `layer_progress(what, tokens, layers)`, it is open instead while tokens go through layers, and counts their product.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _unseen
    layer_progress: Callable[[str, int, int], AbstractContextManager[Progress]] | None = None

    def through_layers(self, what: str, tokens: int, layers: int) -> AbstractContextManager[Progress]:
        """Say how far `tokens` have come through `layers`, counted as tokens times layers."""
        if self.layer_progress is None:
            return self.progress(what, tokens * layers)
        return self.layer_progress(what, tokens, layers)


SILENT = Reporter()
