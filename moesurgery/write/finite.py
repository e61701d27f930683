"""NaN and infinity in what is written: refused where nothing that it is made of holds any.

What a source holds is not ours to judge (`validate` says it); what arithmetic makes of finite numbers is. Looking at
the bits of what is written costs two passes over integers; the inputs are read again only where something is odd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import NotFiniteError, beyond, decoded, holds_odd_bits, numbers
from moesurgery.checkpoint.file_reader import read_remote
from moesurgery.checkpoint.source import Source
from moesurgery.expr.nodes import Expr, Stored

if TYPE_CHECKING:
    import numpy as np

_PART = 4 << 20


class FiniteCheck:
    """Looks at what one thread writes, and remembers which inputs hold numbers that are not finite."""

    def __init__(self) -> None:
        self._odd: dict[tuple[Source, str, int], bool] = {}

    def check(self, data: memoryview, expr: Expr) -> None:
        """Raise NotFiniteError where `data`, values of `expr`, hold NaN or infinity, and no tensor it reads does."""
        if not holds_odd_bits(data, expr.dtype) or any(self._is_odd_input(stored) for stored in expr.stored()):
            return
        raise _error(decoded(data, expr.dtype), expr.dtype, len(data))

    def _is_odd_input(self, stored: Stored) -> bool:
        key = (stored.source, stored.info.file, stored.info.start)
        if key not in self._odd:
            self._odd[key] = _holds_odd(stored)
        return self._odd[key]


def _holds_odd(stored: Stored) -> bool:
    import numpy as np

    for at in range(0, stored.info.nbytes, _PART):
        length = min(_PART, stored.info.nbytes - at)
        values = numbers(read_remote(stored.source, stored.info.file, stored.info.start + at, length), stored.dtype)
        if values is not None and not np.isfinite(values).all():
            return True
    return False


def _error(values: np.ndarray, dtype: str, nbytes: int) -> NotFiniteError:
    import numpy as np

    first = int(np.flatnonzero(~np.isfinite(values))[0])
    at = first * nbytes // len(values)
    if not np.isnan(values[first]):
        return beyond(dtype, at=at)
    return NotFiniteError(
        "NaN, and nothing that it is made of does",
        "look at the weights and factors of the recipe: something is divided by zero, or larger than float32 holds",
        at=at,
    )
