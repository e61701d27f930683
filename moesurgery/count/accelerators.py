"""Accelerators that the roofline knows: peak FLOP/s and memory bandwidth, from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """Dense bf16 peak in TFLOP/s and memory bandwidth in TB/s, from the makers' data sheets."""

    name: str
    tflops: float
    terabytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a kernel is compute bound."""
        return self.tflops / self.terabytes_per_second


ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("a100", 312, 2.04),
        Accelerator("h100", 989, 3.35),
        Accelerator("h200", 989, 4.8),
        Accelerator("b200", 2250, 8.0),
        Accelerator("mi300x", 1307, 5.3),
        Accelerator("l40s", 362, 0.864),
        Accelerator("rtx4090", 165, 1.008),
    )
}
