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
    """Two callbacks: `note` takes a line; `progress(what, total)` is open while something goes on.

    It gives a function that takes how much has been done since the last call, of `total`.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _unseen


SILENT = Reporter()
