"""Random numbers by key and position, so that they are the same whatever the chunks and the threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 1 << 15  # numbers that are made at a time


class RandomBits:
    """Random numbers of one key, for each model and position; not for several threads at once."""

    def __init__(self, key: int) -> None:
        import numpy as np

        self.key = key
        self._generator = np.random.Philox(key=(key, 0))
        self._state: Any = self._generator.state

    def numbers(self, model: int, start: int, stop: int) -> np.ndarray:
        """Return the numbers (U16, evenly distributed) of the positions `start:stop`, at least one."""
        import numpy as np

        parts = []
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            numbers = self._at(model, block).random_raw(_BLOCK // 4).view("<u2")
            first = block * _BLOCK
            parts.append(numbers[max(start - first, 0) : min(stop - first, _BLOCK)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _at(self, model: int, block: int) -> np.random.Philox:
        """Return the generator of a block. Setting it costs a sixth of making one."""
        self._state["state"]["key"][:] = (self.key, model)
        self._state["state"]["counter"][:] = (0, 0, 0, block)
        self._generator.state = self._state
        return self._generator
