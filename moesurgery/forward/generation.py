"""Continuations of prompts, by transformers' `generate`: whether they reach an end token, and whether they loop.

Published edits fail there first: a model whose loss barely changed may still repeat itself or never stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NGRAM = 8  # tokens
REPEATS = 4  # of one n-gram: a text that has so many loops


@dataclass(frozen=True)
class Continuations:
    """A model's continuations: how many, the shares that loop and that end, and the tokens of each."""

    prompts: int
    loops: float
    ends: float
    tokens: tuple[tuple[int, ...], ...]


def loops(tokens: Sequence[int]) -> bool:
    """Return whether any run of `NGRAM` tokens occurs at least `REPEATS` times, overlapping ones counted."""
    runs = Counter(tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))
    return max(runs.values(), default=0) >= REPEATS


def continuations(
    folder: Path,
    prompts: Sequence[torch.Tensor],
    ends: Collection[int],
    new_tokens: int,
    temperature: float = 0.0,
    device: str = "cpu",
    dtype: str = "float32",
) -> Continuations:
    """Continue `prompts`, token ids [length] each, by up to `new_tokens` with the model in `folder`, loaded whole.

    Greedily at temperature 0, else sampled, the same each time. `ends` are the tokens that end a text.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = loaded.to(device).eval()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    usual: Any = GenerationConfig
    model.generation_config = usual()  # what the checkpoint suggests would differ between models
    torch.manual_seed(0)
    outputs = []
    for prompt in prompts:
        ids = prompt[None].to(device)
        with torch.no_grad():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=min(ends, default=0),
                **sampling,
            )
        outputs.append(tuple(whole[0, len(prompt) :].tolist()))
    ended = sum(bool(set(tokens) & set(ends)) for tokens in outputs)
    return Continuations(len(outputs), sum(map(loops, outputs)) / len(outputs), ended / len(outputs), tuple(outputs))
