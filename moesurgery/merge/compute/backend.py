"""Where the arrays of a merge live and are computed: in numpy's memory, or in torch's on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.arrays import encoded
from moesurgery.expr.elementwise import narrowed
from moesurgery.expr.nodes import Expr, Reader, Stored, torch_dtype

if TYPE_CHECKING:
    import numpy as np

STEP = 1 << 18  # elements: with fewer, what each operation and each meeting of threads costs outweighs the caches
DEVICE_STEP = 1 << 22  # on an accelerator each operation must be worth its start

Array = Any  # float32, of numpy or torch


def namespace(array: Array) -> Any:
    """Return the module of functions for an array: numpy or torch. They agree on what methods use."""
    import sys

    import numpy as np

    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


class NumpyBackend:
    """Arrays are numpy's."""

    step = STEP

    def from_numpy(self, values: np.ndarray) -> Array:
        return values

    def read(self, expr: Expr, start: int, stop: int, reader: Reader) -> Array:
        """Return elements `start:stop` of an input, in float32 or float64."""
        return expr.array(start, stop, reader)

    def to_numpy(self, values: Array) -> np.ndarray:
        import numpy as np

        return np.asarray(values)

    def encoded(self, values: Array, dtype: str) -> memoryview:
        """Return the bytes of `values` rounded to `dtype`; `values` are used up."""
        return encoded(values, dtype, strict=True)


class TorchBackend:
    """Arrays are torch's, on `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step = STEP if name == "cpu" else DEVICE_STEP

    def from_numpy(self, values: np.ndarray) -> Array:
        import torch

        return torch.from_numpy(values).to(self.name)

    def read(self, expr: Expr, start: int, stop: int, reader: Reader) -> Array:
        import torch

        if not (isinstance(expr, Stored) and expr.numpy_only):
            return self.from_numpy(expr.array(start, stop, reader))
        data = torch.frombuffer(expr.raw(start, stop, reader), dtype=torch_dtype(expr.dtype))
        # A copy always: the bytes are overwritten by the next read.
        return data.to(self.name, torch.float64 if expr.dtype == "F64" else torch.float32, copy=True)

    def to_numpy(self, values: Array) -> np.ndarray:
        return values.cpu().numpy()  # type: ignore[no-any-return]

    def encoded(self, values: Array, dtype: str) -> memoryview:
        import torch

        return narrowed(values, dtype).cpu().contiguous().view(torch.uint8).numpy().data
