"""Values of small expressions while planning: routers, norms, samples of an embedding. No torch for stored ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import decoded
from moesurgery.checkpoint.file_reader import FileReader, as_bytes
from moesurgery.checkpoint.read_ahead import read_remote
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Copy, Expr, Slice

if TYPE_CHECKING:
    import numpy as np


def values_of(expr: Expr, rows: tuple[int, int] | None = None) -> np.ndarray:
    """Return an expression's values (or those of rows `start:stop`) as float32.

    Raises CheckpointError where a source ends early, RefusedError for packed or 8-bit values.
    """
    if rows is not None:
        expr = Slice(expr, *rows)
    data = b"".join(_bytes_of(expr))
    try:
        return decoded(data, expr.dtype).astype("float32", copy=False).reshape(expr.shape)
    except ValueError as error:
        name = next((s.info.name for s in expr.stored()), "?")
        raise RefusedError(f"the values of {name} cannot be read: {error}") from None


def finite_values(name: str, expr: Expr) -> np.ndarray:
    """Return the values of the tensor `name`, from which something is decided, as float32.

    Raises RefusedError where some are NaN or infinite, and what `values_of` raises.
    """
    import numpy as np

    values = values_of(expr)
    if count := values.size - int(np.isfinite(values).sum()):
        raise RefusedError(
            f"{name} holds {count:,} numbers that are not finite, so nothing can be decided by it",
            "`moesurgery validate --level values` finds all such tensors",
        )
    return values


def _bytes_of(expr: Expr) -> list[bytes]:
    chunks: list[bytes] = []
    for piece in expr.pieces():
        if isinstance(piece, Copy):
            chunks.append(read_remote(piece.source, piece.file, piece.start, piece.nbytes))
            continue
        reader = FileReader()
        try:
            if piece.expr.numpy_only:
                chunks.append(bytes(piece.expr.raw(piece.start, piece.stop, reader)))
            else:
                chunks.append(bytes(as_bytes(piece.expr.evaluate(piece.start, piece.stop, reader))))
            reader.check()
        finally:
            reader.close()
    return chunks
