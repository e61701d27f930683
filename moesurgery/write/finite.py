"""NaN and infinity in what is written: refused where nothing that it is made of holds any.

What a source holds is not ours to judge (`validate` says it); what arithmetic makes of finite numbers is. Looking at
the bits of what is written costs two passes over integers; the inputs are read again only where something is odd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import NotFiniteError, beyond, decoded, holds_odd_bits, numbers
from moesurgery.checkpoint.read_ahead import read_remote
from moesurgery.checkpoint.source import Source
from moesurgery.expr.elementwise import Scale
from moesurgery.expr.nodes import Expr, Reader, Stored

if TYPE_CHECKING:
    import numpy as np

_PART = 4 << 20


class FiniteCheck:
    """Looks at what one thread writes, and remembers which inputs hold numbers that are not finite."""

    def __init__(self) -> None:
        self._odd: dict[tuple[Source, str, int], bool] = {}

    def check(self, data: memoryview, expr: Expr, start: int, stop: int, reader: Reader) -> None:
        """Raise NotFiniteError where elements `start:stop` of `expr` hold NaN or infinity, and no tensor it reads does.

        `data` are these elements. What a factor makes of a tensor is compared number by number, whatever else the
        tensor holds.
        """
        if not holds_odd_bits(data, expr.dtype):
            return
        values = decoded(data, expr.dtype)
        if any(self._is_odd_input(stored) for stored in expr.stored()):
            if not isinstance(expr, Scale):
                return
            import numpy as np

            values[~np.isfinite(expr.of.array(start, stop, reader))] = 0
            if np.isfinite(values).all():
                return
        raise _error(values, expr.dtype, len(data))

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
