"""Random numbers that depend on a key and the position alone, not on order, threads or chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.arrays import rounded
from moesurgery.expr.elementwise import narrowed
from moesurgery.expr.nodes import Expr, Reader

if TYPE_CHECKING:
    import numpy as np
    import torch

NORMAL_BLOCK = 1 << 16


@dataclass(frozen=True)
class _Drawn(Expr):
    """Random numbers that depend on `key` and the position alone, not on order, threads or chunks.

    Make the key from the recipe's seed and the tensor's name: `random_key(seed, name)`.
    """

    scale: float
    key: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def chunk_multiple(self) -> int:
        return NORMAL_BLOCK

    @staticmethod
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` float32 numbers, to be multiplied by `scale`."""
        raise NotImplementedError

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        import numpy as np

        numbers = []
        for block in range(start // NORMAL_BLOCK, -(-stop // NORMAL_BLOCK)):
            first, last = block * NORMAL_BLOCK, min((block + 1) * NORMAL_BLOCK, stop)
            drawn = self.draw(np.random.Generator(np.random.Philox(key=(self.key, block))), last - first)
            numbers.append(drawn[max(start - first, 0) :])
        return np.concatenate(numbers) * np.float32(self.scale)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return narrowed(torch.from_numpy(self._numbers(start, stop)), self.dtype)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        return rounded(self._numbers(start, stop), self.dtype, strict=True)


@dataclass(frozen=True)
class Normal(_Drawn):
    """N(0, scale^2) numbers."""

    @staticmethod
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        import numpy as np

        return generator.standard_normal(count, dtype=np.float32)


@dataclass(frozen=True)
class Uniform(_Drawn):
    """Numbers between -scale and scale."""

    @staticmethod
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        import numpy as np

        return generator.random(count, dtype=np.float32) * 2 - 1


def random_key(seed: int, name: str) -> int:
    """Return a 64-bit key for the random numbers of one tensor."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
