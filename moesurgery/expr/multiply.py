"""A factor on bytes of bf16, f16, f32 or f64, in place, with numpy: the one arithmetic that needs no torch.

Importing torch takes seconds and 200 MB; scaling down-projections is the main job of many runs. The result
has the bits of `(x.float() * factor).to(dtype)` for every finite value and infinity (tests/unit/expr/test_expr.py goes
through all 65,536 patterns): one rounding, to nearest even. A NaN stays a NaN.
"""

from __future__ import annotations

CHUNK = 1 << 18  # elements: smaller parts pay more for each operation than the caches give back

_PLAIN = {"F64": ("<f8", "<f8"), "F32": ("<f4", "<f4"), "F16": ("<f2", "<f4"), "BF16": ("bfloat16", "<f4")}


def multiply(data: memoryview, dtype: str, factor: float) -> None:
    """Multiply the elements of `dtype` in `data` by `factor`, in place."""
    import ml_dtypes  # noqa: F401 - gives numpy the name bfloat16
    import numpy as np

    stored, computed = map(np.dtype, _PLAIN[dtype])
    values = np.frombuffer(data, stored)
    with np.errstate(all="ignore"):  # overflow to infinity is the right answer here
        for at in range(0, len(values), CHUNK):
            part = values[at : at + CHUNK]
            wide = part.astype(computed)
            wide *= computed.type(factor)
            part[:] = wide
