"""What the threads of one shard take in turn: parts of tensors, each with its place in the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moesurgery.checkpoint.dtypes import BITS
from moesurgery.expr.nodes import Compute, Copy, Expr, Piece
from moesurgery.plan.quantised_tensors import is_scale

UNIT = 16 << 20  # bytes a thread takes from the queue at a time


def aligned(nbytes: int, alignment: int) -> int:
    """Return a size with what is left up to the next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def units_of(entries: tuple[tuple[str, Expr], ...], at: int, alignment: int = 1) -> Iterator[tuple[Piece, int]]:
    """Yield (piece, offset in the file) in units of work: neighbours joined, large pieces cut."""
    pending: Copy | None = None
    pending_at = 0
    for _, expr in entries:
        for piece in expr.pieces():
            if pending is not None and at == pending_at + pending.nbytes and _follows(piece, pending):
                pending = pending._replace(nbytes=pending.nbytes + piece.nbytes)
            else:
                if pending is not None:
                    yield from cut_piece(pending, pending_at)
                    pending = None
                if isinstance(piece, Compute):
                    yield from cut_piece(piece, at)
                else:
                    pending, pending_at = piece, at
            at += piece.nbytes
        at = aligned(at, alignment)
    if pending is not None:
        yield from cut_piece(pending, pending_at)


def scales_later(units: Iterable[tuple[Piece, int]], distance: int) -> Iterator[tuple[Piece, int]]:
    """Yield the units of work with scales of quantised weights some places after their codes, which make them too."""
    waiting: list[tuple[int, tuple[Piece, int]]] = []
    for number, unit in enumerate(units):
        if isinstance(unit[0], Compute) and is_scale(unit[0].expr):
            waiting.append((number + distance, unit))
        else:
            yield unit
        while waiting and waiting[0][0] <= number:
            yield waiting.pop(0)[1]
    yield from (unit for _, unit in waiting)


def _follows(piece: Piece, before: Copy) -> bool:
    """Whether `piece` continues `before` in the same file."""
    if isinstance(piece, Compute):
        return False
    return piece == before._replace(start=before.start + before.nbytes, nbytes=piece.nbytes)


def cut_piece(piece: Piece, at: int) -> Iterator[tuple[Piece, int]]:
    """Yield parts of a piece, of about UNIT bytes and whole multiples of `chunk_multiple`, with their places."""
    if not isinstance(piece, Compute):
        for offset in range(0, piece.nbytes, UNIT):
            length = min(UNIT, piece.nbytes - offset)
            yield piece._replace(start=piece.start + offset, nbytes=length), at + offset
        return
    bits = BITS[piece.expr.dtype]
    step = chunk_elements(piece.expr, UNIT)
    first = piece.start
    while first < piece.stop:
        last = min(piece.stop, (first // step + 1) * step)
        yield piece._replace(start=first, stop=last), at + (first - piece.start) * bits // 8
        first = last


def chunk_elements(expr: Expr, nbytes: int) -> int:
    """Return how many elements make up about `nbytes`, in whole multiples of `chunk_multiple`."""
    wanted = int(max(1, nbytes * 8 // BITS[expr.dtype]))
    return max(1, wanted // expr.chunk_multiple) * expr.chunk_multiple
