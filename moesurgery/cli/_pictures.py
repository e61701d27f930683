"""The pictures that commands write: heat maps, bars and points, as SVG, as PNG (by matplotlib), or on an HTML page.

A colour is a hue whose opacity says how large a value is: so a picture reads on light and on dark paper alike.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.cli._drawing import GREY, INK, LESS, MORE, PAPER, drawn_text
from moesurgery.cli._points import Points, points_png, points_svg
from moesurgery.errors import OutputError, RecipeError
from moesurgery.whole_file import whole_file

SUFFIXES = (".svg", ".png", ".html")
_NUMBERED = 20  # columns: with more, numbers in the cells would not be legible
_ROW, _CHAR, _BOLD = 24, 6.6, 8.2  # pixels: of a row, of a character
_LONGEST, _LONGEST_ABOVE = 34, 18  # characters of a label beside a row, above a column
_MOST_BARS, _LONGEST_BAR = 24, 240
STYLE = """svg{--ink:#22262b;--paper:#ffffff}@media(prefers-color-scheme:dark){svg{--ink:#e6e9ec;--paper:#16191d}}
text{font:11px system-ui,sans-serif;fill:var(--ink)}.h{font-weight:600;font-size:13px}.p{fill:var(--paper)}
.w{fill:#ffffff}.f{fill:none;stroke:var(--ink);stroke-width:2}.n{fill:url(#n)}"""


@dataclass(frozen=True)
class Heatmap:
    """Values by row and column; None is not measured. `framed` cells have a border, which stands for `frame`."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str = ""
    across: str = "expert"
    framed: Collection[tuple[int, int]] = ()
    frame: str = ""

    @property
    def seen(self) -> list[float]:
        return [v for row in self.values for v in row if v is not None and math.isfinite(v)]

    def shown(self, value: float) -> str:
        """Return a value as the others are shown: what is nothing beside the largest is 0."""
        largest = max(map(abs, self.seen))
        return shown_number(value, max(0, 3 - _exponent(largest)) if largest else 0)

    @property
    def cell(self) -> float:
        """The width of a cell in pixels."""
        if len(self.columns) > _NUMBERED:
            return max(4.0, min(20.0, 1000 / len(self.columns)))
        return max(46.0, 8 + _CHAR * min(_LONGEST_ABOVE, max(map(len, self.columns), default=0)))

    def shade(self, value: float) -> tuple[str, float]:
        """Return the hue and the opacity of a value. What lies far from 0 throughout is spread over all shades."""
        seen = self.seen
        low, high = min(seen), max(seen)
        if low > 0 and high < 4 * low:
            return MORE, 0.1 + 0.9 * (value - low) / (high - low) if high > low else 0.5
        return (MORE if value >= 0 else LESS), math.sqrt(abs(value) / max(abs(low), abs(high), 1e-300))


@dataclass(frozen=True)
class Bars:
    """A bar for each label."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    unit: str = ""


Panel = Heatmap | Bars | Points


def largest_bars(title: str, values: Mapping[str, float], unit: str = "") -> Bars:
    """Return bars for the largest values, in their order; the title says where others are left out."""
    chosen = set(sorted(values, key=lambda name: -abs(values[name]))[:_MOST_BARS])
    if len(chosen) < len(values):
        title += f": the {len(chosen)} largest of {len(values)}"
    kept = {name: value for name, value in values.items() if name in chosen}
    return Bars(title, list(kept), list(kept.values()), unit)


def shown_number(value: float, most_places: int | None = None) -> str:
    """Return a value in a few characters, rounded once: 3 significant digits, at most so many decimal places."""
    if not math.isfinite(value):
        return f"{value:g}"
    if value and most_places is None and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    places = max(0, 2 - _exponent(value)) if value else 0
    text = f"{value:.{places if most_places is None else min(places, most_places)}f}"
    return text if float(text) else "0"


def _exponent(value: float) -> int:
    """Return the power of ten of a number's first digit, once it is rounded to three: 1 for 9.996."""
    return int(f"{abs(value):.2e}".partition("e")[2])


def check_picture(path: Path | None) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{path}: no picture is known by that suffix", f"known: {', '.join(SUFFIXES)}")
    if path.suffix == ".png" and not has_matplotlib():
        raise OutputError("a PNG needs matplotlib", "`pip install moesurgery[plot]`, or write .svg or .html")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist", f"make it first: mkdir -p {path.parent}")


def has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def write_picture(path: Path, title: str, about: str, panels: Sequence[Panel]) -> None:
    """Write panels one below the other; the suffix says how. Raises OutputError where the file cannot be written."""
    with whole_file(path) as new:
        if path.suffix == ".png":
            _png(new, title, about, panels)
        else:
            new.write_text((svg if path.suffix == ".svg" else _page)(title, about, panels), encoding="utf-8")


def svg(title: str, about: str, panels: Sequence[Panel]) -> str:
    """Return an SVG document."""
    wide = 20 + max(_BOLD * len(title), _CHAR * len(about))
    return _drawing(panels, 58.0, wide, title, [drawn_text(10, 22, title, "h"), drawn_text(10, 40, about)]) + "\n"


def figure(panel: Panel) -> str:
    """Return one panel as SVG to stand in a page, which says all else."""
    return _drawing([panel], 4.0, 0.0, panel.title, [])


def _drawing(panels: Sequence[Panel], at: float, wide: float, label: str, parts: list[str]) -> str:
    """Return an SVG of `parts` and of panels from the height `at` on, at least `wide`."""
    for panel in panels:
        if isinstance(panel, Points):
            drawn, width, height = points_svg(panel, at)
        else:
            drawn, width, height = _heatmap(panel, at) if isinstance(panel, Heatmap) else _bars(panel, at)
        parts = parts + drawn
        at, wide = at + height + 26, max(wide, width, 20 + _CHAR * len(panel.title))
    hatch = (
        '<defs><pattern id="n" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="5" height="5" fill="{GREY}" fill-opacity=".12"/><path d="M0 0V5" stroke="{GREY}"/>'
        "</pattern></defs>"
    )
    size = f'width="{wide:.0f}" height="{at:.0f}" viewBox="0 0 {wide:.0f} {at:.0f}"'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(label)}">',
            f"<style>{STYLE}</style>{hatch}",
            f'<rect class="p" width="{wide:.0f}" height="{at:.0f}"/>',
            *parts,
            "</svg>",
        )
    )


