"""A table laid out in columns that fit a terminal: cells wrap, and where that is not enough, columns go below."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

GAP = 2
_BESIDE = 26  # columns kept for others beside one long word, such as a tensor's name, before that is cut
_BREAKS = (" ", ",./_-:")  # a cell is cut behind one of these where there is one, the first kind before the second


def width(text: str) -> int:
    """Return the columns that `text` takes; wide East Asian characters take two."""
    return len(text) if text.isascii() else sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table_lines(rows: Sequence[Sequence[str]], right: Sequence[int], limit: int | None) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a table of which the first row is the header, and whether each belongs to that.

    Columns in `right` are aligned to the right, and their numbers are never cut. None of the lines is wider than
    `limit`, unless a number alone is; None for no limit. Columns for which there is no room follow in a table of
    their own, with the first column again.
    """
    natural = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    longest = max(limit - _BESIDE, 8) if limit is not None else None
    least = [_least(rows, i, None if i in right else longest) for i in range(len(natural))]
    for at, group in enumerate(_groups(least, limit)):
        if at:
            yield "", False
        widths = _shared([natural[i] for i in group], [least[i] for i in group], limit)
        for n, row in enumerate(rows):
            cells = [_wrapped(row[i], w) for i, w in zip(group, widths, strict=True)]
            for line in range(max(map(len, cells))):
                shown = [
                    _padded(c[line] if line < len(c) else "", w, i in right)
                    for i, c, w in zip(group, cells, widths, strict=True)
                ]
                yield (" " * GAP).join(shown).rstrip(), n == 0


def _least(rows: Sequence[Sequence[str]], i: int, longest: int | None) -> int:
    """Return how narrow a column may be: text breaks between words, those over `longest` anywhere, a number nowhere."""
    header = max(map(width, rows[0][i].split()), default=0)
    if longest is None:
        return max(header, max((width(row[i]) for row in rows[1:]), default=0))
    return max(header, min(longest, max((width(word) for row in rows[1:] for word in row[i].split()), default=0)))


def _groups(least: Sequence[int], limit: int | None) -> list[list[int]]:
    """Divide the columns into groups that fit, each with the first column."""
    groups = [[0]] if least else []
    for i in range(1, len(least)):
        if limit is not None and len(groups[-1]) > 1 and sum(least[j] + GAP for j in groups[-1]) + least[i] > limit:
            groups.append([0])
        groups[-1].append(i)
    return groups


def _shared(natural: Sequence[int], least: Sequence[int], limit: int | None) -> list[int]:
    """Return the widths of columns: the widest gives way first, down to its least."""
    widths = list(natural)
    while limit is not None and sum(widths) + GAP * (len(widths) - 1) > limit:
        can = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not can:
            break
        widths[max(can, key=lambda i: widths[i])] -= 1
    return widths


def _wrapped(text: str, limit: int) -> list[str]:
    """Cut a cell into lines of at most `limit` columns."""
    lines = []
    while width(text) > limit:
        at = next(n for n in range(len(text) + 1, 0, -1) if width(text[:n].rstrip()) <= limit or n == 1)
        places = (
            n for kind in _BREAKS for n in range(at, max(at // 2, 1) if kind != " " else 1, -1) if text[n - 1] in kind
        )
        at = next(places, at)
        lines.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [*lines, text] if text or not lines else lines


def _padded(text: str, columns: int, right: bool) -> str:
    space = " " * (columns - width(text))
    return space + text if right else text + space
