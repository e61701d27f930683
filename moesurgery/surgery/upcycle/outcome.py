"""What an upcycle does to the real model, before it is written: logits on a prompt, and loss on text.

Both models are streamed layer by layer in float32 (`forward.engine`), so they may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    from moesurgery.forward.text_windows import Domain

_PROMPT = 256  # tokens
_WINDOW = 512
WINDOWS = 20  # of each text
_TOLERANCE = 1e-3  # of the largest logit, where the mixture should be exact: what rounding of factors may come to


def logits_compared(dense: Plan, mixture: Plan, texts: Sequence[str], *, exact: bool) -> tuple[str, dict[str, Any]]:
    """Compare real logits on one prompt: the beginning of the first text, or random tokens.

    Returns a line for people, and the figures. Raises RefusedError where an `exact` upcycle is not.
    """
    import torch

    from moesurgery.forward.engine import Engine
    from moesurgery.forward.tokens import Tokens

    before = Engine(dense)
    if texts:
        ids = _domains(dense, texts[:1], _PROMPT, 1)[0].windows
    else:
        length = _window(dense, _PROMPT)
        ids = torch.randint(before.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    expected, actual = before.logits(Tokens(ids)), Engine(mixture).logits(Tokens(ids))
    difference, scale = (expected - actual).abs().max().item(), expected.abs().max().item()
    if exact and not difference <= _TOLERANCE * max(1.0, scale):
        raise RefusedError(
            f"upcycle: the mixture's logits differ from the dense model's by {difference:.2g}, of up to {scale:.2g}",
            "nothing was written; please report it",
        )
    what = "the beginning of the text" if texts else "random tokens"
    text = (
        f"verified: on {ids.shape[1]} tokens ({what}) the real model's logits, up to {scale:.3g}, differ by"
        f" {difference:.1e} at most"
    )
    return text, {"max_logit_difference": difference, "max_logit": scale, "tokens": int(ids.shape[1])}


def loss_compared(dense: Plan, mixture: Plan, texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Measure the loss of both models on texts, and the KL divergence from the dense one's predictions."""
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.loss import compared, mean_loss

    domains = _domains(dense, texts, _WINDOW, WINDOWS)
    before, after = (mean_loss(losses) for losses in compared([Engine(dense), Engine(mixture)], domains))
    text = (
        f"measured on {after.tokens:,} tokens: {after.nats:.4f} nats per token, {after.nats - before.nats:+.4f} over"
        f" the dense model's {before.nats:.4f}; KL divergence {after.divergence:.5f}"
    )
    return text, {
        "tokens": after.tokens,
        "nats_before": before.nats,
        "nats_after": after.nats,
        "divergence": after.divergence,
    }


def _domains(dense: Plan, texts: Sequence[str], window: int, limit: int) -> list[Domain]:
    from moesurgery.forward.text_documents import Text
    from moesurgery.forward.text_windows import Reading, read_domain

    reading, length = Reading(dense.checkpoint), _window(dense, window)
    return [read_domain(Text(str(text)), reading, length, limit) for text in texts]


def _window(dense: Plan, wanted: int) -> int:
    from moesurgery.forward.loss import context_limit

    return min(wanted, context_limit(dense.checkpoint) or wanted)
