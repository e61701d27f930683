"""A factor on bytes of bf16, f16, f32 or f64, in place, with numpy: the one arithmetic that needs no torch.

Importing torch takes seconds and 200 MB; scaling down-projections is the main job of many runs. The result
has the bits of `(x.float() * factor).to(dtype)` for every finite value and infinity (tests/test_expr.py goes
through all 65,536 patterns): one rounding, to nearest even. A NaN stays a NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesurgery.plan.arrays import round_to_bf16

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 18  # elements: smaller parts make threads wait for each other at the interpreter's lock

_PLAIN = {"F64": ("<f8", "<f8"), "F32": ("<f4", "<f4"), "F16": ("<f2", "<f4")}


class Multiplier:
    """The temporaries of one thread."""

    def __init__(self) -> None:
        import numpy as np

        self._wide = np.empty(CHUNK, np.uint32)
        self._odd = np.empty(CHUNK, np.uint32)

    def in_place(self, data: memoryview, dtype: str, factor: float) -> None:
        """Multiply the elements of `dtype` in `data` by `factor`."""
        import numpy as np

        with np.errstate(all="ignore"):  # overflow to infinity is the right answer here
            if dtype == "BF16":
                self._bf16(np.frombuffer(data, np.uint16), np.float32(factor))
            else:
                stored, computed = _PLAIN[dtype]
                values = np.frombuffer(data, stored)
                for at in range(0, len(values), CHUNK):
                    part = values[at : at + CHUNK]
                    part[:] = part.astype(computed) * np.dtype(computed).type(factor)

    def _bf16(self, values: np.ndarray, factor: np.float32) -> None:
        import numpy as np

        for at in range(0, len(values), CHUNK):
            part = values[at : at + CHUNK]
            wide, odd = self._wide[: len(part)], self._odd[: len(part)]
            np.left_shift(part, 16, out=wide, dtype=np.uint32, casting="unsafe")
            number = wide.view(np.float32)
            np.multiply(number, factor, out=number)
            round_to_bf16(wide, odd, part)
