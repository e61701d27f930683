"""Bytes of plain tensors as float32 numpy arrays, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of little-endian `data`. Raises ValueError for packed and 8-bit float types."""
    import numpy as np

    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32).reshape(shape)
    if dtype not in _NUMPY:
        raise ValueError(f"{dtype} has no values without its scales")
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float32).reshape(shape)
