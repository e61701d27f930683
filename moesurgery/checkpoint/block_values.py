"""The values of GGUF's block types, by way of the `gguf` library; and blocks times a factor, which needs no values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import BLOCKS
from moesurgery.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

# Types whose own quantiser gives the same blocks again for the values of a block.
REQUANTISED = frozenset({"Q8_0", "Q4_0"})
# Where in a block its half-precision factors stand: all that it holds is a multiple of them (ggml-common.h).
FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),  # scale and offset
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def _library() -> Any:
    try:
        from gguf import quants
    except ImportError:
        raise RefusedError(
            "the values of GGUF's block types are read with the package gguf, which is not installed",
            'pip install "moesurgery[gguf]"',
        ) from None
    return quants


def block_values(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """Return the values of whole blocks, flat, as float32. Raises ValueError for a type that `gguf` does not read."""
    import numpy as np

    library = _library()
    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[dtype][1])
    try:
        with np.errstate(all="ignore"):  # what is not finite is looked for by who asks
            values = library.dequantize(blocks, getattr(library.GGMLQuantizationType, dtype))
    except (AttributeError, NotImplementedError):
        raise ValueError(f"{dtype} is not dequantised by the package gguf") from None
    return np.asarray(values, np.float32).reshape(-1)


def quantised_blocks(values: np.ndarray, dtype: str) -> memoryview:
    """Return the blocks of values, as many as fill whole ones."""
    library = _library()
    rows = values.reshape(-1, BLOCKS[dtype][0]).astype("float32", copy=False)
    blocks = library.quantize(rows, getattr(library.GGMLQuantizationType, dtype))
    return memoryview(blocks.reshape(-1))


def multiplied_blocks(data: bytes | memoryview, dtype: str, factor: float) -> memoryview:
    """Return whole blocks times a factor: their half-precision factors are multiplied, and rounded once.

    Raises RefusedError where one would be too large.
    """
    import numpy as np

    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[dtype][1]).copy()
    for at in FACTORS[dtype]:
        before = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
        with np.errstate(over="ignore", invalid="ignore"):
            after = (before.astype(np.float32) * np.float32(factor)).astype("<f2")
        if bool((np.isfinite(before) & ~np.isfinite(after)).any()):
            raise RefusedError(
                f"a factor of {factor:.6g} takes the scale of a {dtype} block beyond half precision",
                "use a smaller factor, or --scale none",
            )
        blocks[:, at : at + 2] = after.view(np.uint8)
    return blocks.reshape(-1).data
