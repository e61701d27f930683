"""Text into windows of tokens: the input of everything that measures a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def load_tokenizer(model: str | Path) -> Any:
    """Return the fast tokenizer in `tokenizer.json`. Raises CheckpointError where there is none."""
    from tokenizers import Tokenizer

    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", "copy the tokenizer beside the model")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_domain(path: str | Path, tokenizer: Any, start_token: int | None, length: int, limit: int | None) -> Domain:
    """Cut a text file into windows of `length` tokens, each document after `start_token`; the rest is dropped.

    `limit` bounds the number of windows. Raises RecipeError for an unreadable or too short file.
    """
    import torch

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path} cannot be read: {reason}") from None
    ids: list[int] = []
    for document in documents(text):
        if start_token is not None:
            ids.append(start_token)
        ids += tokenizer.encode(document, add_special_tokens=False).ids
        if limit is not None and len(ids) >= limit * length:
            break
    count = len(ids) // length
    if count == 0:
        raise RecipeError(
            f"{path} has {len(ids)} tokens, less than one window of {length}", "give more text or a smaller --window"
        )
    count = min(count, limit) if limit is not None else count
    return Domain(Path(path).stem, torch.tensor(ids[: count * length]).view(count, length))


def documents(text: str) -> Sequence[str]:
    """Split a file at its form feeds; a file without them is one document."""
    return [part.strip("\n") for part in text.split(DOCUMENT_BREAK) if part.strip()]


def start_token(config: Any) -> int | None:
    """Return the token that begins a document, from the config."""
    for place in (config, config.get("text_config") or {}):
        value = place.get("bos_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int):
            return value
    return None
