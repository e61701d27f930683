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


@contextmanager
def _unseen_layers(what: str, tokens: int, layers: int) -> Iterator[Progress]:
    yield lambda count: None


@dataclass(frozen=True)
class Reporter:
    """Three callbacks: `note` takes a line; `progress(what, total)` is open while something goes on.

    It gives a function that takes how much has been done since the last call, of `total`. So does `layer_progress(what,
    tokens, layers)`, while all tokens go through all layers, of `tokens` times `layers`.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _unseen
    layer_progress: Callable[[str, int, int], AbstractContextManager[Progress]] = _unseen_layers


SILENT = Reporter()
