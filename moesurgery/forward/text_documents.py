"""The documents of a file: plain text, JSON lines or Parquet, on this machine or behind a URL.

A record is a conversation (`messages`, with `tools`; or `conversations`), a `prompt` with its `completion`, `text`, or
token ids (`input_ids`, padding marked by `attention_mask` left out).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.errors import RecipeError
from moesurgery.forward.chat_text import messages_of

DOCUMENT_BREAK = "\f"  # a form feed on a line of its own separates documents in a text file
HINT = (
    'a line is {"messages": […]}, {"prompt": …, "completion": …}, {"text": "…"}, {"input_ids": [1, 2, …]} or [1, 2, …]'
)


@dataclass(frozen=True)
class Text:
    """A file of text, and its share of the calibration tokens relative to others."""

    path: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return hashlib.sha256(read_bytes(self.path)).hexdigest()

    def __str__(self) -> str:
        return self.path


def text_of(given: str) -> Text:
    """Read FILE or FILE=WEIGHT. Raises RecipeError for a weight that is no positive number."""
    path, separator, weight = given.rpartition("=")
    if not separator or Path(given).exists() or not re.fullmatch(r"[0-9.]+", weight):
        return Text(given)
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise RecipeError(f"--text {given}: the weight {weight!r} is no positive number")
    return Text(path, value)


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: Any = None


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


TextDocument = str | list[int] | Conversation | Completion


def read_bytes(path: str) -> bytes:
    """Return a file's bytes. A URL is opened by fsspec: `hf://datasets/org/name/file`, `s3://…`, `https://…`.

    Raises RecipeError where it cannot be read.
    """
    if "://" not in path:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each fsspec filesystem raises its own exception types
        raise RecipeError(
            f"{path} cannot be read: {error or type(error).__name__}",
            "a file of a dataset is hf://datasets/org/name/path/in/it",
        ) from None


def documents(path: str) -> Iterator[tuple[TextDocument, str]]:
    """Yield the documents of a file, each with its location. Raises RecipeError for an invalid record."""
    data = read_bytes(path)
    if path.endswith(".parquet"):
        yield from _parquet(data, path)
        return
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path} cannot be read: it is not UTF-8 text",
            f"convert it first, as with `iconv -f latin1 -t utf-8 {path}`",
        ) from None
    if not path.endswith(".jsonl"):
        for number, part in enumerate(part for part in text.split(DOCUMENT_BREAK) if part.strip()):
            yield part.strip("\n"), f"{path}, document {number + 1}"
        return
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also cut at U+2028, inside of strings
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{where}: not JSON: {error}", HINT) from None
            yield record(value, where), where


def _parquet(data: bytes, path: str) -> Iterator[tuple[TextDocument, str]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise RecipeError(f"{path}: reading Parquet needs pyarrow", "pip install 'moesurgery[parquet]'") from None
    try:
        file = ParquetFile(pyarrow.BufferReader(data))
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield record(_without_nothing(row), f"{path}, row {number}"), f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        raise RecipeError(f"{path} cannot be read as Parquet: {error}") from None


def _without_nothing(value: Any) -> Any:
    """Return a value without the keys that are None: Arrow gives every message every key that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nothing(v) for key, v in value.items() if v is not None}
    return [_without_nothing(v) for v in value] if isinstance(value, list) else value


def record(value: Any, where: str) -> TextDocument:
    """Read one record. Raises RecipeError where it is none of the forms above."""
    if isinstance(value, Mapping):
        try:
            for key in ("messages", "conversations"):
                if isinstance(value.get(key), list):
                    return Conversation(messages_of(value[key]), _tools(value.get("tools")))
            if "prompt" in value and "completion" in value:
                return _completion(value["prompt"], value["completion"], value.get("tools"))
        except ValueError as error:
            raise RecipeError(f"{where}: {error}", HINT) from None
    mask = None
    if isinstance(value, Mapping):
        mask = value.get("attention_mask")
        value = value.get("text", value.get("input_ids"))
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        if mask is None:
            return value
        if isinstance(mask, list) and len(mask) == len(value):
            return [v for v, real in zip(value, mask, strict=True) if real]
        raise RecipeError(f"{where}: attention_mask is no list of {len(value)}, as input_ids is", HINT)
    raise RecipeError(f"{where}: neither text nor token ids", HINT)


def _completion(prompt: Any, completion: Any, tools: Any) -> TextDocument:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, Sequence) and isinstance(completion, Sequence) and not isinstance(prompt, str):
        return Conversation(messages_of([*prompt, *completion]), _tools(tools))
    raise ValueError("prompt and completion are neither texts nor messages")


def _tools(value: Any) -> Any:
    """Return tools as a list; some datasets keep them as a text of JSON."""
    return (json.loads(value) if isinstance(value, str) else value) or None
