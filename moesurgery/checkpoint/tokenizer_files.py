"""The names of the files that hold a model's tokenizer and chat template."""

from __future__ import annotations

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

# Other forms of what tokenizer.json holds, of older libraries.
OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "special_tokens_map.json", *OTHER_FORMS)
