"""What a person sees at a terminal: tables that fit, progress, warnings, Ctrl-C, closed pipes."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moesurgery.cli import _console
from moesurgery.cli._table import table_lines, width
from tests.conftest import DEMO, ROOT, Result

Cli = Callable[..., Result]
TEXT = ROOT / "examples" / "demo" / "heldout-code.txt"
SMALL = ["--window", 64, "--tokens", 256]


# Tables


def test_a_table_fits_and_loses_nothing() -> None:
    header = ["what", "how many parameters", "where it is from", "名前"]
    rows = [
        [
            "model.layers.#.block_sparse_moe.experts.#.w1.weight",
            "46,702,792,704",
            "a sentence of many words",
            "大きい模型",
        ]
    ]
    for limit in (80, 60, 50):
        lines = [line for line, _ in table_lines([header, *rows], [1], limit)]
        assert all(width(line) <= limit for line in lines)
        assert "46,702,792,704" in "\n".join(lines)
        wanted, letters = Counter("".join([*header, *rows[0]])), Counter("".join(lines))
        assert all(letters[letter] >= count for letter, count in wanted.items() if letter != " ")
        assert limit < 80 or rows[0][0] in "\n".join(lines)
    assert len(list(table_lines([header, *rows], [1], None))) == 2


def test_columns_without_room_follow_below_with_the_first_again() -> None:
    rows = [["layer", *(f"column {i}" for i in range(12))], ["7", *(f"{10**9 + i:,}" for i in range(12))]]
    lines = [line for line, _ in table_lines(rows, range(13), 40)]
    assert all(width(line) <= 40 for line in lines)
    assert all(f"{10**9 + i:,}" in "\n".join(lines) for i in range(12))
    assert sum(line.strip().startswith("7 ") for line in lines) == lines.count("") + 1 > 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["count-params", DEMO, "--by-layer"],
        ["inspect", DEMO],
        ["families"],
        ["recipes", "ls"],
        ["rescale", DEMO, "--top-k", 3, "--dry-run"],
        ["drop-experts", DEMO, "--keep", "25%", "--dry-run"],
        ["merge-experts", DEMO, "--to", 4, "--dry-run"],
        ["tie-blocks", DEMO, "--scheme", "cycle", "--dry-run"],
        ["convert", DEMO, "--dtype", "float16", "--dry-run"],
        ["diff", DEMO, "EDITED"],
        ["collect", DEMO, "--text", TEXT, "-o", "stats", *SMALL],
        ["probe", DEMO, "--text", TEXT, *SMALL],
        ["compare", DEMO, "EDITED", "--text", TEXT, "--window", 64, "--limit", 2],
        ["rescale", DEMO, "--top-k", 3, "--text", TEXT, "--dry-run", "--limit", 2, *SMALL],
    ],
    ids=lambda words: " ".join(map(str, words[:1])),
)
def test_every_table_fits_80_columns(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    if "EDITED" in arguments:
        cli("rescale", DEMO, "--top-k", 3, "-o", "edited")
        arguments = ["edited" if word == "EDITED" else word for word in arguments]
    shown: list[str] = []

    def recorded(rows: Sequence[Sequence[str]], right: Sequence[int], limit: int | None) -> list[tuple[str, bool]]:
        lines = list(table_lines(rows, right, limit))
        shown.extend(line for line, _ in lines)
        return lines

    monkeypatch.setattr(_console, "table_lines", recorded)
    result = cli(*arguments)
    assert result.code in (0, 1), result.err
    assert shown or arguments[0] in ("convert", "tie-blocks")
    assert [line for line in shown if width(line) > 80] == []


# Warnings


def test_an_edit_that_changes_nothing_says_so(ok: Cli, tmp_path: Path) -> None:
    tried = ok("rescale", DEMO, "--top-k", 2, "--dry-run", "-o", tmp_path / "out")
    assert tried.err.startswith("warning: nothing would change")
    done = ok("rescale", DEMO, "--top-k", 2, "--json", "-o", tmp_path / "out")
    assert done.err.startswith("warning: nothing changes")
    assert done.json["schema_version"] == 1
    assert "nothing" not in ok("rescale", DEMO, "--top-k", 3, "--dry-run").err
    assert "nothing" not in ok("convert", DEMO, "--max-shard-size", "1MB", "--dry-run").err


# Streams


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_writer_whose_reader_is_gone_finishes(tmp_path: Path, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moesurgery", "rescale", str(DEMO), "--top-k", "3", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


SLOW = """
import sys, time
import moesurgery.cli.count_params as command
from moesurgery.cli import run
command.recognise = lambda *_: time.sleep(60)
sys.argv = ["moesurgery", "count-params", {model!r}]
print("begin", flush=True)
run()
"""


def on_a_terminal(program: str, seen: Callable[[bytes], bool]) -> tuple[bool, str, int]:
    """Run Python with stderr on a terminal; interrupt it once `seen` of what is shown there, or after 20 seconds.

    Return whether it was seen, all that was shown, and the exit code. The programs work for longer than that.
    """
    ours, theirs = pty.openpty()
    command, environment = [sys.executable, "-c", program], {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, env=environment) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begin\n"
        begun, shown = time.monotonic(), b""
        while not seen(shown) and time.monotonic() - begun < 20:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
        in_time = seen(shown)
        process.send_signal(signal.SIGINT)
        try:
            while block := os.read(ours, 4096):
                shown += block
        except OSError:
            pass  # the other end of a terminal is closed
        process.wait(20)
    os.close(ours)
    return in_time, shown.decode(), process.returncode


def test_progress_appears_before_the_work_is_done_and_ctrl_c_is_one_line() -> None:
    program = SLOW.format(model=str(DEMO))
    in_time, shown, code = on_a_terminal(program, lambda text: b"moesurgery count-params: " in text)
    assert in_time, shown
    assert "reading and planning" in shown
    assert code == 130
    assert [line.rsplit("\r", 1)[-1] for line in shown.split("\r\n") if line] == ["interrupted"]
    assert "Traceback" not in shown


PROGRESS = """
import sys, time
from moesurgery.cli._console import console
print("begin", flush=True)
with console.progress("measuring", 100, of_bytes=False) as watch:
    for step in range(100):
        time.sleep(0.3)
        watch.progress(1)
"""


def test_a_bar_appears_at_once_and_tells_the_time_left_from_the_first_step() -> None:
    in_time, shown, _ = on_a_terminal(PROGRESS, lambda text: b"0:00:" in text)
    assert in_time, shown
    assert "measuring" in shown


def test_an_interrupted_writer_says_in_one_line_what_is_kept(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        (tmp_path / "out.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("moesurgery.cli._writing.write_plan", interrupted)
    result = cli("rescale", DEMO, "--top-k", 3, "-o", tmp_path / "out", "-q")
    assert result.code == 130
    (line,) = result.err.strip().split("\n")
    assert line.startswith("interrupted; ")
    assert "the same command resumes it" in line