def _heatmap(panel: Heatmap, top: float) -> tuple[list[str], float, float]:
    cell, left = panel.cell, _left(panel.rows)
    parts = [drawn_text(10, top + 12, panel.title, "h")]
    grid = top + 38
    numbered = len(panel.columns) <= _NUMBERED
    every = 1 if numbered else math.ceil(_CHAR * 4 / cell)
    for x, label in enumerate(panel.columns):
        if x % every == 0:
            parts.append(
                drawn_text(
                    left + (x + 0.5) * cell,
                    grid - 5,
                    label[-_LONGEST_ABOVE:] if numbered else label[:8],
                    anchor="middle",
                )
            )
    parts.append(drawn_text(10, grid - 5, panel.across))
    for y, (row, values) in enumerate(zip(panel.rows, panel.values, strict=True)):
        parts.append(drawn_text(left - 8, grid + y * _ROW + 16, row[-_LONGEST:], anchor="end"))
        for x, value in enumerate(values):
            place = f'x="{left + x * cell:.1f}" y="{grid + y * _ROW}" width="{cell - 1:.1f}" height="{_ROW - 1}"'
            label = f"<title>{html.escape(f'{row}, {panel.across} {panel.columns[x]}: ')}"
            if value is None or not math.isfinite(value):
                parts.append(f'<rect class="n" {place}>{label}not measured</title></rect>')
                continue
            hue, opacity = panel.shade(value)
            says = html.escape(f"{panel.shown(value)} {panel.unit}".strip())
            parts.append(f'<rect {place} fill="{hue}" fill-opacity="{opacity:.3f}">{label}{says}</title></rect>')
            if numbered:
                kind = "w" if opacity > 0.6 else ""
                parts.append(
                    drawn_text(left + (x + 0.5) * cell, grid + y * _ROW + 16, panel.shown(value), kind, "middle")
                )
    for y, x in panel.framed:
        place = f'x="{left + x * cell:.1f}" y="{grid + y * _ROW}" width="{cell - 1:.1f}" height="{_ROW - 1}"'
        parts.append(f'<rect class="f" {place}/>')
    below = grid + len(panel.rows) * _ROW + 10
    legend, wide = _legend(panel, below)
    return parts + legend, max(left + len(panel.columns) * cell + 12, wide), below + 18 - top


def _left(labels: Sequence[str]) -> float:
    """Return where the drawing begins, behind the labels of its rows."""
    return 22 + _CHAR * min(_LONGEST, max(map(len, labels), default=0)) + 20


