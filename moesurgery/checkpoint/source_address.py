"""Which source an address names: a directory, a GGUF file, `hf://…`, a URL."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from moesurgery.checkpoint.remote_source import RemoteSource, open_hub
from moesurgery.checkpoint.source import MAX_FILES, LocalSource, Source
from moesurgery.errors import CheckpointError

# The address that a browser shows for a model; `kind` is what else the Hub has.
_HUB_PAGE = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/((?P<kind>datasets|spaces|collections|docs)/)?"
    r"(?P<name>[\w.-]+/[\w.-]+)?(/(tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)


def open_source(reference: str | Path) -> Source:
    """Return the source that `reference` names: a directory, a GGUF file, `hf://…`, a URL.

    Raises CheckpointError for a path that does not exist; a bare `org/name` is not looked up on the Hub,
    so that a typing error never reaches the network.
    """
    text = str(reference)
    if text.startswith("hf://"):
        return open_hub(text)
    if page := _HUB_PAGE.match(text):
        kind, name, revision = page["kind"], page["name"], page["revision"]
        if kind or not name:
            raise CheckpointError(f"{text} is a page of the Hub, and no model", "name a model: hf://org/name")
        raise CheckpointError(
            f"{text} is a page of the Hub", f"write hf://{name}{f'@{revision}' if revision else ''} for the model"
        )
    if "://" in text:
        if text.lower().endswith(".gguf"):
            folder, _, chosen = text.rpartition("/")
            return RemoteSource(url=folder, label=folder, chosen=chosen)
        return RemoteSource(url=text, label=text)
    path = Path(text)
    if os.path.isdir(text):  # False for a name that no file can have
        return LocalSource(path)
    if os.path.isfile(text):
        if path.suffix.lower() == ".gguf":
            return LocalSource(path.parent, chosen=path.name)
        raise CheckpointError(f"{text} is a file, not a checkpoint directory", f"try {path.parent}")
    hint = None
    if text.startswith("hf:"):
        hint = f"for a model on the Hub write hf://{text.removeprefix('hf:').lstrip('/')}"
    elif near := nearest_path(path):
        hint = f"did you mean {near}?"
    elif len(path.parts) == 2 and not path.is_absolute() and not text.startswith("."):
        hint = f"for a model on the Hub write hf://{text}"
    raise CheckpointError(f"{text}: no such directory", hint)


def nearest_path(path: Path) -> Path | None:
    """Return the entry beside `path` with the most similar name; None where there is none."""
    try:
        beside = [name for _, name in zip(range(MAX_FILES), sorted(os.listdir(path.parent)), strict=False)]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, [name for name in beside if not name.startswith(".")], n=1)
    return path.with_name(close[0]) if close else None
