"""Text into windows of tokens: the input of everything that measures a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import TOKENIZER
from moesurgery.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch

DOCUMENT_BREAK = "\f"  # a form feed on a line of its own separates documents in a text file


@dataclass(frozen=True)
class Domain:
    """Windows of token ids [windows, length] from one file."""

    name: str
    windows: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return int(self.windows.shape[0] * (self.windows.shape[1] - 1))


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


def read_domain(
    path: str | Path,
    tokenizer: Callable[[], Any],
    start_token: int | None,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    vocabulary: int | None = None,
) -> Domain:
    """Cut a file into windows of `length` tokens, each text after `start_token`; the rest is dropped.

    A `.jsonl` file has a document per line, as text or as token ids (`input_ids`, padding marked by
    `attention_mask` left out); any other file is text, for which `tokenizer()` is asked. `limit` bounds the number
    of windows: the first ones, or with `seed` a sample. Raises RecipeError for an unreadable or too short file, and
    for a token that the model's `vocabulary` does not have.
    """
    import numpy as np
    import torch

    enough = limit * length if limit is not None and seed is None else None
    ids: list[int] = []
    for document in _documents(path):
        if isinstance(document, str):
            if start_token is not None:
                ids.append(start_token)
            ids += tokenizer().encode(document, add_special_tokens=False).ids
        else:
            ids += document
        if enough is not None and len(ids) >= enough:
            break
    if vocabulary is not None and max(ids, default=0) >= vocabulary:
        raise RecipeError(
            f"{path} has the token {max(ids)}, and the model has {vocabulary:,} tokens, 0 to {vocabulary - 1}",
            "the tokenizer that made it is another model's",
        )
    count = len(ids) // length
    if count == 0:
        raise RecipeError(
            f"{path} has {len(ids)} tokens, less than one window of {length}", "give more text or a smaller --window"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    if limit is not None and limit < count:
        chosen = range(limit) if seed is None else sorted(np.random.default_rng(seed).permutation(count)[:limit])
        windows = windows[list(map(int, chosen))]
    return Domain(Path(path).stem, windows)


def _documents(path: str | Path) -> Iterator[str | list[int]]:
    """Yield the documents of a file: texts, or lists of token ids."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        reason, hint = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text", None
        if isinstance(error, UnicodeDecodeError):
            hint = f"convert it first, as with `iconv -f latin1 -t utf-8 {path}`"
        raise RecipeError(f"{path} cannot be read: {reason}", hint) from None
    if not str(path).endswith(".jsonl"):
        yield from documents(text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also cut at U+2028, inside of strings
        if line.strip():
            yield _record(line, f"{path}:{number}")


def _record(line: str, where: str) -> str | list[int]:
    """Read one line of JSON: {"text": …}, {"input_ids": […]}, or a bare list of ids."""
    hint = 'a line is {"text": "…"}, {"input_ids": [1, 2, …]} or [1, 2, …]'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where}: not JSON: {error}", hint) from None
    mask = None
    if isinstance(value, dict):
        mask = value.get("attention_mask")
        value = value.get("text", value.get("input_ids"))
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        if mask is None:
            return value
        if isinstance(mask, list) and len(mask) == len(value):
            return [v for v, real in zip(value, mask, strict=True) if real]
        raise RecipeError(f"{where}: attention_mask is no list of {len(value)}, as input_ids is", hint)
    raise RecipeError(f"{where}: neither text nor token ids", hint)


def documents(text: str) -> Sequence[str]:
    """Split a file at its form feeds; a file without them is one document."""
    return [part.strip("\n") for part in text.split(DOCUMENT_BREAK) if part.strip()]


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
