"""Classes of the tokens that a model has to predict.

End tokens and thinking marks matter for generation but are rare, so a mean over all tokens hides their loss.

The classes: `end` (the end tokens of config.json and generation_config.json); each mark of thinking and of tool calls
that the tokenizer has, by its own name; `digits` (a token of digits alone); `code` (brackets, operators and other signs
of code without a letter or digit, and indentation); `rest`. Without a tokenizer there are only `end` and `rest`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.filenames import TOKENIZER
from moesurgery.errors import CheckpointError
from moesurgery.forward.text_windows import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

END, DIGITS, CODE, REST = "end", "digits", "code", "rest"
_GENERATION_CONFIG = "generation_config.json"
_MARK = re.compile(r"think|tool|function|call", re.IGNORECASE)
_DIGITS = re.compile(r"\s*\d+")
_CODE = re.compile(r"[^\w]*[{}\[\]()<>=;_\\/|&*+#@$^~`][^\w]*|_+|\t+|[ \n]*\n +| {2,}")


def end_tokens(checkpoint: Checkpoint) -> set[int]:
    """Return the tokens that end a text, from config.json and generation_config.json.

    Raises CheckpointError where the latter is no JSON object.
    """
    places: list[Any] = [checkpoint.config, checkpoint.config.get("text_config") or {}]
    if size := checkpoint.file_sizes.get(_GENERATION_CONFIG):
        try:
            places.append(dict(json.loads(checkpoint.source.read(_GENERATION_CONFIG, 0, size))))
        except (ValueError, TypeError) as error:
            where = f"{checkpoint.source.identity}/{_GENERATION_CONFIG}"
            raise CheckpointError(f"{where} is no JSON object: {error}", "correct it, or delete it") from None
    ends: set[int] = set()
    for place in places:
        value = place.get("eos_token_id")
        ends |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return ends


def token_classes(checkpoint: Checkpoint, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return for every class that occurs among `tokens` where it does, as booleans of the same shape."""
    import numpy as np

    tokenizer = load_tokenizer(checkpoint) if TOKENIZER in checkpoint.file_sizes else None
    marks: dict[int, str] = {}
    if tokenizer is not None:
        added = {token: entry.content for token, entry in tokenizer.get_added_tokens_decoder().items()}
        marks = {token: content for token, content in added.items() if _MARK.search(content)}
    ends = end_tokens(checkpoint)

    def name(token: int) -> str:
        if token in ends:
            return END
        if token in marks:
            return marks[token]
        return REST if tokenizer is None else kind_of_text(tokenizer.decode([token], skip_special_tokens=False))

    names = {token: name(token) for token in np.unique(tokens).tolist()}
    present = set(names.values())
    usual = (END, DIGITS, CODE, REST)
    order = [c for c in (END, *sorted(present - set(usual)), DIGITS, CODE, REST) if c in present]
    return {c: np.isin(tokens, [token for token, its in names.items() if its == c]) for c in order}


def kind_of_text(text: str) -> str:
    """Return the class of an ordinary token by its text."""
    if _DIGITS.fullmatch(text):
        return DIGITS
    return CODE if _CODE.fullmatch(text) else REST
