"""The pictures that commands write: well-formed, of what the command says, in every format and without matplotlib."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moesurgery.cli._pictures import Bars, Heatmap, shown_number, svg, write_picture
from tests.conftest import DEMO, ROOT, Result

Cli = Callable[..., Result]
TEXT = ROOT / "examples" / "demo" / "heldout-code.txt"
SMALL = ["--window", 64, "--tokens", 256]
SVG = "{http://www.w3.org/2000/svg}"


def texts(path: Path) -> list[str]:
    """Return what an SVG says, and that it can be parsed."""
    return [element.text or "" for element in ElementTree.fromstring(path.read_text()).iter(f"{SVG}text")]


@pytest.mark.parametrize("columns", [8, 64])
def test_a_heat_map_has_a_cell_for_each_value_and_a_key(columns: int) -> None:
    values = [[None if x == 3 else x - 2.0 for x in range(columns)] for _ in range(2)]
    panel = Heatmap("t", ["a", "<b>"], list(map(str, range(columns))), values, "u", framed={(1, 2)}, frame="a frame")
    drawn = svg("title & more", "about", [panel])
    root = ElementTree.fromstring(drawn)
    said = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert len(said) == 2 * columns
    assert sum("not measured" in text for text in said) == 2
    assert f"<b>, expert {columns - 1}: {shown_number(columns - 3.0)} u" in said
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"title & more", "about", "not measured", "a frame", "<b>"} <= set(words)
    wide = float(root.get("width", "0"))
    assert all(float(r.get("x", 0)) + float(r.get("width", 0)) <= wide for r in root.iter(f"{SVG}rect"))


def test_shades_use_the_whole_scale() -> None:
    near = Heatmap("t", ["a"], ["0", "1"], [[1.01, 1.19]])
    assert near.shade(1.19)[1] - near.shade(1.01)[1] > 0.8  # factors near 1 are still told apart
    signed = Heatmap("t", ["a"], ["0", "1"], [[-1.0, 4.0]])
    assert signed.shade(-1.0)[0] != signed.shade(4.0)[0]
    assert signed.shade(4.0)[1] == pytest.approx(1.0)
    assert signed.shade(-1.0)[1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.2247, "1.22"),
        (-0.0, "0"),
        (9.996, "10.0"),
        (0.05, "0.0500"),
        (-12.34, "-12.3"),
        (1234.5, "1234"),
        (1e-7, "1.0e-07"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert shown_number(value) == text
    wide = Heatmap("t", ["a"], ["0", "1"], [[800.0, 7e-5]])
    assert [wide.shown(v) for v in (800.0, 10.84, 0.392, -0.04, 7e-5)] == ["800", "10.8", "0.4", "0", "0"]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["rescale", DEMO, "--top-k", 3, "--dry-run"],
            ["factor on the routed output", "router, layer 5: ", "norm, layer 0: 1.22"],
        ),
        (["count-params", DEMO], ["Parameters by component", "routed experts", "attention"]),
    ],
    ids=["rescale", "count-params"],
)
def test_commands_draw(ok: Cli, tmp_path: Path, suffix: str, command: list[object], words: list[str]) -> None:
    path = tmp_path / f"p{suffix}"
    ok(*command, "--picture", path)
    if suffix == ".png":
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return
    text = path.read_text()
    assert all(word in text for word in words)
    assert "<script" not in text


def test_diff_and_collect_draw(ok: Cli, cli: Cli, tmp_path: Path) -> None:
    ok("rescale", DEMO, "--top-k", 3, "-o", tmp_path / "edited")
    assert cli("diff", DEMO, tmp_path / "edited", "--picture", tmp_path / "d.svg").code == 1
    assert "block_sparse_moe.experts.#.w2" in texts(tmp_path / "d.svg")
    stats = ok("collect", DEMO, "--text", TEXT, *SMALL, "-o", tmp_path / "s", "--picture", tmp_path / "c.svg", "--json")
    said = ElementTree.fromstring((tmp_path / "c.svg").read_text()).iter(f"{SVG}title")
    first = stats.json["layers"][0]
    usage = 100 * first["experts"]["tokens"][0] / first["tokens"]
    where, _, value = (next(said).text or "").removesuffix(" %").partition(": ")
    assert where == "layer 0, expert 0"
    assert float(value) == pytest.approx(usage, rel=0.01)


@pytest.mark.parametrize(
    ("path", "words"), [("p.gif", ["no picture is known", ".svg"]), ("no/p.svg", ["does not exist", "mkdir -p no"])]
)
def test_a_picture_that_cannot_be(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("rescale", DEMO, "--top-k", 3, "--picture", path)
    assert result.code == 2
    assert all(word in result.err for word in words)
    assert list(tmp_path.iterdir()) == []


def test_probe_without_matplotlib_makes_everything_but_the_png(
    ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("moesurgery.cli._pictures.has_matplotlib", lambda: False)
    result = ok("probe", DEMO, "--text", TEXT, *SMALL, "--mode", "mask", "-o", tmp_path / "p", "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p.json", "p.svg"]
    assert result.err.startswith("warning: no PNG without matplotlib")
    assert result.json == json.loads((tmp_path / "p.json").read_text())
    page = (tmp_path / "p.html").read_text()
    for word in ("seed 0", "heldout-code.txt", "not measured", "onkeydown", "prefers-color-scheme", "position:sticky"):
        assert word in page
    assert not re.search(r"https?://", page)
    assert any("millinats" in text for text in texts(tmp_path / "p.svg"))


def test_a_report_as_a_page(cli: Cli, tmp_path: Path) -> None:
    assert cli("validate", DEMO, "--level", "container", "--report", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "Nothing wrong was found" in page
    assert "Not checked" in page


def test_a_png_of_both_kinds_of_panels(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    write_picture(path, "t", "a", [Heatmap("h", ["a"], ["0"], [[None]]), Bars("b", ["x"], [-1.0], "u")])
    assert path.stat().st_size > 1000
