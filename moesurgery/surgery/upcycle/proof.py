"""Prove a rewrite on a shrunk clone: the same configs, small, with random weights and without reading the real ones.

The clone has the real model's type, flags, multipliers, biases and layer pattern, and every size is small: a few
layers that show each kind of layer, a window, a chunk and an original context shorter than the prompt. It goes
through this very upcycle, is saved, loaded by transformers, and must give the dense clone's logits. So a default
that the target fills in, a window that it drops, or a tensor that it does not read shows, whatever the real size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.checkpoint.filenames import CONFIG, SINGLE
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.decoders.pairs import Pair
from moesurgery.errors import RefusedError
from moesurgery.forward.model_config import harmless
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.surgery.upcycle.dense_model import DenseModel

_TOLERANCE = 1e-5
LAYERS = 8
_PROMPT = 48  # tokens; longer than everything below
_WINDOW = 8
CONTEXT = 16  # the original context, before RoPE scaling
_LONGEST = 32
VOCABULARY = 64

# What is left out of the clone's upcycle: it changes the function on purpose, or needs the real model.
_LEFT_OUT = {
    "client": None,  # told by sizes that the clone has not
    "sources": None,
    "shared_source": None,
    "rest": "base",
    "reinit": 0.0,
    "noise": 0.0,
    "dtype": None,
    "router_std": None,
    "verify": False,
    "text": None,
}


@dataclass(frozen=True)
class Proof:
    """The largest difference of logits between the dense clone and its mixture."""

    difference: float
    scale: float
    layers: int

    @property
    def text(self) -> str:
        return (
            f"proof: a clone of {self.layers} small layers with random weights, on {_PROMPT} tokens, beyond window and"
            f" original context: largest difference of logits {self.difference:.1e}, logits up to {self.scale:.2g}"
        )

    @property
    def report(self) -> dict[str, Any]:
        return {"max_logit_difference": self.difference, "max_logit": self.scale, "tokens": _PROMPT}


def prove(dense: DenseModel, pair: Pair, given: Mapping[str, Any], upcycle: Callable[..., Plan]) -> Proof:
    """Run the operation `upcycle` with the parameters `given` on a clone.

    Raises RefusedError where the mixture is not the dense clone.
    """
    import torch

    parts = given["experts"] if given["split"] else given["granularity"]
    config = shrunk(dense.plan.config, parts or len(given["sources"] or ()) * given["granularity"])
    parameters = {**given, **_LEFT_OUT, "to": pair.target_type}
    if parameters["experts"] is None:
        parameters["experts"] = len(given["sources"]) * given["granularity"]
    if parameters["router"] not in ("random", "uniform", "zero"):
        parameters["router"] = "random"
    if given["split"]:
        parameters.update(top_k=parameters["experts"], router="zero")
    if not given["renormalise"]:
        parameters["router"] = "zero"
    with tempfile.TemporaryDirectory(prefix="moesurgery-proof-") as folder:
        before, after = Path(folder, "dense"), Path(folder, "mixture")
        try:
            random_model(config).save_pretrained(before)
        except Exception as error:
            raise RefusedError(
                f"upcycle: transformers does not build a small model of this config, so nothing can be proved: {error}",
                "correct config.json, or use --no-proof",
            ) from None
        plan = upcycle(plan_of(open_checkpoint(before)), **parameters, proof=False)
        _save(plan, after)
        prompt = torch.randint(3, VOCABULARY, (2, _PROMPT), generator=torch.Generator().manual_seed(1))
        expected, actual = logits_of(before, prompt), logits_of(after, prompt)
    result = Proof(
        (expected - actual).abs().max().item(),
        expected.abs().max().item(),
        config["num_hidden_layers"],
    )
    if not result.difference <= _TOLERANCE * max(1.0, result.scale):
        raise RefusedError(
            f"upcycle: the proof failed: a small {pair.target_type} made this way differs from its"
            f" {pair.source_type} by {result.difference:.2g} in logits of up to {result.scale:.2g}",
            "nothing was written; the pair does not hold for this config: please report it",
        )
    return result


def _save(plan: Plan, folder: Path) -> None:
    """Write a plan that fits in memory as transformers writes a model, with the safetensors library."""
    from safetensors.torch import save_file

    folder.mkdir()
    reader = FileReader()
    tensors = {
        name: expr.evaluate(0, expr.numel, reader).clone().reshape(expr.shape) for name, expr in plan.tensors.items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(write_json(plan.config))


def random_model(config: Mapping[str, Any]) -> Any:
    """Return a dense model of `config` with random weights everywhere: biases, norms and sinks are not zero or one."""
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    automatic: Any = transformers.AutoConfig
    loader: Any = transformers.AutoModelForCausalLM
    settings = automatic.for_model(**config)
    generator = torch.Generator().manual_seed(0)
    model = loader.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() >= 2:
                weight.copy_(drawn * (0.3 if "embed" in name else weight.shape[-1] ** -0.5))
            else:
                weight.copy_(0.2 * drawn + (1.0 if "norm" in name and not name.endswith("bias") else 0.0))
    return model.eval()


def logits_of(path: Path, prompt: Any) -> Any:
    """Return the float32 logits [prompts, tokens, vocabulary] of a checkpoint that transformers loads.

    Raises RefusedError where transformers would make up a tensor, or leave one unread.
    """
    import torch
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    model, loading = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise RefusedError(
                f"upcycle: the proof failed: transformers finds {kind.replace('_', ' ')}: {sorted(loading[kind])[0]}",
                "nothing was written; the pair does not hold for this config: please report it",
            )
    with torch.inference_mode():
        return model.eval()(prompt).logits.float()


def shrunk(config: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """Return `config` at a small size. `parts` divides the width of its FFN."""
    small = {k: v for k, v in harmless(config).items() if k not in ("torch_dtype", "dtype")}
    count = config["num_hidden_layers"]
    layers = min(count, LAYERS)
    shown = _layers_to_show(count, layers)
    heads = config["num_attention_heads"]
    shared = max(1, heads // (config.get("num_key_value_heads") or heads))
    small_heads = 4 if shared < 4 else min(shared, 8)
    head = config.get("head_dim")
    width = 16 if head and head * heads != config["hidden_size"] else 8
    hidden = small_heads * 8
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": parts * max(1, -(-6 // parts)) * 4,  # torch takes rows of whole 16 bytes
        "num_hidden_layers": len(shown),
        "num_attention_heads": small_heads,
        "num_key_value_heads": max(1, small_heads // shared),
        "head_dim": width,
        "max_position_embeddings": _LONGEST,
        "max_window_layers": _upper(config, count, len(shown)),
        "sliding_window": _WINDOW if _window_fills(config) else 4 * _PROMPT,
        "original_max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # latent attention, linear attention, feed-forward rules of single types
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_head_dim": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "block_multiple_of": 8 * parts,
        "full_attn_idxs": [i for i, layer in enumerate(shown) if layer in (config.get("full_attn_idxs") or ())],
    }
    if "kv_lora_rank" in config:
        sizes.update(num_key_value_heads=small_heads, head_dim=8)
    for key, value in sizes.items():
        if config.get(key) is not None:
            small[key] = value
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and key not in ("eos_token_id", "architectures"):
            small[key] = [value[i] for i in shown]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), Mapping):
            fraction = config.get("partial_rotary_factor") or 1.0
            small[key] = _shrunk_rope(config[key], width if "kv_lora_rank" not in config else 8, fraction)
    # Defaults of the type that are sizes must be given where the real config leaves them out.
    for key in _sizes_without_default(config):
        small[key] = sizes[key]
    return small


def _window_fills(config: Mapping[str, Any]) -> bool:
    """Whether the longest context is longer than the window: otherwise a window changes nothing."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    return not window or not longest or window < longest


