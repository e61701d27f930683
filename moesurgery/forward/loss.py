"""Held-out loss of plans, written or not: of one, or of several together with their KL to the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.device_threads import side_by_side
from moesurgery.forward.engine import Engine
from moesurgery.forward.lockstep import run_layers
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens, joined, shared_out

if TYPE_CHECKING:
    import numpy as np
    import torch

_ROWS = 512  # of logits per softmax call
_NUMBERS_GPU = 1 << 26  # of logits per softmax call on a GPU, if that is more rows


@dataclass(frozen=True)
class TokenFigures:
    """Per-token metrics of a model, [windows, length - 1] each, in float64.

    `nats` is the negative log likelihood. Against the reference: `divergence` is KL(reference || model), `agreement`
    1 where both have the same likeliest token, `overlap` the sum over the vocabulary of the lesser of both
    probabilities: the share of tokens sampled from one that speculative decoding by the other would accept. Those are
    None for the reference itself. `counted` is False, and all else zero, for padding and tokens that do not count;
    None where every token does.
    """

    nats: np.ndarray
    divergence: np.ndarray | None = None
    agreement: np.ndarray | None = None
    overlap: np.ndarray | None = None
    counted: np.ndarray | None = None

    def of(self, window: int) -> TokenFigures:
        """Return the figures of one window."""
        each = (self.nats, self.divergence, self.agreement, self.overlap, self.counted)
        return TokenFigures(*(None if values is None else values[window] for values in each))  # type: ignore[arg-type]


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
    def window_tokens(self) -> np.ndarray:
        """The number of predicted tokens of each window [windows]."""
        import numpy as np

        assert self.by_token is not None
        counted, nats = self.by_token.counted, self.by_token.nats
        return np.full(len(nats), nats.shape[1]) if counted is None else np.asarray(counted.sum(axis=1))

    @property
    def by_window(self) -> np.ndarray:
        """Mean nats of each window [windows]; zero where none of its tokens counts."""
        import numpy as np

        assert self.by_token is not None
        means: np.ndarray = self.by_token.nats.sum(axis=1) / np.maximum(self.window_tokens, 1)
        return means


def losses(engine: Engine, domains: Sequence[Domain], progress: Progress = lambda count: None) -> list[Loss]:
    """Return the loss on each domain, with log-probabilities in float32."""
    return losses_over([engine], domains, progress)


def losses_over(
    engines: Sequence[Engine], domains: Sequence[Domain], progress: Progress = lambda count: None
) -> list[Loss]:
    """Return what `losses` returns, with the windows split among engines of one model on several devices."""
    return losses_of_several([[engine] for engine in engines], domains, progress)[0]


def losses_of_several(
    groups: Sequence[Sequence[Engine]], domains: Sequence[Domain], progress: Progress = lambda count: None
) -> list[list[Loss]]:
    """Return for each of several models what `losses_over` returns of it alone, to the bit on the processor.

    The windows are split among `groups` of engines: all models on one device each. The models of a group run in
    lockstep (`lockstep`), as many at a time as there is memory for their hidden states.
    """

    def figures(engines: Sequence[Engine], windows: Tokens) -> list[dict[int, TokenFigures]]:
        count = engines[0].models_at_once(windows)
        parts = [engines[i : i + count] for i in range(0, len(engines), count)]
        return [each for part in parts for each in _figures(part, windows, progress, together=False)]

    return _over(groups, domains, figures)


def compared(
    engines: Sequence[Engine], domains: Sequence[Domain], progress: Progress = lambda count: None
) -> list[list[Loss]]:
    """Return for each engine the loss on each domain; for all but the first, with KL(first || it).

    All models go through their layers in lockstep, then through their heads together, batch by batch, so that logits
    are never kept. Memory: the hidden states of the windows once per model.
    """
    return compared_over([engines], domains, progress)


def compared_over(
    groups: Sequence[Sequence[Engine]], domains: Sequence[Domain], progress: Progress = lambda count: None
) -> list[list[Loss]]:
    """Return what `compared` returns, with the windows split among groups of engines: all models on one device each."""
    return _over(groups, domains, lambda engines, windows: _figures(engines, windows, progress, together=True))


def _over(
    groups: Sequence[Sequence[Engine]],
    domains: Sequence[Domain],
    figures: Callable[[Sequence[Engine], Tokens], list[dict[int, TokenFigures]]],
) -> list[list[Loss]]:
    """Return the losses of each model by domain, with the windows split among groups of engines, of which `figures`
    computes what `_figures` does."""
    parts = shared_out(_together(domains), len(groups))
    jobs = [partial(figures, group, part) for group, part in zip(groups, parts, strict=False)]
    by_part = side_by_side(jobs)
    by_model = [
        [part[model][i] for part in by_part for i in range(len(part[model]))] for model in range(len(groups[0]))
    ]
    starts = [sum(len(d.windows) for d in domains[:i]) for i in range(len(domains))]
    return [
        [_loss_of(d, windows[start : start + len(d.windows)]) for d, start in zip(domains, starts, strict=True)]
        for windows in by_model
    ]


def _figures(
    engines: Sequence[Engine], windows: Tokens, progress: Progress, *, together: bool
) -> list[dict[int, TokenFigures]]:
    """Return for each engine the figures of each window; where the heads run `together`, against the first engine's."""
    if together and len({engine.vocabulary for engine in engines}) > 1:
        raise RefusedError(
            "the models have different vocabularies: " + ", ".join(str(engine.vocabulary) for engine in engines),
            "compare models with one tokenizer",
        )
    figures: list[dict[int, TokenFigures]] = [{} for _ in engines]  # of each window
    sizes = [engine.windows_per_batch(windows, True) for engine in engines]
    sharing = sum(engine.meta_model.donor is engines[0].meta_model for engine in engines)
    runs: list[BatchPasses] = []
    try:
        for engine, size in zip(engines, sizes, strict=True):
            beside = sharing if engine is engines[0] else 0
            runs.append(engine.start(windows, batch=min(sizes) if together else size, beside=beside))
        run_layers(runs, progress)
        for group in [range(len(runs))] if together else [[i] for i in range(len(runs))]:
            heads = min(engines[i].windows_per_head(windows) for i in group)
            for number in range(len(runs[group[0]])):
                for ends in zip(*(runs[i].logits(number, heads) for i in group), strict=True):
                    first, part, reference = ends[0]
                    for i, (_, _, logits) in zip(group, ends, strict=True):
                        found = token_figures(logits, None if logits is reference else reference, part.ids)
                        figures[i] |= {first + row: found.of(row) for row in range(len(part))}
            for i in group:
                runs[i].close()
    finally:
        for run in runs:
            run.close()
    return figures