def _legend(panel: Heatmap, top: float) -> tuple[list[str], float]:
    """Return the key of the colours, which spans the values that there are, and of frames and hatching."""
    parts, x = [], _left(panel.rows)
    if seen := panel.seen:
        low, high = min(seen), max(seen)
        parts.append(drawn_text(x - 8, top + 11, panel.shown(low), anchor="end"))
        for i in range(40):
            hue, opacity = panel.shade(low + (high - low) * i / 39)
            parts.append(
                f'<rect x="{x + 4 * i}" y="{top}" width="4" height="14" fill="{hue}" fill-opacity="{opacity:.3f}"/>'
            )
        label = f"{panel.shown(high)} {panel.unit}".strip()
        parts.append(drawn_text(x + 168, top + 11, label))
        x += 188 + _CHAR * len(label)
    if any(value is None or not math.isfinite(value) for row in panel.values for value in row):
        parts += [
            f'<rect class="n" x="{x}" y="{top}" width="14" height="14"/>',
            drawn_text(x + 20, top + 11, "not measured"),
        ]
        x += 40 + _CHAR * len("not measured")
    if panel.framed:
        parts += [
            f'<rect class="f" x="{x}" y="{top}" width="14" height="14"/>',
            drawn_text(x + 20, top + 11, panel.frame),
        ]
        x += 40 + _CHAR * len(panel.frame)
    return parts, x


def _bars(panel: Bars, top: float) -> tuple[list[str], float, float]:
    left = _left(panel.labels)
    parts = [drawn_text(10, top + 12, f"{panel.title}{f', {panel.unit}' if panel.unit else ''}", "h")]
    largest = max((abs(v) for v in panel.values), default=0) or 1
    for y, (label, value) in enumerate(zip(panel.labels, panel.values, strict=True)):
        at, long = top + 24 + y * 20, _LONGEST_BAR * abs(value) / largest
        hue = MORE if value >= 0 else LESS
        parts.append(drawn_text(left - 8, at + 12, label[-_LONGEST:], anchor="end"))
        parts.append(f'<rect x="{left:.1f}" y="{at}" width="{long:.1f}" height="15" fill="{hue}"/>')
        parts.append(drawn_text(left + long + 6, at + 12, shown_number(value)))
    return parts, left + _LONGEST_BAR + 60, 24 + 20 * len(panel.labels)


def _page(title: str, about: str, panels: Sequence[Panel]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>:root{{color-scheme:light dark}}body{{margin:0}}"
        "main{overflow-x:auto}@media(prefers-color-scheme:dark){body{background:#16191d}}</style></head><body>"
        f'<main tabindex="0" aria-label="picture, scrolls sideways">{svg(title, about, panels)}</main></body></html>\n'
    )


