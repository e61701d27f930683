"""Bytes of plain floats to numpy arrays and back, with one rounding: arithmetic that imports no torch.

Arrays are float32, or float64 where the stored type is F64. torch takes seconds and 200 MB to import; numpy reads and
rounds bf16 about as fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.checkpoint.decode import decode
from moesurgery.checkpoint.dtypes import CONFIG_NAMES
from moesurgery.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

# The largest number of each type, and from where a wider one is rounded to infinity.
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38, "F64": 1.7976931348623157e308}
_BF16_END = 3.3961775292304957e38


class NotFiniteError(RefusedError):
    """A tensor would hold numbers that are not finite and that nothing it is made of holds.

    `at` is the offset in bytes of such a number in what was to be written.
    """

    def __init__(self, what: str, hint: str, tensor: str = "a tensor", at: int = 0) -> None:
        super().__init__(f"{tensor} holds {what}", hint)
        self.what, self.at = what, at

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, str | None]]:
        return RefusedError, (self.message, self.hint)

    def of(self, tensor: str) -> NotFiniteError:
        """Return the error with the name of the tensor."""
        return NotFiniteError(self.what, self.hint or "", tensor)


def beyond(dtype: str, tensor: str = "a tensor", at: int = 0) -> NotFiniteError:
    """Return the error for finite numbers that would become infinite as `dtype`."""
    wider = {"F16": "bfloat16 or float32", "BF16": "float32"}.get(dtype, "float64")
    return NotFiniteError(
        f"numbers that {CONFIG_NAMES[dtype]} cannot: beyond {LARGEST[dtype]:.6g}",
        f"use {wider}, or a smaller factor; `moesurgery validate --level values` finds extreme weights",
        tensor,
        at,
    )


def decoded(data: memoryview | bytes, dtype: str) -> np.ndarray:
    """Return the values of little-endian `data`, flat, in memory of their own."""
    import numpy as np

    if dtype == "F64":
        return np.frombuffer(data, "<f8").copy()
    return decode(data, dtype, (-1,))


def encoded(values: np.ndarray, dtype: str, *, strict: bool = False) -> memoryview:
    """Return the bytes of `values` rounded to `dtype`, to nearest even. A NaN stays a NaN.

    Beyond the range of `dtype` is infinity, as in torch, or with `strict` a NotFiniteError.
    """
    import numpy as np
    from ml_dtypes import bfloat16

    flat = values.reshape(-1)
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):
            high = flat.max() if len(flat) else 0.0  # one pass over what seldom holds a NaN
            strange = np.isnan(high)
            large = strict and bool(strange or max(high, -flat.min(initial=0.0)) >= _BF16_END)
            if large and bool((np.isfinite(flat) & (np.abs(flat) >= _BF16_END)).any()):
                raise beyond(dtype)
            out = np.ascontiguousarray(flat, np.float32).astype(bfloat16).view(np.uint16)
        if strange:
            out[np.isnan(flat)] = 0x7FC0  # as torch has it, whatever the sign
    else:
        try:
            with np.errstate(over="raise" if strict else "ignore", invalid="ignore"):
                out = np.ascontiguousarray(flat, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
        except FloatingPointError:
            raise beyond(dtype) from None
    return out.view(np.uint8).data


def rounded(values: np.ndarray, dtype: str, *, strict: bool = False) -> np.ndarray:
    """Return `values` as they are after being stored as `dtype` and read again; `strict` as in `encoded`."""
    kept = {"F64": "float64", "F32": "float32"}.get(dtype)
    if kept is None or (strict and values.dtype != kept):
        return decoded(encoded(values, dtype, strict=strict), dtype)
    return values.astype(kept, copy=False)


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
