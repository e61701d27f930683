"""The bytes of an expression, computed by the very code that writes shards, in pieces of a few megabytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from moesurgery.expr.nodes import Expr
from moesurgery.write.shard import Worker
from moesurgery.write.shard_units import units_of


class Recomputer:
    """Computes expressions again, without a file: to compare them with what was written."""

    def __init__(self) -> None:
        self._worker = Worker(threading.Event())
        self._scratch = os.memfd_create("moesurgery")

    def close(self) -> None:
        self._worker.close()
        os.close(self._scratch)

    def pieces(self, name: str, expr: Expr) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the tensor, bytes) in order.

        Raises CheckpointError where a source cannot be read, and whatever an expression refuses.
        """
        for piece, at in units_of(((name, expr),), 0):
            self._worker.perform(piece, self._scratch, 0)
            yield at, os.pread(self._scratch, piece.nbytes, 0)
