"""Conversations as the text that a model was trained on: by its own chat template, in transformers' sandbox.

A template is a program by whoever made the checkpoint. transformers renders it in Jinja's immutable sandbox, with plain
data only; nothing of it is imported or run as Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import CHAT_TEMPLATE, TOKENIZER_CONFIG
from moesurgery.errors import RecipeError

_SPECIAL_TOKENS = "special_tokens_map.json"
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # of `conversations` with `from` and `value`

Spans = list[tuple[int, int]]  # of characters
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers uses to mark assistant tokens


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, or one for each use, and the special tokens that it may name."""

    templates: Mapping[str, str]
    tokens: Mapping[str, Any]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, assistant: bool) -> tuple[str, Spans]:
        """Return the text of a conversation, and with `assistant` the character spans of the assistant's messages.

        Raises ValueError where the template refuses the conversation, or the assistant's spans cannot be found.
        """
        chosen = self.templates.get("tool_use" if tools else "default") or next(iter(self.templates.values()))
        if assistant and _MARKS.search(chosen):
            text, spans = self._rendered(chosen, messages, tools, marked=True)
            if spans:
                return text, spans
        text, _ = self._rendered(chosen, messages, tools)
        return text, self._assistant(chosen, messages, tools, text) if assistant else []

    def _rendered(
        self, chosen: str, messages: Sequence[Mapping[str, Any]], tools: Any, *, marked: bool = False, ask: bool = False
    ) -> tuple[str, Spans]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=tools,
                chat_template=chosen,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask,
                **self.tokens,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from None
        texts, spans = rendered
        return texts[0], spans[0] if marked else []

    def _assistant(self, chosen: str, messages: Sequence[Mapping[str, Any]], tools: Any, text: str) -> Spans:
        """Find the assistant's spans for a template without marks: the text that each message adds to those before."""
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            try:
                before, _ = self._rendered(chosen, messages[:i], tools, ask=True)
                after, _ = self._rendered(chosen, messages[: i + 1], tools)
            except ValueError:
                before, after = text, ""
            if not text.startswith(before) or not after.startswith(before) or not text.startswith(after):
                raise ValueError("the model's chat template does not show which words are the assistant's")
            spans.append((len(before), len(after)))
        return spans


def load_chat_template(checkpoint: Checkpoint) -> ChatTemplate:
    """Return the chat template of a checkpoint. Raises RecipeError where it has none."""
    settings = _json(checkpoint, TOKENIZER_CONFIG)
    held = settings.get("chat_template")
    if CHAT_TEMPLATE in checkpoint.file_sizes:
        held = checkpoint.source.read(CHAT_TEMPLATE, 0, checkpoint.file_sizes[CHAT_TEMPLATE]).decode("utf-8", "replace")
    templates: dict[str, str] = {}
    if isinstance(held, str):
        templates["default"] = held
    elif isinstance(held, list):
        templates = {str(t.get("name")): str(t.get("template")) for t in held if isinstance(t, dict)}
    elif isinstance(held, dict):
        templates = {str(name): str(text) for name, text in held.items()}
    if not templates:
        raise RecipeError(
            f"{checkpoint.source.identity} has no chat template, so messages cannot become text",
            f"put one beside the model as {CHAT_TEMPLATE}, or give text",
        )
    named = {**_json(checkpoint, _SPECIAL_TOKENS), **settings}
    tokens = {key: _content(value) for key, value in named.items() if key.endswith("_token")}
    return ChatTemplate(templates, {key: value for key, value in tokens.items() if value is not None})


def messages_of(value: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, also where they are written as `from` and `value`."""
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "from"} & message.keys():
            raise ValueError("a message has no role")
        if "role" not in message:
            role = str(message["from"])
            message = {"role": ROLES.get(role, role), "content": message.get("value")}
        messages.append(message)
    return messages


def _content(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if name not in checkpoint.file_sizes:
        return {}
    try:
        value = json.loads(checkpoint.source.read(name, 0, checkpoint.file_sizes[name]))
    except ValueError as error:
        raise RecipeError(f"{checkpoint.source.identity}/{name} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
