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
from moesurgery.forward.tokens import Tokens, joined

if TYPE_CHECKING:
    import torch

_ROWS = 512  # of logits, whose softmax is computed together
_ROWS_GPU = 8192


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
        heads = min(engine.windows_per_head(windows) for engine in engines)
        for number in range(len(runs[0])):
            for ends in zip(*(run.ends(number, heads) for run in runs), strict=True):
                first, part, reference = ends[0]
                for found, (_, _, logits) in zip(sums, ends, strict=True):
                    lost = window_losses(logits, None if logits is reference else reference, part)
                    for row, (nats, divergence) in enumerate(lost):
                        entry = found[_domain_of(domains, first + row)]
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


def window_losses(logits: torch.Tensor, reference: torch.Tensor | None, tokens: Tokens) -> list[tuple[float, float]]:
    """Return for each window the summed loss of its predictions, and the summed KL(reference || logits).

    logits and reference are [b, S, V] for b windows. Raises CheckpointError where a loss is not finite.
    """
    import torch

    targets = tokens.ids[:, 1:].to(logits.device)
    counts = None if tokens.counts is None else tokens.counts[:, 1:].to(logits.device)
    sums = torch.zeros(2, len(tokens), dtype=torch.float64, device=logits.device)
    step = _ROWS_GPU if logits.is_cuda else _ROWS
    for window in range(len(tokens)):
        for start in range(0, targets.shape[1], step):
            rows = slice(start, min(start + step, targets.shape[1]))
            log = torch.log_softmax(logits[window, rows], dim=-1, dtype=torch.float32)
            counted = 1.0 if counts is None else counts[window, rows].double()
            sums[0, window] -= (log.gather(1, targets[window, rows, None])[:, 0].double() * counted).sum()
            if reference is not None:
                base = torch.log_softmax(reference[window, rows], dim=-1, dtype=torch.float32)
                sums[1, window] += ((base.exp() * (base - log)).sum(-1).double() * counted).sum()
    found: list[tuple[float, float]] = [(nats, divergence) for nats, divergence in sums.T.tolist()]
    if not all(math.isfinite(nats) for nats, _ in found):
        raise CheckpointError("the model computes NaN or infinite logits", "`moesurgery validate` looks for bad values")
    return found


def _together(domains: Sequence[Domain]) -> Tokens:
    return joined([domain.as_tokens for domain in domains])


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
