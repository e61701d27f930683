"""What a merge recipe says of tokenizer and chat template, read strictly."""

from __future__ import annotations

from typing import Any, Protocol

from moesurgery.merge.chat_templates import TEMPLATES
from moesurgery.merge.recipe.tokenizer_config import TokenizerConfig, TokenSource
from moesurgery.recipe.registry import did_you_mean


class DocumentReader(Protocol):
    """What reads the rest of the document (`stage_reader`), and gathers what is wrong with it."""

    def add_mistake(self, path: tuple[Any, ...], message: str) -> None: ...
    def keys(self, value: dict[str, Any], path: tuple[Any, ...], known: tuple[str, ...]) -> None: ...
    def reference(self, value: Any, path: tuple[Any, ...]) -> str | None: ...
    def one_of(self, value: dict[str, Any], key: str, kind: Any, what: str) -> Any: ...


MOST_PADDING = 65_536  # every row of padding is a row of the embedding


class TokenizerReader:
    """Reads those keys of a document for the reader `of` all of it."""

    def __init__(self, of: DocumentReader) -> None:
        self.of = of

    def tokenizer(self, value: dict[str, Any]) -> TokenizerConfig | None:
        source, given = value.get("tokenizer_source"), value.get("tokenizer")
        if source is not None and given is not None:
            self.of.add_mistake(("tokenizer",), "give tokenizer or tokenizer_source, not both")
        if given is None:
            model = self.tokenizer_source(source, ("tokenizer_source",)) if source is not None else None
            return TokenizerConfig(model) if model is not None else None
        path = ("tokenizer",)
        if not isinstance(given, dict):
            self.of.add_mistake(path, "tokenizer is a mapping: {source: union}")
            return None
        self.of.keys(given, path, ("source", "tokens", "pad_to_multiple_of"))
        model = self.tokenizer_source(given.get("source", "union"), (*path, "source"))
        multiple = given.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= MOST_PADDING):
            wanted = f"expected a whole number up to {MOST_PADDING:,}"
            self.of.add_mistake((*path, "pad_to_multiple_of"), f"pad_to_multiple_of is {multiple!r}, {wanted}")
            multiple = None
        by_token = given.get("tokens") or {}
        if not isinstance(by_token, dict):
            self.of.add_mistake((*path, "tokens"), "tokens is a mapping: {<token>: {source: MODEL}}")
            by_token = {}
        tokens = {str(token): self.token(source, (*path, "tokens", token)) for token, source in by_token.items()}
        return TokenizerConfig(model or "base", tokens, multiple)

    def tokenizer_source(self, value: Any, path: tuple[Any, ...]) -> str | None:
        if isinstance(value, str):
            value = value.removeprefix("model:")  # as mergekit's documentation once had it
        return value if value in ("base", "union") else self.of.reference(value, path)

    def token(self, given: Any, path: tuple[Any, ...]) -> TokenSource | None:
        """Read where the embedding of one token comes from."""
        if given is None or given == {}:
            return None
        if not isinstance(given, dict):
            self.of.add_mistake(path, "a token is a mapping: {source: MODEL, force: true}")
            return None
        self.of.keys(given, path, ("source", "force"))
        source, force = given.get("source"), given.get("force") or False
        if not isinstance(force, bool):
            self.of.add_mistake((*path, "force"), f"force is {force!r}, expected true or false")
        if source is None:
            return None
        if not (isinstance(source, dict) and "kind" in source):
            model = self.of.reference(source, (*path, "source"))
            return TokenSource(model, force=force)
        self.of.keys(source, (*path, "source"), ("kind", "model", "token", "token_id"))
        if source["kind"] == "zero":
            return TokenSource(None, force=force)
        if source["kind"] != "model_token":
            self.of.add_mistake((*path, "source"), f"kind is {source['kind']!r}: one of zero, model_token")
            return None
        path = (*path, "source")
        model = self.of.reference(source.get("model"), (*path, "model"))
        text, number = source.get("token"), source.get("token_id")
        if (text is None) == (number is None) or type(text or "") is not str or type(number or 0) is not int:
            self.of.add_mistake(path, "model_token takes the model and either token or token_id")
            return None
        return TokenSource(model, text, number, force)

    def chat_template(self, value: dict[str, Any]) -> str | None:
        given: str | None = self.of.one_of(value, "chat_template", str, "auto, a known name, or Jinja")
        known = ("auto", *TEMPLATES)
        if given is not None and given not in known and "{" not in given:
            hint = did_you_mean(given, known) or f"known: {', '.join(known)}"
            self.of.add_mistake(("chat_template",), f"chat_template is {given!r}, no Jinja: {hint}")
        return given
