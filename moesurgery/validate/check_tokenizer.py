"""T: the tokenizer beside the weights. Its JSON is read; no tokenizer is built, no template rendered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moesurgery.checkpoint.filenames import TOKENIZER, TOKENIZER_CONFIG
from moesurgery.errors import CheckpointError
from moesurgery.validate.chat_template_scan import chat_templates
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.check_vocabulary import embedding_of
from moesurgery.validate.context import Context

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@check("T01")
def ids(subject: Context) -> Outcome:
    """The highest id, added tokens among them, has a row in the embedding. Fewer ids than rows is normal."""
    try:
        tokenizer = subject.object(TOKENIZER)
    except (ValueError, CheckpointError) as error:
        yield finding("T01", str(error), TOKENIZER)
        return
    if tokenizer is None:
        yield NotChecked(("T01",), f"there is no {TOKENIZER}")
        return
    tokens = dict(_tokens(tokenizer))
    if not tokens:
        yield finding("T01", "holds no vocabulary", TOKENIZER)
        return
    wrong = [(word, number) for word, number in tokens.items() if type(number) is not int or number < 0]
    if wrong:
        word, number = wrong[0]
        yield finding("T01", f"the token {word!r} has the id {number!r}", TOKENIZER)
        return
    embedding = embedding_of(subject) if subject.sound else None
    if embedding is None:
        yield NotChecked(("T01",), "no embedding to compare the tokenizer's ids with")
        return
    rows = subject.tensors[embedding].shape[0]
    beyond = sorted((number, word) for word, number in tokens.items() if number >= rows)
    if beyond:
        number, word = beyond[-1]
        message = f"{len(beyond)} tokens up to {word!r} (id {number}) have no row in the embedding of {rows}"
        yield finding("T01", message, TOKENIZER, hint="is the tokenizer from another model?")


def _tokens(tokenizer: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (token, id) of a tokenizer.json: a mapping (BPE, WordPiece) or a list of [token, score] (Unigram)."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):
        for number, entry in enumerate(vocabulary):
            word = entry[0] if isinstance(entry, list) and entry else entry
            yield str(word), number
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict):
            yield str(entry.get("content")), entry.get("id")


@check("T02")
def special(subject: Context) -> Outcome:
    """The special tokens that tokenizer_config.json names exist, and the chat template is one."""
    for template in chat_templates(subject):
        if isinstance(template.parsed, str):
            yield finding("T02", f"{template.place} {template.parsed}", template.file)
    try:
        config = subject.object(TOKENIZER_CONFIG)
    except (ValueError, CheckpointError) as error:
        yield finding("T02", str(error), TOKENIZER_CONFIG)
        return
    tokenizer = subject.object_or_none(TOKENIZER)
    if config is None or tokenizer is None:
        missing = TOKENIZER_CONFIG if config is None else TOKENIZER
        yield NotChecked(("T02",), f"special tokens: there is no readable {missing}")
        return
    known = {word for word, _ in _tokens(tokenizer)}
    decoder = config.get("added_tokens_decoder")
    for entry in decoder.values() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict):
            known.add(str(entry.get("content")))
    for role in _ROLES:
        value = config.get(role)
        word = value.get("content") if isinstance(value, dict) else value
        if isinstance(word, str) and word not in known:
            yield finding("T02", f"{role} is {word!r}, which the tokenizer does not have", TOKENIZER_CONFIG)
