"""The element types of safetensors and of GGUF, and their sizes. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

# Bits per element, by the name that a safetensors header uses (format as of safetensors 0.8).
SAFETENSORS_BITS: dict[str, int] = {
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

# Block types of GGUF: elements and bytes of a block, which never crosses rows (ggml, September 2026).
BLOCKS: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 40),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
    "Q2_0": (64, 18),
}
# The types of tensors by their number in a GGUF header; numbers that are missing are of types that were removed.
GGUF_TYPES: dict[int, str] = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 6)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), 16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}

# Bits per element of all types; of a block type a fraction, exact for whole blocks.
BITS: dict[str, int | Fraction] = {
    **SAFETENSORS_BITS,
    **{name: Fraction(8 * nbytes, elements) for name, (elements, nbytes) in BLOCKS.items()},
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

    Raises ValueError where a sub-byte type does not fill whole bytes, or a row of it whole blocks.
    """
    bits = BITS[dtype] * element_count(shape)
    if bits % 8 or (dtype in BLOCKS and shape[-1] % BLOCKS[dtype][0]):
        raise ValueError(f"{dtype} {list(shape)} does not fill whole {'blocks' if dtype in BLOCKS else 'bytes'}")
    return int(bits // 8)


def block_elements(dtype: str) -> int:
    """Return how many elements are stored together: 1 unless `dtype` is a block type."""
    return BLOCKS[dtype][0] if dtype in BLOCKS else 1
