"""Text into windows of tokens: the input of every measurement of a model.

Windows are cut from the concatenated documents, or each document gets windows of its own (`apart`), padded on the
right, so that no document attends to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import TOKENIZER
from moesurgery.errors import CheckpointError, RecipeError
from moesurgery.forward.chat_text import ChatTemplate, Spans, load_chat_template
from moesurgery.forward.text_documents import Completion, Conversation, Text, TextDocument, documents
from moesurgery.forward.tokens import Tokens, padded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Domain:
    """Windows of token ids [windows, length] from one file; `mask` and `counted` as in `Tokens`."""

    name: str
    windows: torch.Tensor
    mask: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but the first of each window, padding and what does not count."""
        return self.as_tokens.predicted

    @property
    def as_tokens(self) -> Tokens:
        return Tokens(self.windows, self.mask, self.counted)

    def each(self, number: int) -> tuple[Domain, Domain]:
        """Return the windows without one in `number`, one at least, and those by themselves: the last ones, or where
        they are sorted by length, some of all lengths."""
        count, tokens = len(self.windows), self.as_tokens
        kept = max(1, count // number)
        chosen = set(range(count - kept, count) if self.mask is None else range(count - 1, -1, -number))

        def part(windows: list[int]) -> Domain:
            picked = tokens.of(windows)
            return Domain(self.name, picked.ids, picked.mask, picked.counted)

        return part([i for i in range(count) if i not in chosen]), part(sorted(chosen))


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the fast tokenizer in a checkpoint's `tokenizer.json`. Raises CheckpointError where there is none."""
    from tokenizers import Tokenizer

    where = f"{checkpoint.source.identity}/{TOKENIZER}"
    if TOKENIZER not in checkpoint.file_sizes:
        raise CheckpointError(f"{where} is missing", "copy the tokenizer beside the model, or give token ids as JSONL")
    data = checkpoint.source.read(TOKENIZER, 0, checkpoint.file_sizes[TOKENIZER])
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None


@dataclass
class Tokenised:
    """The ids of a document, and which of them are the assistant's; None where that was not asked."""

    ids: list[int]
    counted: list[bool] | None = None


@dataclass
class Reading:
    """How the documents of files become token ids for one model. `assistant`: only the assistant's tokens count."""

    checkpoint: Checkpoint
    assistant: bool = False
    vocabulary: int | None = field(init=False)
    start: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.vocabulary = token_count(self.checkpoint.config)
        self.start = start_token(self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @cached_property
    def chat(self) -> ChatTemplate:
        return load_chat_template(self.checkpoint)

    def documents(self, text: Text) -> Iterator[Tokenised]:
        """Yield the documents of a file. Raises RecipeError for a token that the model does not have."""
        for document, where in documents(text.path):
            tokenised = self._tokenised(document, where)
            if self.vocabulary is not None and max(tokenised.ids, default=0) >= self.vocabulary:
                raise RecipeError(
                    f"{text} has the token {max(tokenised.ids)}, and the model has {self.vocabulary:,} tokens, 0 to"
                    f" {self.vocabulary - 1}",
                    "the tokenizer that made it is another model's",
                )
            yield tokenised

    def _tokenised(self, document: TextDocument, where: str) -> Tokenised:
        if isinstance(document, list):
            if self.assistant:
                raise RecipeError(f"{where}: token ids do not say which are the assistant's")
            return Tokenised(document)
        if isinstance(document, Conversation):
            try:
                text, spans = self.chat.render(document.messages, document.tools, self.assistant)
            except ValueError as error:
                raise RecipeError(f"{where}: {error}") from None
            return self._encoded(text, spans, begin=False)
        if isinstance(document, Completion):
            whole = document.prompt + document.completion
            return self._encoded(whole, [(len(document.prompt), len(whole))])
        if self.assistant:
            raise RecipeError(f"{where}: plain text does not say which words are the assistant's", "give messages")
        return self._encoded(document, [])

    def _encoded(self, text: str, spans: Spans, *, begin: bool = True) -> Tokenised:
        """Return the ids of a text; a template writes the token that begins a document itself."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        first = [self.start] if begin and self.start is not None else []
        if not self.assistant:
            return Tokenised(first + encoded.ids)
        counted = [any(start < b and end > a for a, b in spans) for start, end in encoded.offsets]
        return Tokenised(first + encoded.ids, [False] * len(first) + counted)


def read_domain(
    text: Text,
    reading: Reading,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    *,
    skip: int = 0,
    apart: bool = False,
) -> Domain:
    """Return a file as windows of `length` tokens; what is left of the last one is dropped.

    With `apart` every document has windows of its own, sorted by length, and nothing is dropped. `limit` bounds the
    number of windows, or of tokens over `length` with `apart`: the first ones, or with `seed` a sample. `skip` leaves
    out the windows that a `limit` of as many would return: what comes after them has none where they are all.
    Raises RecipeError for an unreadable or too short file, and for a token that the model does not have.
    """
    import numpy as np
    import torch

    enough = (skip + limit) * length if limit is not None and seed is None else None
    tokenised: list[Tokenised] = []
    total = 0
    for document in reading.documents(text):
        tokenised.append(document)
        total += len(document.ids)
        if enough is not None and total >= enough:
            break
    if apart:
        return _apart(text, tokenised, length, limit, seed, skip)
    ids = [i for document in tokenised for i in document.ids]
    count = len(ids) // length
    if count == 0:
        raise RecipeError(
            f"{text} has {len(ids)} tokens, less than one window of {length}", "give more text or a smaller --window"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    counted = None
    if reading.assistant:
        counted = torch.tensor([c for d in tokenised for c in d.counted or ()][: count * length]).view(count, length)
    end = count if limit is None else skip + limit
    if skip > 0 or end < count:
        order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        rows = sorted(map(int, order[skip:end]))
        windows, counted = windows[rows], None if counted is None else counted[rows]
    return Domain(text.name.rpartition(".")[0] or text.name, windows, None, counted)


def _apart(text: Text, found: list[Tokenised], length: int, limit: int | None, seed: int | None, skip: int) -> Domain:
    """Return every document, cut where it is longer than a window, in windows of its own, the longest first."""
    import numpy as np

    pieces = [
        Tokenised(d.ids[at : at + length], None if d.counted is None else d.counted[at : at + length])
        for d in found
        for at in range(0, len(d.ids), length)
        if len(d.ids) - at > 1
    ]
    if seed is not None:
        pieces = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    if not pieces:
        raise RecipeError(f"{text} has no document of two tokens or more")
    before = np.cumsum([0, *(len(piece.ids) for piece in pieces)])[:-1]  # tokens of the pieces before each
    end = np.inf if limit is None else (skip + limit) * length
    pieces = [piece for piece, start in zip(pieces, before, strict=True) if skip * length <= start < end]
    pieces.sort(key=lambda piece: -len(piece.ids))
    tokens = padded([piece.ids for piece in pieces], [p.counted for p in pieces if p.counted is not None])
    return Domain(text.name.rpartition(".")[0] or text.name, tokens.ids, tokens.mask, tokens.counted)


def _inner(config: Any) -> Any:
    """Return the language model's own part of a config; empty where it has none."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def token_count(config: Any) -> int | None:
    """Return how many tokens a model has, from the config."""
    for place in (_inner(config), config):
        if isinstance(value := place.get("vocab_size"), int):
            return value
    return None


def start_token(config: Any) -> int | None:
    """Return the token that begins a document, from the config."""
    for place in (config, _inner(config)):
        value = place.get("bos_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int):
            return value
    return None