def _png(path: Path, title: str, about: str, panels: Sequence[Panel]) -> None:
    """Draw with matplotlib what `svg` draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    heights = [_inches(panel) for panel in panels]
    wide = max(7.0, *((p.cell * len(p.columns) + 150) / 90 if isinstance(p, Heatmap) else 6.0 for p in panels))
    figure, every = plt.subplots(
        len(panels), 1, figsize=(wide, sum(heights) + 0.8), height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(f"{title}\n{about}", fontsize=10, color=INK, x=0.01, ha="left")
    for panel, axes in zip(panels, every[:, 0], strict=True):
        axes.set_title(panel.title, fontsize=9, loc="left", color=INK)
        if isinstance(panel, Points):
            points_png(panel, axes)
            continue
        if isinstance(panel, Bars):
            axes.barh(
                range(len(panel.values)), list(panel.values), color=[MORE if v >= 0 else LESS for v in panel.values]
            )
            axes.set_yticks(range(len(panel.labels)), list(panel.labels), fontsize=7)
            axes.invert_yaxis()
            axes.set_xlabel(panel.unit, fontsize=8)
            continue
        for y, row in enumerate(panel.values):
            for x, value in enumerate(row):
                known = value is not None and math.isfinite(value)
                hue, opacity = panel.shade(value) if known and value is not None else (GREY, 0.15)
                cell = Rectangle((x, y), 0.96, 0.96, facecolor=hue, alpha=opacity, linewidth=0)
                if not known:
                    cell.set(hatch="////", edgecolor=GREY)
                axes.add_patch(cell)
                if known and value is not None and len(panel.columns) <= _NUMBERED:
                    colour = PAPER if opacity > 0.6 else INK
                    axes.text(x + 0.48, y + 0.5, panel.shown(value), ha="center", va="center", fontsize=7, color=colour)
        for y, x in panel.framed:
            axes.add_patch(Rectangle((x, y), 0.96, 0.96, fill=False, edgecolor=INK, linewidth=1.6))
        axes.set_xlim(0, len(panel.columns))
        axes.set_ylim(len(panel.rows), 0)
        step = max(1, len(panel.columns) // 32)
        axes.set_xticks([x + 0.5 for x in range(0, len(panel.columns), step)], list(panel.columns)[::step], fontsize=7)
        axes.set_yticks([y + 0.5 for y in range(len(panel.rows))], list(panel.rows), fontsize=7)
        axes.set_xlabel(_png_key(panel), fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _inches(panel: Panel) -> float:
    """Return the height of a panel drawn by matplotlib."""
    if isinstance(panel, Points):
        return 3.6
    return len(panel.rows) * 0.26 + 1.1 if isinstance(panel, Heatmap) else len(panel.labels) * 0.22 + 0.7


def _png_key(panel: Heatmap) -> str:
    seen = panel.seen
    words = (
        [f"{panel.across}; colour: {panel.shown(min(seen))} to {panel.shown(max(seen))} {panel.unit}".strip()]
        if seen
        else []
    )
    if any(value is None for row in panel.values for value in row):
        words.append("hatched: not measured")
    if panel.framed:
        words.append(f"framed: {panel.frame}")
    return "; ".join(words)


def number_of(cell: str) -> float | None:
    """Return the number that a table's cell shows; None where it shows none."""
    try:
        return float(cell.replace(",", "").replace("%", ""))
    except ValueError:
        return None


def factors_of_rules(report: Mapping[str, Any]) -> Heatmap:
    """Return what a `rescale` reports as factors by rule and layer; the mean where each expert has its own."""
    layers = report["layers"]
    used = [f if isinstance(f, int | float) else sum(f) / len(f) for f in (layer["factor"] for layer in layers)]
    rules: dict[str, list[float | None]] = {"used": list(used)}
    if any(layer["router"] is not None for layer in layers):
        rules["router"] = [layer["router"] for layer in layers]
    constant = {rule: f for rule, f in report["alternatives"].items() if isinstance(f, int | float)}
    rules |= {rule: [float(factor)] * len(layers) for rule, factor in constant.items()}
    numbers = [_number(layer["layer"]) or layer["layer"] for layer in layers]
    title = "rescale: factor on the routed output, by rule and layer"
    return Heatmap(title, list(rules), numbers, list(rules.values()), across="layer")


def dropped_experts(report: Mapping[str, Any]) -> Heatmap | None:
    """Return the scores that `drop-experts` reports by layer and expert, those that are dropped framed; 1 for each
    expert where none were ranked. None where layers have different numbers of experts."""
    layers = report["layers"]
    counts = {len(layer["kept"]) + len(layer["dropped"]) for layer in layers}
    if len(counts) != 1:
        return None
    experts = counts.pop()
    values = [layer.get("scores") or [1.0] * experts for layer in layers]
    framed = {(y, expert) for y, layer in enumerate(layers) for expert in layer["dropped"]}
    names = [layer["layer"] for layer in layers]
    title = "drop-experts: scores by layer and expert"
    return Heatmap(title, names, [str(e) for e in range(experts)], values, framed=framed, frame="dropped")


def of_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Panel | None:
    """Return a table's columns of numbers as a picture: one as bars, several as a heat map; None where it has none."""
    columns = [i for i in range(1, len(header)) if any(number_of(row[i]) is not None for row in rows)]
    broken = [i for i in columns if any("." in row[i] for row in rows)]
    columns = broken or columns  # counts beside errors or shares would take all of the colours
    if not columns:
        return None
    if len(columns) == 1:
        known = [(row[0], value) for row in rows if (value := number_of(row[columns[0]])) is not None]
        labels = [f"layer {_number(name)}" if _number(name) else name for name, _ in known]
        return Bars(title, labels, [value for _, value in known])
    values = [[number_of(row[i]) for row in rows] for i in columns]
    across = [_number(row[0]) or row[0] for row in rows]
    return Heatmap(title, [header[i] for i in columns], across, values, across=header[0])


def _number(name: str) -> str:
    """Return the number of a layer's name, nothing where it has none."""
    return next((part for part in name.split(".") if part.isdigit()), "")
