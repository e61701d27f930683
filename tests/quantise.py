"""Quantised tiny checkpoints, written by hand in the forms that hubs hold, and their values by other code.

Each form gives random tensors of the right dtypes and shapes, and says by plain loops what they stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.tiny import read_tensors

Parts = dict[str, torch.Tensor]  # by suffix


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write `tensors` as one file beside the side files of `source`, with `config` added to its config."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def fp8_blocks(weight: torch.Tensor, block: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [out, in] to e4m3 with one float32 scale per block: (weight, weight_scale_inv)."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // block) * block, -(-columns // block) * block)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    quantised = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return quantised, scales


def fp8_value(weight: torch.Tensor, scales: torch.Tensor, block: int = 16) -> torch.Tensor:
    wide = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]


def make_fp8(source: Path, target: Path, block: int = 16) -> None:
    """Turn every projection of a checkpoint into FP8 with block scales, as DeepSeek-V3 is stored."""
    tensors = {}
    for name, tensor in read_tensors(source).items():
        if tensor.dim() == 2 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(tensor, block)
        else:
            tensors[name] = tensor
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }
    rewrite(source, target, tensors, {"quantization_config": quantisation})


def make_mxfp4(source: Path, target: Path) -> None:
    """Replace gpt-oss experts by random MXFP4 blocks and scales of the right shapes."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in read_tensors(source).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, into, out = tensor.shape
            shape = (experts, out, into // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    rewrite(source, target, tensors, {"quantization_config": {"quant_method": "mxfp4"}})


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_value(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of MXFP4 (OCP MX specification): low nibble first, 2^(scale - 127) per 32 values."""
    table = torch.tensor([*_FP4, *(-v for v in _FP4)])
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    return pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]


@dataclass(frozen=True)
class WeightForm:
    """A quantised form of one linear [out, in]: `make(out, in, generator)`, and `value` by a loop over its elements.

    `scale`: the suffix of what takes a factor. `takes`: which factors ("any" up to the rounding of the scales,
    "two": powers of two, "none"). `dequantised`: whether `convert --dequantize` knows the form.
    """

    method: str
    make: Callable[[int, int, torch.Generator], Parts]
    value: Callable[[Parts, int, int], torch.Tensor]
    scale: str
    takes: str = "any"
    dequantised: bool = True
    config: dict[str, Any] = field(default_factory=dict)


def bytes_(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return bytes_(generator, *shape[:-1], shape[-1] * 4).view(torch.int32)


def exponents(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)


def fp8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)


def near_one(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.5 + torch.rand(*shape, generator=generator)).to(dtype)


def by_element(weight: Callable[[int, int], float]) -> Callable[[int, int], torch.Tensor]:
    """Return a matrix from a function of its indices."""
    return lambda out, into: torch.tensor([[weight(o, i) for i in range(into)] for o in range(out)])


def fp4_at(packed: np.ndarray, o: int, i: int) -> float:
    byte = int(packed[o, i // 2])
    code = byte & 15 if i % 2 == 0 else byte >> 4
    return (-1 if code & 8 else 1) * _FP4[code & 7]


def bits_at(word: int, bits: int, place: int) -> int:
    return (word & 0xFFFFFFFF) >> (bits * place) & ((1 << bits) - 1)


def _fp8_block_value(parts: Parts, out: int, into: int) -> torch.Tensor:
    weight, scale = parts[".weight"].float().numpy(), parts[".weight_scale_inv"].numpy()
    return by_element(lambda o, i: float(weight[o, i]) * float(scale[o // 16, i // 16]))(out, into)


def _row_value(suffix: str) -> Callable[[Parts, int, int], torch.Tensor]:
    def value(parts: Parts, out: int, into: int) -> torch.Tensor:
        weight, scale = parts[".weight"].float().numpy(), parts[suffix].float().flatten().numpy()
        return by_element(lambda o, i: float(weight[o, i]) * float(scale[o % len(scale)]))(out, into)

    return value


def _exponent_value(suffix: str, height: int, width: int) -> Callable[[Parts, int, int], torch.Tensor]:
    def value(parts: Parts, out: int, into: int) -> torch.Tensor:
        weight, scale = parts[".weight"], parts[suffix].view(torch.uint8).numpy()
        packed = weight.view(torch.uint8).numpy()
        plain = weight.float().numpy() if weight.dtype != torch.int8 else None

        def element(o: int, i: int) -> float:
            number = fp4_at(packed, o, i) if plain is None else float(plain[o, i])
            return number * 2.0 ** (int(scale[o // height, i // width]) - 127)

        return by_element(element)(out, into)

    return value


def _packed_value(bits: int, group: int) -> Callable[[Parts, int, int], torch.Tensor]:
    def value(parts: Parts, out: int, into: int) -> torch.Tensor:
        packed, scale, per = parts[".weight_packed"].numpy(), parts[".weight_scale"].float().numpy(), 32 // bits

        def element(o: int, i: int) -> float:
            number = bits_at(int(packed[o, i // per]), bits, i % per) - (1 << (bits - 1))
            return number * float(scale[o, i // group])

        return by_element(element)(out, into)

    return value


def _nvfp4_value(weight: str, overall: str, divides: bool) -> Callable[[Parts, int, int], torch.Tensor]:
    def value(parts: Parts, out: int, into: int) -> torch.Tensor:
        packed, scale, last = parts[weight].numpy(), parts[".weight_scale"].float().numpy(), float(parts[overall])
        factor = 1 / last if divides else last
        return by_element(lambda o, i: fp4_at(packed, o, i) * float(scale[o, i // 16]) * factor)(out, into)

    return value


def _gptq_value(parts: Parts, out: int, into: int) -> torch.Tensor:
    """qweight [in/8, out], the first of eight inputs in the lowest bits; zero points are stored less one."""
    qweight, qzeros, scales, g_idx = (parts[f".{name}"].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))

    def element(o: int, i: int) -> float:
        group = int(g_idx[i])
        number = bits_at(int(qweight[i // 8, o]), 4, i % 8)
        zero = bits_at(int(qzeros[group, o // 8]), 4, o % 8) + 1
        return (number - zero) * float(scales[group, o])

    return by_element(element)(out, into)


def _awq_value(parts: Parts, out: int, into: int) -> torch.Tensor:
    """qweight [in, out/8], eight outputs per word in the order 0 2 4 6 1 3 5 7."""
    place = {n: at for at, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    qweight, qzeros, scales = (parts[f".{name}"].numpy() for name in ("qweight", "qzeros", "scales"))

    def element(o: int, i: int) -> float:
        number = bits_at(int(qweight[i, o // 8]), 4, place[o % 8])
        zero = bits_at(int(qzeros[i // 16, o // 8]), 4, place[o % 8])
        return (number - zero) * float(scales[i // 16, o])

    return by_element(element)(out, into)


def _nf4_value(parts: Parts, out: int, into: int) -> torch.Tensor:
    """Two weights per byte, the first in the high nibble; one maximum per 64 weights, itself quantised or not."""
    packed, codes, largest = (parts[f".weight{s}"].flatten().numpy() for s in ("", ".quant_map", ".absmax"))
    state = json.loads(bytes(parts[".weight.quant_state.bitsandbytes__nf4"].tolist()))

    def element(o: int, i: int) -> float:
        at = o * into + i
        byte = int(packed[at // 2])
        most = float(largest[at // 64])
        if ".weight.nested_absmax" in parts:
            code = float(parts[".weight.nested_quant_map"][int(largest[at // 64])])
            most = code * float(parts[".weight.nested_absmax"][at // 64 // 256]) + state["nested_offset"]
        return float(codes[byte >> 4 if at % 2 == 0 else byte & 15]) * most

    return by_element(element)(out, into)


def _nf4(double: bool) -> Callable[[int, int, torch.Generator], Parts]:
    def make(out: int, into: int, g: torch.Generator) -> Parts:
        count = out * into // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [out, into]}
        parts = {
            ".weight": bytes_(g, out * into // 2, 1),
            ".weight.quant_map": torch.linspace(-1, 1, 16),
            ".weight.absmax": bytes_(g, count) if double else near_one(g, count),
        }
        if double:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            parts[".weight.nested_absmax"] = near_one(g, -(-count // 256))
            parts[".weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        text = json.dumps(state).encode()
        return {**parts, ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}

    return make


def _packed(bits: int, group: int) -> Callable[[int, int, torch.Generator], Parts]:
    return lambda out, into, g: {
        ".weight_packed": words(g, out, into * bits // 32),
        ".weight_scale": near_one(g, out, into // group, dtype=torch.bfloat16),
        ".weight_shape": torch.tensor([out, into]),
    }


def _groups(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": True, "type": "int"}
    return {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}


# Outputs and inputs are multiples of 8 and of 32.
FORMS: dict[str, WeightForm] = {
    "fp8-block": WeightForm(
        "fp8",
        lambda out, into, g: {
            ".weight": fp8(g, out, into),
            ".weight_scale_inv": near_one(g, -(-out // 16), -(-into // 16)),
        },
        _fp8_block_value,
        ".weight_scale_inv",
        config={"weight_block_size": [16, 16]},
    ),
    "fp8-channel": WeightForm(
        "compressed-tensors",
        lambda out, into, g: {
            ".weight": fp8(g, out, into),
            ".weight_scale": near_one(g, out, 1, dtype=torch.bfloat16),
            ".input_scale": near_one(g, 1),
        },
        _row_value(".weight_scale"),
        ".weight_scale",
        config={"format": "float-quantized"},
    ),
    "fp8-tensor": WeightForm(
        "fp8",
        lambda out, into, g: {
            ".weight": fp8(g, out, into),
            ".weight_scale": near_one(g, 1).reshape(()),
            ".input_scale": near_one(g, 1).reshape(()),
        },
        _row_value(".weight_scale"),
        ".weight_scale",
    ),
    "fp8-e8m0": WeightForm(
        "fp8",
        lambda out, into, g: {
            ".weight": fp8(g, out, into),
            ".scale": exponents(g, -(-out // 8), into // 8).view(torch.float8_e8m0fnu),
        },
        _exponent_value(".scale", 8, 8),
        ".scale",
        takes="two",
    ),
    "mxfp8": WeightForm(
        "mxfp8",
        lambda out, into, g: {".weight": fp8(g, out, into), ".weight_scale_inv": exponents(g, out, into // 8)},
        _exponent_value(".weight_scale_inv", 1, 8),
        ".weight_scale_inv",
        takes="two",
    ),
    "fp4": WeightForm(
        "fp8",
        lambda out, into, g: {
            ".weight": bytes_(g, out, into // 2).view(torch.int8),
            ".scale": exponents(g, out, into // 8).view(torch.float8_e8m0fnu),
        },
        _exponent_value(".scale", 1, 8),
        ".scale",
        takes="two",
    ),
    "int4": WeightForm("compressed-tensors", _packed(4, 8), _packed_value(4, 8), ".weight_scale", config=_groups(4)),
    "int8-packed": WeightForm(
        "compressed-tensors", _packed(8, 8), _packed_value(8, 8), ".weight_scale", config=_groups(8)
    ),
    "int8": WeightForm(
        "compressed-tensors",
        lambda out, into, g: {
            ".weight": bytes_(g, out, into).view(torch.int8),
            ".weight_scale": near_one(g, out, 1, dtype=torch.bfloat16),
        },
        _row_value(".weight_scale"),
        ".weight_scale",
        config={"format": "int-quantized"},
    ),
    "nvfp4-compressed-tensors": WeightForm(
        "compressed-tensors",
        lambda out, into, g: {
            ".weight_packed": bytes_(g, out, into // 2),
            ".weight_scale": near_one(g, out, -(-into // 16)).to(torch.float8_e4m3fn),
            ".weight_global_scale": near_one(g, 1),
            ".input_global_scale": near_one(g, 1),
        },
        _nvfp4_value(".weight_packed", ".weight_global_scale", divides=True),
        ".weight_global_scale",
        config={"format": "nvfp4-pack-quantized"},
    ),
    "nvfp4-modelopt": WeightForm(
        "modelopt",
        lambda out, into, g: {
            ".weight": bytes_(g, out, into // 2),
            ".weight_scale": near_one(g, out, -(-into // 16)).to(torch.float8_e4m3fn),
            ".weight_scale_2": near_one(g, 1).reshape(()),
            ".input_scale": near_one(g, 1).reshape(()),
        },
        _nvfp4_value(".weight", ".weight_scale_2", divides=False),
        ".weight_scale_2",
        config={"quant_algo": "NVFP4"},
    ),
    "gptq": WeightForm(
        "gptq",
        lambda out, into, g: {
            ".qweight": words(g, into // 8, out),
            ".qzeros": words(g, into // 8, out // 8),
            ".scales": near_one(g, into // 8, out, dtype=torch.float16),
            ".g_idx": torch.arange(into, dtype=torch.int32) // 8,
        },
        _gptq_value,
        ".scales",
        config={"bits": 4, "group_size": 8},
    ),
    "awq": WeightForm(
        "awq",
        lambda out, into, g: {
            ".qweight": words(g, into, out // 8),
            ".qzeros": words(g, -(-into // 16), out // 8),
            ".scales": near_one(g, -(-into // 16), out, dtype=torch.float16),
        },
        _awq_value,
        ".scales",
        config={"bits": 4, "group_size": 16, "version": "gemm"},
    ),
    "bnb-int8": WeightForm(
        "bitsandbytes",
        lambda out, into, g: {
            ".weight": bytes_(g, out, into).view(torch.int8),
            ".SCB": near_one(g, out),
            ".weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        lambda parts, out, into: _row_value(".SCB")(parts, out, into) / 127,
        ".SCB",
        dequantised=False,
        config={"load_in_8bit": True},
    ),
    "bnb-nf4": WeightForm(
        "bitsandbytes",
        _nf4(double=False),
        _nf4_value,
        ".weight.absmax",
        dequantised=False,
        config={"load_in_4bit": True},
    ),
    "bnb-nf4-double": WeightForm(
        "bitsandbytes",
        _nf4(double=True),
        _nf4_value,
        "",
        takes="none",
        dequantised=False,
        config={"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ),
}


def make_form(source: Path, target: Path, name: str) -> None:
    """Replace every projection of the experts by random tensors of a quantised form."""
    form = FORMS[name]
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for tensor_name, tensor in read_tensors(source).items():
        if ".experts." in tensor_name and tensor_name.endswith("_proj.weight"):
            base = tensor_name.removesuffix(".weight")
            parts = form.make(*tensor.shape, generator)
            tensors |= {base + suffix: part for suffix, part in parts.items()}
        else:
            tensors[tensor_name] = tensor
    rewrite(source, target, tensors, {"quantization_config": {"quant_method": form.method, **form.config}})


def values_of(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Return what each quantised projection of a checkpoint stands for, by the name of the plain weight."""
    form, tensors = FORMS[name], read_tensors(path)
    config = json.loads((path / "config.json").read_text())
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    found: dict[str, Parts] = {}
    for tensor_name, tensor in tensors.items():
        if ".experts." in tensor_name and "_proj." in tensor_name:
            at = tensor_name.index("_proj.") + len("_proj")
            found.setdefault(tensor_name[:at], {})[tensor_name[at:]] = tensor
    return {
        f"{base}.weight": form.value(parts, *((hidden, width) if base.endswith("down_proj") else (width, hidden)))
        for base, parts in found.items()
    }
