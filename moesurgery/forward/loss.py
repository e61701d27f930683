"""Held-out loss of plans, written or not: one alone, or several side by side with their distance to the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.forward.engine import Engine, Progress, Streams
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens

if TYPE_CHECKING:
    import torch

_ROWS = 512  # of logits, whose softmax is computed together


@dataclass(frozen=True)
class Loss:
    """Mean negative log likelihood in nats per predicted token; `divergence` is the mean KL to a reference."""

    domain: str
    tokens: int
    nats: float
    divergence: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def losses(engine: Engine, domains: Sequence[Domain], progress: Progress = lambda count: None) -> list[Loss]:
    """Return the loss on each domain, with log-probabilities in float32."""
    return compared([engine], domains, progress)[0]


def compared(
    engines: Sequence[Engine], domains: Sequence[Domain], progress: Progress = lambda count: None
) -> list[list[Loss]]:
    """Return for each engine the loss on each domain; for all but the first, with KL(first || it).

    All models go through their layers one after the other, then through their heads together, batch by batch, so
    that logits are never kept. Memory: the hidden states of the windows once per model.
    """
    if len({engine.vocabulary for engine in engines}) > 1:
        raise RefusedError(
            "the models have different vocabularies: " + ", ".join(str(engine.vocabulary) for engine in engines),
            "compare models with one tokenizer",
        )
    windows = _together(domains)
    sums = [[[0.0, 0.0] for _ in domains] for _ in engines]
    size = min(engine.windows_per_batch(windows, True) for engine in engines)
    runs: list[Streams] = []
    try:
        for engine in engines:
            runs.append(engine.start(windows, batch=size))
            runs[-1].to_layer(len(engine.layers), progress)
        for number, stream in enumerate(runs[0].streams):
            reference = runs[0].finish(number)
            for found, run in zip(sums, runs, strict=True):
                logits = reference if run is runs[0] else run.finish(number)
                for row, ids in enumerate(stream.tokens.ids):
                    nats, divergence = window_loss(logits[row], reference[row] if run is not runs[0] else None, ids)
                    entry = found[_domain_of(domains, stream.first + row)]
                    entry[0] += nats
                    entry[1] += divergence
    finally:
        for run in runs:
            run.close()
    return [
        [
            Loss(d.name, d.tokens, nats / d.tokens, None if i == 0 else divergence / d.tokens)
            for d, (nats, divergence) in zip(domains, found, strict=True)
        ]
        for i, found in enumerate(sums)
    ]


def window_loss(logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> tuple[float, float]:
    """Return the summed loss of one window's predictions, and the summed KL(reference || logits)."""
    import torch

    nats = divergence = 0.0
    targets = ids[1:].to(logits.device)
    for start in range(0, len(targets), _ROWS):
        log = torch.log_softmax(logits[:-1][start : start + _ROWS].float(), dim=-1)
        nats -= log.gather(1, targets[start : start + _ROWS, None]).double().sum().item()
        if reference is not None:
            base = torch.log_softmax(reference[:-1][start : start + _ROWS].float(), dim=-1)
            divergence += (base.exp() * (base - log)).sum(-1).double().sum().item()
    if not math.isfinite(nats):
        raise CheckpointError("the model computes NaN or infinite logits", "`moesurgery validate` looks for bad values")
    return nats, divergence


def _together(domains: Sequence[Domain]) -> Tokens:
    import torch

    return Tokens(torch.cat([domain.windows for domain in domains]))


def _domain_of(domains: Sequence[Domain], window: int) -> int:
    for number, domain in enumerate(domains):
        if window < len(domain.windows):
            return number
        window -= len(domain.windows)
    raise AssertionError("a window of no domain")


def mean_loss(found: Sequence[Loss]) -> Loss:
    """Return the mean over domains, weighted by tokens."""
    tokens = sum(loss.tokens for loss in found)

    def weighted(values: list[float]) -> float:
        return sum(v * loss.tokens for v, loss in zip(values, found, strict=True)) / tokens

    divergences = [loss.divergence for loss in found if loss.divergence is not None]
    return Loss("all", tokens, weighted([loss.nats for loss in found]), weighted(divergences) if divergences else None)


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Return the longest window that the model's positions allow."""
    inner = checkpoint.config.get("text_config")
    for place in (checkpoint.config, inner if isinstance(inner, dict) else {}):
        value = place.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None