def _loss_of(domain: Domain, windows: Sequence[TokenFigures]) -> Loss:
    """Return the loss on a domain from the figures of its windows, which may be padded further than they need, or less.

    Raises CheckpointError where a loss is not finite.
    """
    import numpy as np

    counts = domain.as_tokens.counts
    counted = None if counts is None else counts[:, 1:].numpy()
    names = ("nats",) if windows[0].divergence is None else ("nats", "divergence", "agreement", "overlap")
    width = domain.windows.shape[1] - 1
    values = {name: np.stack([_wide(getattr(window, name)[:width], width) for window in windows]) for name in names}
    if counted is not None:
        values = {name: np.where(counted, value, 0.0) for name, value in values.items()}
    check_finite(float(values["nats"].sum()))
    means = {name: float(value.sum()) / domain.tokens for name, value in values.items()}
    return Loss(domain.name, domain.tokens, **means, by_token=TokenFigures(**values, counted=counted))


def _wide(values: np.ndarray, width: int) -> np.ndarray:
    """Return an array with zeros at the end of its last axis, `width` long."""
    import numpy as np

    if values.shape[-1] == width:
        return values
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


def token_figures(logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> TokenFigures:
    """Return the metrics [b, S - 1] of windows of tokens `ids` [b, S] from the second on, given logits [b, S, V]."""
    return TokenFigures(**{n: values.cpu().numpy() for n, values in _by_token(logits, reference, ids).items()})


def _by_token(logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the fields of `TokenFigures` for windows, in float64 on the device of their logits.

    All rows of logits are gone through, also those of last tokens, which predict nothing: so none is copied.
    """
    import torch

    by_field: dict[str, list[torch.Tensor]] = {}

    def add(name: str, values: torch.Tensor) -> None:
        by_field.setdefault(name, []).append(values.double())

    targets = ids.to(logits.device).roll(-1, dims=-1).flatten()
    logits, reference = logits.flatten(0, -2), None if reference is None else reference.flatten(0, -2)
    step = max(_ROWS, _NUMBERS_GPU // logits.shape[-1]) if logits.is_cuda else _ROWS
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        log = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        add("nats", -log.gather(1, targets[rows, None])[:, 0])
        if reference is not None:
            base = torch.log_softmax(reference[rows], dim=-1, dtype=torch.float32)
            likely, expected = log.exp(), base.exp()
            add("divergence", (expected * (base - log)).sum(-1))
            add("agreement", log.argmax(-1) == base.argmax(-1))
            add("overlap", torch.minimum(likely, expected).sum(-1))
    return {name: torch.cat(values).view(ids.shape)[..., :-1] for name, values in by_field.items()}


def summed_loss(logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Return the summed loss of windows, given logits [b, S, V]: a float64 scalar on their device, not waited for."""
    import torch

    nats = _by_token(logits, None, tokens.ids)["nats"]
    if tokens.counts is not None:
        nats = torch.where(tokens.counts[:, 1:].to(nats.device), nats, 0.0)
    return nats.sum()


def check_finite(nats: float) -> None:
    """Raise CheckpointError where a summed loss is not finite."""
    if not math.isfinite(nats):
        raise CheckpointError("the model computes NaN or infinite logits", "`moesurgery validate` looks for bad values")


def _together(domains: Sequence[Domain]) -> Tokens:
    return joined([domain.as_tokens for domain in domains])


def mean_loss(found: Sequence[Loss]) -> Loss:
    """Return the mean over domains, weighted by tokens."""
    tokens = sum(loss.tokens for loss in found)

    def mean(name: str) -> Any:
        values = [getattr(loss, name) for loss in found]
        if any(value is None for value in values):
            return None
        return sum(value * loss.tokens for value, loss in zip(values, found, strict=True)) / tokens

    figures = [loss.by_token for loss in found if loss.by_token is not None]
    together = _all_windows(figures) if len(figures) == len(found) else None
    return Loss("all", tokens, mean("nats"), mean("divergence"), mean("agreement"), mean("overlap"), together)


def _all_windows(parts: Sequence[TokenFigures]) -> TokenFigures:
    """Return the figures of all windows of several texts, one after the other, the shorter padded on the right."""
    import numpy as np

    width = max(part.nats.shape[1] for part in parts)

    def joined_values(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if any(v is None for v in values) else np.concatenate([_wide(v, width) for v in values])

    counted = None
    if any(part.counted is not None or part.nats.shape[1] < width for part in parts):
        each = [np.ones(part.nats.shape, bool) if part.counted is None else part.counted for part in parts]
        counted = np.concatenate([_wide(rows, width) for rows in each])
    return TokenFigures(
        np.concatenate([_wide(part.nats, width) for part in parts]),
        joined_values("divergence"),
        joined_values("agreement"),
        joined_values("overlap"),
        counted,
    )


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Return the longest window that the model's positions allow."""
    inner = checkpoint.config.get("text_config")
    for place in (checkpoint.config, inner if isinstance(inner, dict) else {}):
        value = place.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None
