"""The quantised forms that `convert --quantize` writes: what a linear weight is stored as, and who reads it.

Weights alone are rounded, to the nearest step; `families.quantised` knows all forms that are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesurgery.checkpoint.dtypes import BITS
from moesurgery.plan.quantised_form import Form

SCALE_BLOCK = 128  # of fp8-block, down and across
LEAST_SIZE = 16  # a linear with fewer inputs or outputs is a gate: of a shared expert, of a head


@dataclass(frozen=True)
class WrittenForm:
    """A form of `convert --quantize`.

    `group` inputs go together, `main` and `scale` are endings of names, `dtype` is that of the codes as stored,
    `readers` are clients that read it. config.json says `weights` and `activations` in compressed-tensors' `format`; ""
    is transformers' own `fp8`.
    """

    form: Form
    group: int
    main: str
    scale: str
    dtype: str
    readers: tuple[str, ...]
    format: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] | None = None

    def form_of(self, inputs: int) -> Form:
        """Return the form of weights [out, inputs]: of `fp8`, all inputs of an output share a scale."""
        form = self.form
        return Form(form.numbers, form.bits, 1, inputs, form.scale_dtype) if self.format == "float-quantized" else form

    def stored(self, out: int, inputs: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of the tensors that a weight [out, inputs] becomes, by what their names end in."""
        form = self.form_of(inputs)
        per_word = {"U8": 2, "I32": 8}.get(self.dtype, 1)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            self.main: (self.dtype, (out, inputs // per_word)),
            self.scale: (form.scale_dtype, (-(-out // form.tall), -(-inputs // form.wide))),
        }
        if form.overall:
            tensors[".weight_global_scale"] = ("F32", (1,))
        if form.numbers == "int":
            tensors[".weight_shape"] = ("I64", (2,))
        return tensors

    def nbytes(self, out: int, inputs: int) -> int:
        """Return the bytes of the tensors that a weight [out, inputs] becomes."""
        return sum(int(BITS[dtype]) * math.prod(shape) // 8 for dtype, shape in self.stored(out, inputs).values())


WRITTEN_FORMS: dict[str, WrittenForm] = {
    "fp8": WrittenForm(
        Form("e4m3", 8, 1, 1, "F32"),
        1,
        ".weight",
        ".weight_scale",
        "F8_E4M3",
        ("vllm", "sglang", "transformers5"),
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    ),
    "fp8-block": WrittenForm(
        Form("e4m3", 8, SCALE_BLOCK, SCALE_BLOCK, "F32"),
        1,
        ".weight",
        ".weight_scale_inv",
        "F8_E4M3",
        ("vllm", "sglang", "transformers5"),
    ),
    "mxfp4": WrittenForm(
        Form("e2m1", 4, 1, 32, "U8"),
        32,
        ".weight_packed",
        ".weight_scale",
        "U8",
        ("vllm", "transformers5"),
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "nvfp4": WrittenForm(
        Form("e2m1", 4, 1, 16, "F8_E4M3", overall="over"),
        16,
        ".weight_packed",
        ".weight_scale",
        "U8",
        ("vllm",),
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
    "int4": WrittenForm(
        Form("int", 4, 1, 32, "BF16"),
        32,
        ".weight_packed",
        ".weight_scale",
        "I32",
        ("vllm", "sglang", "transformers5"),
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
}
