"""Bytes of plain tensors as float32 numpy arrays, without torch."""

from __future__ import annotations

from functools import cache
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


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of little-endian `data`. Raises ValueError for packed and 8-bit float types."""
    import numpy as np

    if dtype == "BF16":
        from ml_dtypes import bfloat16

        return np.frombuffer(data, bfloat16).astype(np.float32).reshape(shape)
    if dtype not in _NUMPY:
        raise ValueError(f"{dtype} has no values without its scales")
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float32).reshape(shape)


def numbers(data: bytes | memoryview, dtype: str) -> np.ndarray | None:
    """Return the numbers that `data` holds, flat, as float32 or float64, whatever scales they take.

    None for types that are smaller than a byte, and for complex numbers.
    """
    import numpy as np

    if dtype in ("F64", "I64", "I32", "U64", "U32"):
        return np.frombuffer(data, _WIDE[dtype]).astype(np.float64)
    if dtype in _EIGHT_BITS:
        return np.take(_eight_bits(dtype), np.frombuffer(data, np.uint8))
    if dtype == "U16":
        return np.frombuffer(data, "<u2").astype(np.float32)
    if dtype != "BF16" and dtype not in _NUMPY:
        return None
    size = 2 if dtype == "BF16" else np.dtype(_NUMPY[dtype]).itemsize
    return decode(data, dtype, (len(data) // size,))


_WIDE = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "U64": "<u8", "U32": "<u4"}
# Exponent bits, mantissa bits, bias, and the codes that are not finite: OCP 8-bit and MX specifications, and the
# "FNUZ" forms, which have one NaN in place of minus zero.
_EIGHT_BITS = {
    "F8_E4M3": (4, 3, 7),
    "F8_E5M2": (5, 2, 15),
    "F8_E4M3FNUZ": (4, 3, 8),
    "F8_E5M2FNUZ": (5, 2, 16),
    "F8_E8M0": (8, 0, 127),
}


@cache
def _eight_bits(dtype: str) -> np.ndarray:
    """Return the float32 value of each of the 256 codes of an 8-bit floating type."""
    import numpy as np

    exponent_bits, mantissa_bits, bias = _EIGHT_BITS[dtype]
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        values = np.exp2((codes - bias).astype(np.float64))
        values[255] = np.nan
        return values.astype(np.float32)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * np.exp2(exponent - float(bias)))
    values = np.where(codes & 128, -values, values)
    if dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    elif dtype == "F8_E5M2":
        values[[0x7C, 0xFC]] = [np.inf, -np.inf]
        values[[*range(0x7D, 0x80), *range(0xFD, 0x100)]] = np.nan
    else:
        values[0x80] = np.nan
    return values.astype(np.float32)
