"""Reports of measured edits and of `compare`: a page that needs nothing else, JSON and card with the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import DEMO, Result

Cli = Callable[..., Result]
TEXT = DEMO.parent / "calibration-code.txt"
HELD_OUT = DEMO.parent / "heldout-code.txt"


class Reader(HTMLParser):
    """Collects what a page loads from elsewhere, its plots, and the text of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.plots = 0
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.plots += tag == "svg"

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    assert "url(http" not in page.read_text()
    assert not reader.loaded
    return reader


def test_an_edit_with_its_evidence(demo: Path, tmp_path: Path, ok: Cli) -> None:
    out = tmp_path / "out"
    options = ["--text", TEXT, "--window", 128, "--tokens", 2048, "--heldout", HELD_OUT, "--limit", 4]
    kinds = [part for kind in ("card", "html", "json") for part in ("--report", kind)]
    document = ok("drop-experts", demo, "--count", 2, *options, *kinds, "--refit", "expert", "-o", out, "--json").json
    nats = document["heldout"]["nats"]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["heldout"]["nats"] == nats
    assert report["heldout"]["domains"]["original"]["heldout-code"] == pytest.approx(nats["original"])
    page, card = read(tmp_path / "out.report.html"), (out / "README.md").read_text()
    assert page.plots == 3
    dropped = sum(len(layer["dropped"]) for layer in report["steps"][0]["report"]["layers"])
    assert (tmp_path / "out.report.html").read_text().count('<rect class="f"') == dropped + 1  # and the key
    for name, value in nats.items():
        assert name in page.cells
        assert f"{value:.4f}" in page.cells
        assert f"| {name} | {value:.4f} |" in card
    assert "moesurgery" in card.split("Made by")[1]
    assert str(tmp_path) not in card


def test_a_comparison(demo: Path, tmp_path: Path, ok: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"model: {demo}\nsteps:\n  - drop-experts: {{experts: [1]}}\n")
    options = ["--text", HELD_OUT, "--window", 64, "--limit", 3]
    kinds = [part for kind in ("card", "html", "json") for part in ("--report", kind)]
    document = ok("compare", demo, "recipe.yaml", *options, *kinds, "--json").json
    report = json.loads(Path("recipe.yaml.report.json").read_text())
    assert report["models"] == document["models"]
    page, card = read(Path("recipe.yaml.report.html")), Path("recipe.yaml.report.md").read_text()
    domain = document["models"][1]["domains"][0]
    assert page.plots >= 3
    assert any(f"{domain['over']:+.4f}" in cell for cell in page.cells)
    assert f"{100 * domain['agreement']:.1f} %" in page.cells
    assert f"{100 * domain['agreement']:.1f} %" in card


def test_what_is_no_report(demo: Path, cli: Cli) -> None:
    assert "expected one of card, html, json" in cli("drop-experts", demo, "--count", 1, "--report", "pdf").err
    assert "nothing is measured" in cli("drop-experts", demo, "--count", 1, "--report", "html").err
