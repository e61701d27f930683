"""Tiny random models that transformers builds and saves, and what they compute: the independent reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MLA = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
}
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **MLA,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v3": {
        **MLA,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "n_group": 2,
        "topk_group": 1,
    },
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "jamba": {
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
    },
}


def build(model_type: str, **changes: Any) -> torch.nn.Module:
    """Return a tiny model with random weights everywhere: biases, norms and selection biases too."""
    config = transformers.AutoConfig.for_model(model_type, **{**BASE, **TINY.get(model_type, {}), **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                around = 0.0 if "bias" in name else 1.0
                tensor.copy_(around + 0.2 * torch.randn(tensor.shape))
            elif "embed" not in name and "A_log" not in name:
                tensor.mul_(4)  # initial weights are so small that experts would hardly matter
    return model.eval()


def save_tiny(model_type: str, path: Path, *, fused: bool = False, dtype: str = "float32", **changes: Any) -> None:
    """Save a tiny model in the hub's layout or in transformers' fused one, in two shards or more."""
    model = build(model_type, **changes).to(getattr(torch, dtype))
    model.save_pretrained(path, save_original_format=not fused, max_shard_size="60KB")


def load(path: Path, **changes: Any) -> torch.nn.Module:
    """Load a checkpoint with transformers; every tensor must be used and none may be missing."""
    config = transformers.AutoConfig.from_pretrained(path)
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


PROMPT = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(7))


def logits(model: torch.nn.Module, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt).logits.float()


@contextmanager
def experts_multiplied(model: torch.nn.Module, factor_of: Callable[[str], float]) -> Iterator[None]:
    """Multiply what each `experts` module returns by a factor that depends on its name: no weight is touched."""
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            factor = factor_of(name)
            handles.append(module.register_forward_hook(lambda m, i, out, f=factor: out * f))
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint with safetensors' own reader."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())
