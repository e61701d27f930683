"""Synthetic bf16 checkpoints: weights of normal numbers, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Takes the start of a layer's names, as `model.layers.3.`, and what draws a weight of a shape; returns its tensors.
Layer = Callable[[str, Callable[..., "torch.Tensor"]], dict[str, "torch.Tensor"]]


def write_checkpoint(folder: Path, config: dict[str, Any], shards: int, layer: Layer) -> None:
    """Write the layers that `config` counts, in so many shards, with embedding, last norm and head."""
    import torch
    from safetensors.torch import save_file

    hidden, vocabulary, layers = (config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    block = torch.randn(4_000_037, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def normal(*shape: int) -> torch.Tensor:
        count = int(torch.tensor(shape).prod())
        return block.repeat(-(-count // len(block)))[:count].view(shape).clone()

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        tensors: dict[str, torch.Tensor] = {}
        for i in range(layers * shard // shards, layers * (shard + 1) // shards):
            at = f"model.layers.{i}."
            tensors |= {f"{at}self_attn.{p}_proj.weight": normal(hidden, hidden) for p in "qkvo"}
            tensors |= {f"{at}{n}_layernorm.weight": torch.ones(hidden).bfloat16() for n in ("input", "post_attention")}
            tensors |= layer(at, normal)
        if shard == 0:
            tensors["model.embed_tokens.weight"] = normal(vocabulary, hidden)
        if shard == shards - 1:
            tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
            tensors["lm_head.weight"] = normal(vocabulary, hidden)
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(2 * t.numel() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
