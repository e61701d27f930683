"""The element types of the safetensors format and their sizes. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Bits per element, by the name that a safetensors header uses (format as of safetensors 0.8).
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

# The types on which arithmetic has a meaning without a companion scale.
PLAIN_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})

# What `--dtype` accepts, and what config.json calls it.
BY_CONFIG_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
CONFIG_NAMES = {code: name for name, code in BY_CONFIG_NAME.items()}
COMMON_DTYPES = ("float32", "bfloat16", "float16")  # those that models are trained and run in


def element_count(shape: Sequence[int]) -> int:
    """Return the number of elements of `shape`; 1 for a scalar."""
    return math.prod(shape)


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes in a file.

    Raises ValueError where a sub-byte type does not fill whole bytes.
    """
    bits = BITS[dtype] * element_count(shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8
