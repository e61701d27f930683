"""Tiny Llamas and Mixtrals from one stream of random numbers: the same bytes here and where mergekit runs.

numpy and safetensors only, since the golden files must not depend on how a version of transformers fills weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, VOCAB, EXPERTS = 12, 8, 16, 3


def shapes(kind: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model as the Hub has them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN if p in "qo" else HIDDEN // 2, HIDDEN) for p in "qkvo"}
        if kind == "llama":
            found |= {f"{at}.mlp.{p}_proj.weight": (WIDTH, HIDDEN) for p in ("gate", "up")}
            found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        else:
            found[f"{at}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
            for e in range(EXPERTS):
                for p, shape in {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}.items():
                    found[f"{at}.block_sparse_moe.experts.{e}.{p}.weight"] = shape
        found |= {f"{at}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def config(kind: str, layers: int) -> dict[str, object]:
    name = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}[kind]
    found: dict[str, object] = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return found | ({"num_local_experts": EXPERTS, "num_experts_per_tok": 2} if kind == "mixtral" else {})


def tensors(kind: str, which: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """Return model `which` of a kind: 0 is the base, the others are the base and a change of a third of it.

    In float32: differences of bf16 numbers are often equal in size, and which of them the largest n are is a toss-up.
    """
    base = np.random.Generator(np.random.Philox(11))
    change = np.random.Generator(np.random.Philox(100 + which))
    found = {}
    for name, shape in shapes(kind, layers).items():
        values = base.standard_normal(shape) * 0.4 + (1.0 if len(shape) == 1 else 0.0)
        if which:
            values = values + 0.13 * change.standard_normal(shape)
        found[name] = torch.from_numpy(values).to(torch.float32)
    return found


def write(kind: str, which: int, path: Path, layers: int = 2, made: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a model folder of one shard and return it."""
    path.mkdir(parents=True)
    save_file(made or tensors(kind, which, layers), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config(kind, layers), indent=2))
    return path
