"""Tiny random models that transformers builds and saves, and what they compute: the independent reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import moesurgery
from moesurgery.forward.model_building import mend_llama4
from tests.families import BASE, CLASSES, ROWS, TINY

__all__ = ["BASE", "TINY"]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
mend_llama4()

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
NEWEST = next(line.partition("==")[2] for line in CONSTRAINTS.read_text().split() if line.startswith("transformers=="))
OLDER = Version(transformers.__version__) < Version(NEWEST)


def build(model_type: str, **changes: Any) -> torch.nn.Module:
    """Return a tiny model with random weights everywhere: biases, norms and selection biases too.

    Skips the test where transformers is older than the tests' own, and has no such type yet.
    """
    if OLDER and model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    row = ROWS.get(model_type, {})
    whole = any(key in row for key in ("text_config", "thinker_config", "vocab_size", "d_model"))
    config = transformers.AutoConfig.for_model(model_type, **({} if whole else BASE) | row | changes)
    config._attn_implementation = "eager"
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "num_nextn_predict_layers", 0):
            part.num_nextn_predict_layers = 0  # transformers states its default, and builds none
    torch.manual_seed(0)
    if model_type in CLASSES:
        model = getattr(transformers, CLASSES[model_type])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    stored = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in stored or not tensor.is_floating_point():
                continue
            if tensor.dim() < 2:
                around = 0.0 if "bias" in name else 1.0
                tensor.copy_(around + 0.2 * torch.randn(tensor.shape))
            elif "embed" not in name and "A_log" not in name:
                tensor.mul_(4)  # initial weights are so small that experts would hardly matter
    return model.eval()


def save_tiny(model_type: str, path: Path, *, fused: bool = False, dtype: str = "float32", **changes: Any) -> None:
    """Save a tiny model in the hub's layout or in transformers' fused one, in two shards or more."""
    model = build(model_type, **changes)
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(path, save_original_format=not fused, max_shard_size="60KB")


def load(path: Path, **changes: Any) -> torch.nn.Module:
    """Load a checkpoint with transformers; every tensor must be used and none may be missing."""
    moesurgery.register_tied_models()
    config = transformers.AutoConfig.from_pretrained(path)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    config._attn_implementation = "eager"
    model_class = getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)
    model, info = model_class.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


PROMPT = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(7))


def logits(model: torch.nn.Module, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    """Return the logits of the language model; an encoder-decoder reads the prompt on both sides."""
    torch.manual_seed(0)  # a diffusion model starts from noise
    both = {"decoder_input_ids": prompt} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return getattr(model, "thinker", model)(input_ids=prompt, **both).logits.float()


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
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())
