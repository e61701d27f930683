"""Checkpoints as mlx-lm saves them: experts stacked in `switch_mlp`, words of 32 bits with scales and biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Result
from tests.tiny import save_tiny

Ok = Callable[..., Result]
EXPERTS, GROUP = 8, 32
SIZES = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}


def quantised(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise rows in groups of 32 as mlx does: w = scale * q + bias, the first q in the lowest bits."""
    groups = weight.float().reshape(*weight.shape[:-1], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    codes = ((groups - low[..., None]) / scales[..., None]).round().long().reshape(*weight.shape[:-1], -1, 32 // bits)
    words = (codes << (torch.arange(32 // bits) * bits)).sum(-1)
    return words.to(torch.uint32), scales.to(torch.float16), low.to(torch.float16)


def values(tensors: dict[str, torch.Tensor], base: str, bits: int) -> torch.Tensor:
    words = tensors[f"{base}.weight"].long()
    codes = (words[..., None] >> (torch.arange(32 // bits) * bits)) & (2**bits - 1)
    groups = codes.flatten(-2).reshape(*words.shape[:-1], -1, GROUP)
    return (groups * tensors[f"{base}.scales"][..., None] + tensors[f"{base}.biases"][..., None]).flatten(-2)


def make_mlx(folder: Path, bits: int) -> Path:
    """Save a tiny Qwen3-MoE, and put it into mlx-lm's form; the router is quantised, too."""
    save_tiny("qwen3_moe", folder, **SIZES)
    plain: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        plain |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in plain.items():
        if ".experts." not in name and name.endswith(".gate.weight"):
            base = name.removesuffix(".weight")
            tensors |= dict(
                zip((f"{base}.{k}" for k in ("weight", "scales", "biases")), quantised(weight, bits), strict=True)
            )
        elif ".experts." not in name:
            tensors[name] = weight
    for layer in {name.split(".")[2] for name in plain if ".experts." in name}:
        for part in ("gate", "up", "down"):
            each = [plain[f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(EXPERTS)]
            base = f"model.layers.{layer}.mlp.switch_mlp.{part}_proj"
            parts = quantised(torch.stack(each), bits)
            tensors |= dict(zip((f"{base}.{k}" for k in ("weight", "scales", "biases")), parts, strict=True))
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = {"group_size": GROUP, "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx(bits: int, tmp_path: Path, ok: Ok) -> None:
    """Counted as the plain model; experts leave by byte ranges; a factor on scales and biases; un-stacked and back."""
    save_tiny("qwen3_moe", tmp_path / "plain", **SIZES)
    model = make_mlx(tmp_path / "mlx", bits)
    plain, packed = (ok("count-params", m, "--json").json for m in (tmp_path / "plain", model))
    for key in ("total_params", "active_params", "num_experts", "components"):
        assert packed[key] == plain[key]
    before = read(model)

    ok("drop-experts", model, "--experts", "0,5", "-o", tmp_path / "dropped", "-q", "--validate")
    dropped = read(tmp_path / "dropped")
    kept = [1, 2, 3, 4, 6, 7]
    assert dropped.keys() == before.keys()
    for name, tensor in before.items():
        along = "switch_mlp" in name or ".mlp.gate." in name
        assert torch.equal(
            dropped[name].long() if tensor.dtype == torch.uint32 else dropped[name],
            (tensor.long() if tensor.dtype == torch.uint32 else tensor)[kept if along else slice(None)],
        )

    ok("rescale", model, "--top-k", 3, "--scale", 0.5, "-o", tmp_path / "half", "-q")
    half = read(tmp_path / "half")
    base = "model.layers.1.mlp.switch_mlp.down_proj"
    assert torch.equal(values(half, base, bits), 0.5 * values(before, base, bits))
    assert torch.equal(
        half["model.layers.1.mlp.switch_mlp.up_proj.scales"], before["model.layers.1.mlp.switch_mlp.up_proj.scales"]
    )

    ok("convert", model, "--layout", "per-expert", "-o", tmp_path / "apart", "-q")
    apart = read(tmp_path / "apart")
    for suffix in ("weight", "scales", "biases"):
        one = apart[f"model.layers.1.mlp.experts.3.gate_proj.{suffix}"]
        assert torch.equal(one.long(), before[f"model.layers.1.mlp.switch_mlp.gate_proj.{suffix}"][3].long())
    ok("convert", tmp_path / "apart", "--layout", "fused", "-o", tmp_path / "back", "-q")
    back = read(tmp_path / "back")
    assert back.keys() == before.keys()
    assert all(back[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in before.items())
