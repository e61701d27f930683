"""Two models compared on the same text, per token: loss, KL, agreement, and confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.forward.bootstrap import interval
from moesurgery.forward.loss import Loss
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import joined

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TokenDistance:
    """How far a model is from the reference over some predicted tokens: means per token.

    `over` is the loss over the reference's in nats; `kl` KL(reference || model); `agreement` the share of tokens where
    both have the same likeliest one; `overlap` the sum of the lesser of both probabilities.
    """

    tokens: int
    over: float
    kl: float
    agreement: float
    overlap: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class WorstWindow:
    """A window of text on which a model lost most: its number in the domain, and its nats over the reference's."""

    domain: str
    window: int
    over: float


def token_distance(reference: Loss, model: Loss, chosen: np.ndarray | None = None) -> TokenDistance:
    """Return how far a model is from the reference on the tokens `chosen` (booleans [windows, length - 1]), or all."""
    import numpy as np

    base, other = reference.by_token, model.by_token
    assert base is not None
    assert other is not None
    rows = np.ones(base.nats.shape, bool) if base.counted is None else base.counted
    rows = rows if chosen is None else rows & chosen
    values = (other.nats - base.nats, other.divergence, other.agreement, other.overlap)
    return TokenDistance(
        int(rows.sum()), *(float(value[rows].sum()) / max(1, int(rows.sum())) for value in values if value is not None)
    )


def over_interval(reference: Loss, model: Loss) -> tuple[float, float]:
    """Return the 95 % bootstrap interval, over windows, of a model's loss over the reference's."""
    return interval(model.by_window - reference.by_window, reference.window_tokens)


def targets(domains: Sequence[Domain]) -> np.ndarray:
    """Return the tokens that are predicted [windows, length - 1], all domains one after the other.

    Entries at padding are not tokens that count.
    """
    predicted: np.ndarray = joined([domain.as_tokens for domain in domains]).ids[:, 1:].numpy()
    return predicted


def worst_windows(
    domains: Sequence[Domain], reference: Sequence[Loss], model: Sequence[Loss], count: int
) -> list[WorstWindow]:
    """Return the windows on which a model lost most against the reference, the worst first."""
    windows = [
        WorstWindow(domain.name, window, float(over))
        for domain, base, other in zip(domains, reference, model, strict=False)
        for window, over in enumerate(other.by_window - base.by_window)
        if base.window_tokens[window]
    ]
    return sorted(windows, key=lambda window: -window.over)[:count]
