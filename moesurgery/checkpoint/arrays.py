"""Bytes of plain floats to numpy arrays and back, with one rounding: arithmetic that imports no torch.

Arrays are float32, or float64 where the stored type is F64. torch takes seconds and 200 MB to import; numpy reads and
rounds bf16 about as fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.decode import decode

if TYPE_CHECKING:
    import numpy as np


def decoded(data: memoryview | bytes, dtype: str) -> np.ndarray:
    """Return the values of little-endian `data`, flat, in memory of their own."""
    import numpy as np

    if dtype == "F64":
        return np.frombuffer(data, "<f8").copy()
    return decode(data, dtype, (-1,))


def encoded(values: np.ndarray, dtype: str) -> memoryview:
    """Return the bytes of `values` rounded to `dtype`, to nearest even. A NaN stays a NaN."""
    import numpy as np
    from ml_dtypes import bfloat16

    flat = values.reshape(-1)
    if dtype == "BF16":
        strange = bool(len(flat)) and np.isnan(flat.max())  # one pass over what seldom holds a NaN
        with np.errstate(invalid="ignore"):
            out = np.ascontiguousarray(flat, np.float32).astype(bfloat16).view(np.uint16)
        if strange:
            out[np.isnan(flat)] = 0x7FC0  # as torch has it, whatever the sign
    else:
        with np.errstate(over="ignore"):  # beyond the range of float16 is infinity, as in torch
            out = np.ascontiguousarray(flat, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    return out.view(np.uint8).data


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return `values` as they are after being stored as `dtype` and read again."""
    kept = {"F64": "float64", "F32": "float32"}.get(dtype)
    return values.astype(kept, copy=False) if kept else decoded(encoded(values, dtype), dtype)


def keep_freed_memory() -> None:
    """Tell malloc to keep what temporaries of a chunk give back.

    By default glibc returns arrays of this size to the kernel, and every chunk faults its pages in again, at five
    times the cost of the arithmetic.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(trim_threshold, 64 << 20)
    mallopt(mmap_threshold, 16 << 20)
