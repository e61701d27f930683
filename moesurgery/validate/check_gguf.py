"""G13: the metadata of a GGUF against its tensors, and what llama.cpp's loader asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.gguf_files import ARCHITECTURE, CONFIG_KEYS
from moesurgery.validate.check import Outcome, check, finding
from moesurgery.validate.context import Context

MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_WANTED = ("block_count", "context_length", "embedding_length", "attention.head_count")
_TOKENS = "tokenizer.ggml.tokens"
_EMBEDDING = "token_embd.weight"


@check("G13")
def metadata(subject: Context) -> Outcome:
    """The keys without which llama.cpp does not load a model are there, and say what the tensors do."""
    header = subject.checkpoint.gguf
    assert header is not None
    architecture = header.values[ARCHITECTURE]
    for key in _WANTED:
        if f"{architecture}.{key}" not in header.values:
            yield finding("G13", f"has no {architecture}.{key}, without which llama.cpp loads no model", header.file)
    embedding = subject.tensors.get(_EMBEDDING)
    if embedding is None:
        yield finding("G13", f"has no {_EMBEDDING}", header.file)
    elif len(embedding.shape) == 2:
        tokens, hidden = header.lengths.get(_TOKENS), subject.setting("hidden")
        if tokens is not None and tokens != embedding.shape[0]:
            yield finding("G13", f"has {embedding.shape[0]} rows for {tokens} tokens", header.file, _EMBEDDING)
        if hidden is not None and hidden != embedding.shape[1]:
            message = f"has rows of {embedding.shape[1]}; {architecture}.embedding_length is {hidden}"
            yield finding("G13", message, header.file, _EMBEDDING)
    yield from _experts(subject, header.file)


def _experts(subject: Context, file: str) -> Iterator[Finding]:
    """What llama.cpp asserts of the numbers of experts."""
    stated = subject.setting("experts")
    if subject.anatomy.blocks and not stated:
        yield finding("G13", "has experts, and no expert_count: llama.cpp would take it for a dense model", file)
    elif stated and not subject.anatomy.blocks:
        yield finding("G13", f"says that it has {stated} experts, and holds none", file)
    if stated and stated > MOST_EXPERTS:
        yield finding("G13", f"has {stated} experts; llama.cpp takes at most {MOST_EXPERTS}", file)
    if stated and subject.setting("top_k") is None and not subject.malformed("top_k"):
        yield finding("G13", "has experts, and no expert_used_count", file)


def in_gguf_words(subject: Context, one: Finding) -> Finding:
    """Return a finding about config.json as one about the metadata of the file that stand for it."""
    header = subject.scan.headers[0]
    architecture = str(subject.config.get("model_type", "")).partition("-")[2]
    message = one.message.replace(CONFIG, "the metadata")
    for name in sorted(CONFIG_KEYS, key=len, reverse=True):
        message = message.replace(name, f"{architecture}.{CONFIG_KEYS[name]}")
    return replace(one, message=message, file=header.file if one.file == CONFIG else one.file)