def _sizes_without_default(config: Mapping[str, Any]) -> list[str]:
    """Return the sizes that the type's own default would make large, where the config leaves them out."""
    import transformers

    automatic: Any = transformers.AutoConfig
    full = automatic.for_model(**harmless(config)).to_dict()
    wanted = (
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
        *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
        *("block_multiple_of", "pad_token_id", "bos_token_id", "eos_token_id"),
    )
    return [key for key in wanted if config.get(key, None) is None and key not in config and full.get(key) is not None]


def _layers_to_show(count: int, wanted: int) -> list[int]:
    """Choose layers: the first and the last ones, which between them show every kind of layer."""
    if count <= wanted:
        return list(range(count))
    first = wanted - wanted // 2
    return [*range(first), *range(count - wanted // 2, count)]


def _upper(config: Mapping[str, Any], count: int, layers: int) -> int:
    """Shrink the number of the first layer that has a window, so that some have one if some do."""
    at = config.get("max_window_layers", 0)
    return layers if at >= count else min(at, layers // 2)


def _shrunk_rope(rules: Mapping[str, Any], width: int, fraction: float) -> dict[str, Any]:
    """Shrink contexts and per-frequency lists in RoPE's rules."""
    if any(isinstance(value, Mapping) for value in rules.values()):
        return {k: _shrunk_rope(v, width, fraction) if isinstance(v, Mapping) else v for k, v in rules.items()}
    smaller = dict(rules)
    for key, value in (("original_max_position_embeddings", CONTEXT), ("max_position_embeddings", _LONGEST)):
        if key in smaller:
            smaller[key] = value
    rotary = int(width * (rules.get("partial_rotary_factor") or fraction))
    for key in ("short_factor", "long_factor"):
        if isinstance(smaller.get(key), list):
            step = max(1, math.ceil(len(smaller[key]) / (rotary // 2)))
            smaller[key] = (smaller[key][::step] + [smaller[key][-1]] * rotary)[: rotary // 2]
    if isinstance(smaller.get("mrope_section"), list):
        smaller["mrope_section"] = [1, 1, rotary // 2 - 2]
    return smaller
