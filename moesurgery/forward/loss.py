"""Held-out loss of plans, written or not: one alone, or several side by side with their distance to the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.forward.engine import Engine, Progress, Streams
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np
    import torch

_ROWS = 512  # of logits, whose softmax is computed together


@dataclass(frozen=True)
class TokenFigures:
    """What a model says of each predicted token, [windows, length - 1] each, in float64.

    `nats` is the negative log likelihood. Against the reference: `divergence` is KL(reference || model), `agreement`
    1 where both have the same likeliest token, `overlap` the sum over the vocabulary of the lesser of both
    probabilities: the share of tokens drawn from one that speculative decoding by the other would accept. Those are
    None for the reference itself.
    """

    nats: np.ndarray
    divergence: np.ndarray | None = None
    agreement: np.ndarray | None = None
    overlap: np.ndarray | None = None


@dataclass(frozen=True)
class Loss:
    """Mean negative log likelihood in nats per predicted token; `divergence` is the mean KL to a reference.

    `agreement` and `overlap` are means too (`TokenFigures`, which `by_token` has for every token).
    """

    domain: str
    tokens: int
    nats: float
    divergence: float | None = None
    agreement: float | None = None
    overlap: float | None = None
    by_token: TokenFigures | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def by_window(self) -> np.ndarray:
        """Mean nats of each window [windows]."""
        assert self.by_token is not None
        means: np.ndarray = self.by_token.nats.mean(axis=1)
        return means


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
    import numpy as np

    windows = _together(domains)
    figures: list[list[TokenFigures]] = [[] for _ in engines]  # of each window
    size = min(engine.windows_per_batch(windows, True) for engine in engines)
    runs: list[Streams] = []
    try:
        for engine in engines:
            runs.append(engine.start(windows, batch=size))
            runs[-1].to_layer(len(engine.layers), progress)
        for number, stream in enumerate(runs[0].streams):
            reference = runs[0].finish(number)
            for found, run in zip(figures, runs, strict=True):
                logits = reference if run is runs[0] else run.finish(number)
                for row, ids in enumerate(stream.tokens.ids):
                    found.append(token_figures(logits[row], reference[row] if run is not runs[0] else None, ids))
    finally:
        for run in runs:
            run.close()

    def whole(domain: Domain, parts: list[TokenFigures]) -> Loss:
        names = ("nats",) if parts[0].divergence is None else ("nats", "divergence", "agreement", "overlap")
        values = {name: np.stack([getattr(part, name) for part in parts]) for name in names}
        means = {name: float(value.sum()) / domain.tokens for name, value in values.items()}
        return Loss(domain.name, domain.tokens, **means, by_token=TokenFigures(**values))

    starts = [sum(len(d.windows) for d in domains[:i]) for i in range(len(domains))]
    return [
        [whole(d, found[start : start + len(d.windows)]) for d, start in zip(domains, starts, strict=True)]
        for found in figures
    ]


def token_figures(logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> TokenFigures:
    """Return what one window's logits [S, V] say of its tokens `ids` [S] from the second on, in arrays [S - 1]."""
    import numpy as np
    import torch

    found: dict[str, list[np.ndarray]] = {}

    def add(name: str, values: torch.Tensor) -> None:
        found.setdefault(name, []).append(values.double().cpu().numpy())

    targets = ids[1:].to(logits.device)
    for start in range(0, len(targets), _ROWS):
        log = torch.log_softmax(logits[:-1][start : start + _ROWS].float(), dim=-1)
        add("nats", -log.gather(1, targets[start : start + _ROWS, None])[:, 0])
        if reference is not None:
            base = torch.log_softmax(reference[:-1][start : start + _ROWS].float(), dim=-1)
            likely, expected = log.exp(), base.exp()
            add("divergence", (expected * (base - log)).sum(-1))
            add("agreement", log.argmax(-1) == base.argmax(-1))
            add("overlap", torch.minimum(likely, expected).sum(-1))
    figures = {name: np.concatenate(values) for name, values in found.items()}
    if not math.isfinite(figures["nats"].sum()):
        raise CheckpointError("the model computes NaN or infinite logits", "`moesurgery validate` looks for bad values")
    return TokenFigures(**figures)


def window_loss(logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> tuple[float, float]:
    """Return the summed loss of one window's predictions, and the summed KL(reference || logits)."""
    figures = token_figures(logits, reference, ids)
    return float(figures.nats.sum()), 0.0 if figures.divergence is None else float(figures.divergence.sum())


def _together(domains: Sequence[Domain]) -> Tokens:
    import torch

    return Tokens(torch.cat([domain.windows for domain in domains]))


def mean_loss(found: Sequence[Loss]) -> Loss:
    """Return the mean over domains, weighted by tokens."""
    import numpy as np

    tokens = sum(loss.tokens for loss in found)

    def mean(name: str) -> Any:
        values = [getattr(loss, name) for loss in found]
        if any(value is None for value in values):
            return None
        return sum(value * loss.tokens for value, loss in zip(values, found, strict=True)) / tokens

    def joined(name: str) -> Any:
        parts = [part for loss in found if (part := getattr(loss.by_token, name, None)) is not None]
        return np.concatenate(parts) if len(parts) == len(found) else None

    figures = TokenFigures(joined("nats"), joined("divergence"), joined("agreement"), joined("overlap"))
    return Loss("all", tokens, mean("nats"), mean("divergence"), mean("agreement"), mean("overlap"), figures)


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Return the longest window that the model's positions allow."""
    for place in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        value = place.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None
