"""Text from strangers made harmless: names of tensors and files, values of configs."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def safe(text: str) -> str:
    """Return `text` with everything that could move the cursor or reorder a line shown escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or _harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, limit: int = 500) -> str:
    """Return `text` as one harmless line, cut in the middle where it is longer than `limit`."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} […{len(text) - limit:,} characters…] {text[-limit // 3 :]}"
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")


def _harmless(c: str) -> bool:
    return c.isprintable() and unicodedata.bidirectional(c) not in _DIRECTIONS
