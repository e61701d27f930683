"""Quantised tiny checkpoints, written by hand in the forms that hubs hold, and their values by other code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import read_tensors


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
