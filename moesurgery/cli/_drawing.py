"""What all panels of a picture share: colours, and text."""

from __future__ import annotations

import html

MORE, LESS, GREY = "#c2410c", "#2563b0", "#7d8894"
INK, PAPER = "#22262b", "#ffffff"


def drawn_text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Return text in SVG; `kind` is its class in the picture's style sheet."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{html.escape(text)}</text>'
