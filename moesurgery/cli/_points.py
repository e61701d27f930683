"""A panel of points and a line in a plane: what is had for what is paid."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesurgery.cli._drawing import GREY, INK, LESS, MORE, drawn_text

_WIDE, _HIGH, _LEFT = 520, 300, 64  # pixels
_TICKS = 5


@dataclass(frozen=True)
class Points:
    """Points (x, y, name), those of `marked` in another colour, over a line through (x, y), and a limit on x."""

    title: str
    across: str
    upward: str
    points: Sequence[tuple[float, float, str]]
    marked: Sequence[tuple[float, float, str]] = ()
    line: Sequence[tuple[float, float]] = ()
    limit: float | None = None

    @property
    def ranges(self) -> tuple[float, float, float, float]:
        """The least and the largest x and y of all that is drawn."""
        measured = [*self.points, *self.marked]
        xs = [x for x, _, _ in measured] + [x for x, _ in self.line]
        xs += [self.limit] if self.limit is not None else []
        ys = [y for _, y, _ in measured] + [y for _, y in self.line]
        low, high, bottom, top = min(xs), max(xs), min(0.0, *ys), max(ys)
        return low, high if high > low else low + 1, bottom, top if top > bottom else bottom + 1


def points_svg(panel: Points, top: float) -> tuple[list[str], float, float]:
    """Return the parts of a panel whose upper edge is `top`, and its width and height."""
    low, high, bottom, most = panel.ranges

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDE * (x - low) / (high - low), top + 28 + _HIGH * (1 - (y - bottom) / (most - bottom))

    parts = [drawn_text(10, top + 12, panel.title, "h")]
    for i in range(_TICKS):
        x, y = low + (high - low) * i / (_TICKS - 1), bottom + (most - bottom) * i / (_TICKS - 1)
        (at, base), (_, level) = place(x, bottom), place(low, y)
        parts.append(drawn_text(at, base + 16, f"{x:.3g}", anchor="middle"))
        parts.append(drawn_text(_LEFT - 8, level + 4, f"{y:.3g}", anchor="end"))
        parts.append(f'<path d="M{_LEFT} {level:.1f}h{_WIDE}" stroke="{GREY}" stroke-opacity=".3"/>')
    if panel.limit is not None:
        at, base = place(panel.limit, bottom)
        parts.append(f'<path d="M{at:.1f} {base:.1f}v{-_HIGH}" stroke="{INK}" stroke-dasharray="4 3"/>')
    if panel.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in panel.line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-width="1.5"/>')
    for hue, chosen in ((LESS, panel.points), (MORE, panel.marked)):
        for x, y, name in chosen:
            at, level = place(x, y)
            label = html.escape(f"{name}: {x:.4g}, {y:.4g}")
            parts.append(f'<circle cx="{at:.1f}" cy="{level:.1f}" r="4" fill="{hue}"><title>{label}</title></circle>')
            if chosen is panel.marked:
                parts.append(drawn_text(at + 7, level - 6, name))
    parts.append(drawn_text(_LEFT + _WIDE / 2, top + 28 + _HIGH + 34, panel.across, anchor="middle"))
    parts.append(drawn_text(_LEFT, top + 26, panel.upward))
    return parts, _LEFT + _WIDE + 60, _HIGH + 68


def points_png(panel: Points, axes: Any) -> None:
    """Draw a panel on matplotlib axes."""
    if panel.line:
        axes.plot([p[0] for p in panel.line], [p[1] for p in panel.line], color=GREY, linewidth=1.2)
    if panel.limit is not None:
        axes.axvline(panel.limit, color=INK, linestyle="--", linewidth=0.8)
    for hue, chosen in ((LESS, panel.points), (MORE, panel.marked)):
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], color=hue, s=18, zorder=3)
    for x, y, name in panel.marked:
        axes.annotate(name, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(panel.across, fontsize=8)
    axes.set_ylabel(panel.upward, fontsize=8)
