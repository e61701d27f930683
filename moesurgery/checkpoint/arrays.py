"""Bytes of tensors to numpy arrays and back, with one rounding: arithmetic that imports no torch.

torch takes seconds and 200 MB to import; numpy reads and rounds bf16 about as fast.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from moesurgery.checkpoint.block_values import block_values, quantised_blocks
from moesurgery.checkpoint.dtypes import BLOCKS, CONFIG_NAMES
from moesurgery.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_NARROW_INTEGERS = {"I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "u1"}  # exact in float32
_WIDE_INTEGERS = {"I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4"}
_EIGHT_BIT_FLOATS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
# The largest number of each type, and from where a wider one is rounded to infinity.
LARGEST_FINITE = {
    "F16": 65504.0,
    "BF16": 3.3895313892515355e38,
    "F32": 3.4028234663852886e38,
    "F64": 1.7976931348623157e308,
}
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
        f"numbers that {CONFIG_NAMES[dtype]} cannot: beyond {LARGEST_FINITE[dtype]:.6g}",
        f"use {wider}, or a smaller factor; `moesurgery validate --level values` finds extreme weights",
        tensor,
        at,
    )


def decoded(data: memoryview | bytes, dtype: str) -> np.ndarray:
    """Return the values of little-endian `data`, flat, in memory of their own: float32, of F64 float64.

    Raises ValueError for types whose values need a scale (packed integers, 8-bit floats).
    """
    import numpy as np

    if dtype in BLOCKS:
        return block_values(data, dtype)
    if dtype == "F64":
        return np.frombuffer(data, "<f8").copy()
    if dtype == "BF16":
        from ml_dtypes import bfloat16

        return np.frombuffer(data, bfloat16).astype(np.float32)
    stored = (_FLOATS | _NARROW_INTEGERS | _WIDE_INTEGERS).get(dtype)
    if stored is None or dtype in ("U16", "U32", "U64"):
        raise ValueError(f"{dtype} has no values without its scales")
    return np.frombuffer(data, stored).astype(np.float32)


def numbers(data: bytes | memoryview, dtype: str) -> np.ndarray | None:
    """Return the numbers that `data` holds, flat, as float32 or float64, whatever scales they take.

    None for types that are smaller than a byte, and for complex numbers.
    """
    import numpy as np

    if dtype in _WIDE_INTEGERS:
        return np.frombuffer(data, _WIDE_INTEGERS[dtype]).astype(np.float64)
    if dtype in _EIGHT_BIT_FLOATS:
        return np.take(_eight_bit_values(dtype), np.frombuffer(data, np.uint8))
    if dtype in _NARROW_INTEGERS:
        return np.frombuffer(data, _NARROW_INTEGERS[dtype]).astype(np.float32)
    return decoded(data, dtype) if dtype == "BF16" or dtype in _FLOATS or dtype in BLOCKS else None


@cache
def _eight_bit_values(dtype: str) -> np.ndarray:
    """Return the float32 value of each of the 256 codes: looking them up is more than twice as fast as converting."""
    import ml_dtypes
    import numpy as np

    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, _EIGHT_BIT_FLOATS[dtype]))
    return np.asarray(codes, np.float32)


def encoded(values: np.ndarray, dtype: str, *, strict: bool = False) -> memoryview:
    """Return the bytes of `values` rounded to `dtype`, to nearest even. A NaN stays a NaN.

    Beyond the range of `dtype` is infinity, as in torch, or with `strict` a NotFiniteError.
    """
    import numpy as np
    from ml_dtypes import bfloat16

    flat = values.reshape(-1)
    if dtype in BLOCKS:
        return quantised_blocks(flat, dtype)
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):
            high = flat.max() if len(flat) else 0.0  # one pass over what seldom holds a NaN
            not_a_number = np.isnan(high)
            large = strict and bool(not_a_number or max(high, -flat.min(initial=0.0)) >= _BF16_END)
            if large and bool((np.isfinite(flat) & (np.abs(flat) >= _BF16_END)).any()):
                raise beyond(dtype)
            out = np.ascontiguousarray(flat, np.float32).astype(bfloat16).view(np.uint16)
        if not_a_number:
            out[np.isnan(flat)] = 0x7FC0  # as torch has it, whatever the sign
    else:
        try:
            with np.errstate(over="raise" if strict else "ignore", invalid="ignore"):
                out = np.ascontiguousarray(flat, _FLOATS[dtype])
        except FloatingPointError:
            raise beyond(dtype) from None
    return out.view(np.uint8).data


def rounded(values: np.ndarray, dtype: str, *, strict: bool = False) -> np.ndarray:
    """Return `values` as they are after being stored as `dtype` and read again; `strict` as in `encoded`."""
    kept = {"F64": "float64", "F32": "float32"}.get(dtype)
    if kept is None or (strict and values.dtype != kept):
        return decoded(encoded(values, dtype, strict=strict), dtype)
    return values.astype(kept, copy=False)


def multiplied(data: memoryview, dtype: str, factor: float) -> memoryview:
    """Return the bytes of the plain floats in `data` times `factor`, with one rounding to nearest even.

    They are those of torch's `(x.float() * factor).to(dtype)` for every finite value and infinity. A NaN stays a NaN.
    """
    import numpy as np
    from ml_dtypes import bfloat16

    stored = np.dtype(bfloat16 if dtype == "BF16" else _FLOATS[dtype])
    computed = np.dtype("<f8" if dtype == "F64" else "<f4")
    with np.errstate(all="ignore"):  # what writes the product looks for overflow
        values = np.frombuffer(data, stored).astype(computed)
        values *= computed.type(factor)
        return values.astype(stored, copy=False).view(np.uint8).data


# Of each type the bytes of an element, and the bits from which on a positive number is no finite one.
_INFINITY = {"F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F800000), "F64": (8, 0x7FF0000000000000)}


def holds_odd_bits(data: memoryview, dtype: str) -> bool:
    """Whether values of a floating type, by their bits, hold NaN or infinity: two passes over integers."""
    import numpy as np

    if dtype not in _INFINITY or not len(data):
        return False
    size, infinity = _INFINITY[dtype]
    # Signed, the largest is the largest positive number; unsigned, the negative one of the largest size.
    high, low = np.frombuffer(data, f"<i{size}").max(), np.frombuffer(data, f"<u{size}").max()
    return bool(high >= infinity or low >= infinity | 1 << 8 * size - 1)


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
