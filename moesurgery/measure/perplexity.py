"""Held-out loss of a checkpoint, by transformers' own forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.errors import CheckpointError
from moesurgery.measure.text import Domain

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Loss:
    """Mean negative log likelihood in nats per predicted token."""

    domain: str
    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def load_model(path: str | Path, dtype: str = "float32") -> Any:
    """Load a checkpoint with transformers, never with its own code.

    Raises CheckpointError where transformers cannot load it, or where tensors were missing, unexpected or of
    the wrong shape: a model that is partly random has no perplexity worth printing.
    """
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            str(path), dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"transformers cannot load {path}: {reason[0] if reason else error!r}") from None
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise CheckpointError(f"{path}: {len(names)} tensors are {kind.removesuffix('_keys')}, such as {names[0]}")
    return model.eval()


def losses(model: Any, domains: Sequence[Domain], progress: Callable[[int], None] = lambda count: None) -> list[Loss]:
    """Return the loss of `model` on each domain, in float32 log-probabilities."""
    import torch

    found = []
    with torch.inference_mode():
        for domain in domains:
            total = 0.0
            for windows in torch.split(domain.windows, max(1, BATCH_TOKENS // domain.windows.shape[1])):
                logits = model(windows).logits[:, :-1].float()
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
                ).item()
                progress(windows.numel())
            found.append(Loss(domain.name, domain.tokens, total / domain.tokens))
    return found


def mean(found: Sequence[Loss]) -> Loss:
    """Return the mean over domains, weighted by tokens."""
    tokens = sum(loss.tokens for loss in found)
    return Loss("all", tokens, sum(loss.nats * loss.tokens for loss in found) / tokens)


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Return the longest window that the model's positions allow."""
    for place in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        value = place.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None
