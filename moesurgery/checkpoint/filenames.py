"""The names of the files of a checkpoint, of an adapter, and of what this package leaves beside them."""

from __future__ import annotations

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
PROVENANCE = "moesurgery.json"

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Other forms of a tokenizer, stale once tokens are added to its `tokenizer.json`.
OTHER_TOKENIZER_FORMS = (
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("vocab.txt", "spiece.model"),
)
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "special_tokens_map.json", *OTHER_TOKENIZER_FORMS)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

REPAIR_INDEX = "refit.json"
WORK = ".moesurgery"  # inside a `.partial` folder: temporary files and manifests
