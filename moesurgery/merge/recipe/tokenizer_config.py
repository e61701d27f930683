"""What a merge recipe may say of the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenSource:
    """Where the embedding of a token comes from: a model's row for `token` or `number`, or zeros (model None).

    `force`: also in models that have the token.
    """

    model: str | None
    token: str | None = None
    number: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """What a recipe says: `source` is "base", "union" or a model; `tokens` by their text; `multiple` to pad rows to."""

    source: str
    tokens: Mapping[str, TokenSource | None] = field(default_factory=dict)
    multiple: int | None = None
