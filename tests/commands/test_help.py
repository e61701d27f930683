"""Help: panels, groups, words for values, completion, and what a wrong option is answered with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

import moesurgery
from moesurgery.cli._app import app
from moesurgery.cli._help import GROUPS
from tests.conftest import ROOT, Result

Cli = Callable[..., Result]
COMMANDS = sorted(str(command.name) for command in app().registered_commands)


def complete(words: str) -> list[str]:
    """Return what bash is offered after `words`."""
    environment = {**os.environ, "_MOESURGERY_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    program = "import sys; sys.argv = ['moesurgery']; from moesurgery.cli import run; run()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split()


def test_every_command_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(COMMANDS) <= set(grouped)


def test_moesurgery_alone_prints_help(cli: Cli) -> None:
    alone, asked = cli(), cli("--help")
    assert (alone.code, alone.err) == (0, "")
    assert alone.out.split() == asked.out.split()
    for title in GROUPS:
        assert f"\n{title}:\n" in alone.out
    assert cli("recipes").code == 0


def test_version(ok: Cli) -> None:
    assert ok("-V").out == ok("--version").out == f"moesurgery {moesurgery.__version__}\n"


def test_options_stand_in_panels(ok: Cli) -> None:
    text = ok("rescale", "--help").out
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert titles == ["Arguments", "Operation", "Text", "Repair", "Output", "Help"]
    panels = dict(zip(titles, re.split(r"^\w+:$", text, flags=re.MULTILINE)[1:], strict=True))
    for panel, option in (("Operation", "--top-k K"), ("Text", "--text FILE"), ("Repair", "--refit"), ("Output", "-o")):
        assert option in panels[panel]
    assert "--seed" in panels["Operation"]  # its own, not that of text


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_values_are_called_by_words(ok: Cli, monkeypatch: pytest.MonkeyPatch, command: str, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = ok(command, "--help").out
    assert not re.search(r"<\w|\[\w+\]>|list\[|int range", text), text
    assert max(map(len, text.splitlines())) <= int(columns)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("moesurgery rescale --scale mea", ["measured", "measured-expert"]),
        ("moesurgery recipes show rescale-t", ["rescale-top3"]),
        ("moesurgery families olm", ["olmoe"]),
        ("moesurgery resc", ["rescale"]),
    ],
)
def test_the_shell_completes(words: str, offered: list[str]) -> None:
    assert complete(words) == offered


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["rescale", ".", "--topk", "3"], "--top-k"), (["convert", ".", "--dypte", "float16"], "--dtype")],
)
def test_the_nearest_option_is_named(cli: Cli, arguments: list[str], near: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert f"did you mean {near}?" in result.err
