"""C08 and C09: embedding, head, and the tokens that the configs name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.errors import CheckpointError
from moesurgery.families.components import EMBEDDING, HEAD
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context

GENERATION = "generation_config.json"
_CLASSIFIERS = ("score.", "classifier.")  # heads over classes, not words
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def embedding_of(subject: Context) -> str | None:
    """Return the name of the word embedding [V, H]."""
    return _matrix(subject, EMBEDDING)


def head_of(subject: Context) -> str | None:
    """Return the name of the head [V, H]."""
    return _matrix(subject, HEAD)


def _matrix(subject: Context, component: str) -> str | None:
    hidden = subject.setting("hidden")
    matrices = [
        name
        for name, component_of in subject.anatomy.component.items()
        if component_of == component
        and name.endswith("weight")
        and not name.startswith(_CLASSIFIERS)
        and len(subject.tensors[name].shape) == 2
    ]
    # A stack may have embeddings of positions as well: the vocabulary is the largest that reads the hidden size.
    return max(
        matrices,
        key=lambda name: (hidden == subject.tensors[name].shape[1], subject.tensors[name].shape[0]),
        default=None,
    )


def is_tied(subject: Context) -> Any:
    """Return what the config says of tying head and embedding; None where it says nothing.

    Where models are wrapped, the head belongs to the wrapper, and so does the say.
    """
    keys = ("tie_word_embeddings", "tie_embedding")
    own = next((subject.config[key] for key in keys if subject.config.get(key) is not None), None)
    return subject.anatomy.settings.first(keys) if own is None else own


@check("C08")
def head(subject: Context) -> Outcome:
    """Tied: no head, or one of the embedding's shape (V06 compares the values). Untied: a head."""
    tied, embedding, output = is_tied(subject), embedding_of(subject), head_of(subject)
    if embedding is None:
        yield NotChecked(("C08", "C09"), "no embedding was recognised by its name")
    elif tied is None:
        yield NotChecked(("C08",), "config.json does not say whether the head is tied: C03 asks the model class")
    elif type(tied) is not bool:
        yield finding("C08", f"tie_word_embeddings is {tied!r}, expected true or false", CONFIG)
    elif output is None:
        other = any(c == HEAD or n.startswith(_CLASSIFIERS) for n, c in subject.anatomy.component.items())
        if not tied and not other:
            message = "tie_word_embeddings is false and there is no head: loaders make up a random one"
            yield finding("C08", message, CONFIG)
    elif tied and subject.tensors[output].shape != subject.tensors[embedding].shape:
        mine, other_shape = (list(subject.tensors[name].shape) for name in (output, embedding))
        message = f"has shape {mine}; it is tied to the embedding of shape {other_shape}"
        yield finding("C08", message, tensor=output)


@check("C09")
def check_vocabulary(subject: Context) -> Outcome:
    """The embedding has a row for every token, and the special tokens are among them."""
    embedding, output = embedding_of(subject), head_of(subject)
    if embedding is None:
        return  # C08 says so
    stated = subject.anatomy.settings.first(("vocab_size", "padded_vocab_size"))
    rows = subject.tensors[embedding].shape[0]
    if stated is None:
        yield NotChecked(("C09",), "config.json names no vocab_size")
    elif type(stated) is not int:
        yield finding("C09", f"vocab_size is {stated!r}, expected a whole number", CONFIG)
    else:
        for name in (embedding, output):
            if name is not None and subject.tensors[name].shape[0] != stated:
                message = f"has {subject.tensors[name].shape[0]} rows; vocab_size is {stated}"
                yield finding("C09", message, tensor=name)
    for part in subject.anatomy.settings.sections():
        for key, value in _outside(part, rows):
            yield finding("C09", f"{key} is {value!r}; the embedding has {rows} rows", CONFIG)
    yield from _generation(subject, rows)


def _outside(config: Mapping[str, Any], rows: int) -> Iterator[tuple[str, Any]]:
    """Yield the special tokens that have no row. A padding token of -1 means none."""
    for key in _SPECIAL:
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is None or (value == -1 and type(value) is int):
                continue
            if type(value) is not int or not 0 <= value < rows:
                yield key, value


def _generation(subject: Context, rows: int) -> Outcome:
    try:
        generation = subject.object(GENERATION)
    except (ValueError, CheckpointError) as error:
        yield finding("C09", str(error), GENERATION, severity="warning")
        return
    if generation is None:
        return
    for key, value in _outside(generation, rows):
        yield finding("C09", f"{key} is {value!r}; the embedding has {rows} rows", GENERATION, severity="warning")
    ends: set[int] = set()
    for part in subject.anatomy.settings.sections():
        ends |= _tokens(part.get("eos_token_id"))
    generated = _tokens(generation.get("eos_token_id"))
    if ends and generated and not ends & generated:
        message = f"eos_token_id is {sorted(generated)}; config.json has {sorted(ends)}"
        yield finding("C09", message, GENERATION, severity="warning", hint="is one of the files from another model?")


def _tokens(value: Any) -> set[int]:
    return {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
