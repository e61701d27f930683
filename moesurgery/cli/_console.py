"""The one place that prints: results on stdout, everything else on stderr.

Tensor names, file names and config values come from strangers: control characters and direction marks are
shown escaped, and nothing is parsed as markup.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from moesurgery.cli._activity import Activity
from moesurgery.cli._table import table_lines
from moesurgery.escape import safe
from moesurgery.write.shard import JobControl


class Console:
    """What a command prints with. `quiet` leaves results and errors only."""

    def __init__(self) -> None:
        self.colour: bool | None = None
        self._activity: Activity | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier command set. `if_interrupted` is what is said after Ctrl-C."""
        self.quiet = False
        self.if_interrupted = "interrupted"

    def result(self, text: str = "") -> None:
        """Print a line of the answer."""
        self._print(safe(text), sys.stdout)

    def json(self, value: Any) -> None:
        """Print one JSON document, the whole of stdout."""
        self._print(json.dumps(value, indent=2, ensure_ascii=True), sys.stdout)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print aligned columns, no wider than the terminal; those in `right` are aligned to the right."""
        cells = [[safe(str(c)) for c in row] for row in (header, *rows)]
        for line, of_header in table_lines(cells, right, _columns()):
            self._print(self._style(line, "1") if of_header else line, sys.stdout)

    def note(self, text: str) -> None:
        """Say something that is not the answer."""
        if not self.quiet:
            self._print(safe(text), sys.stderr)

    def warning(self, text: str) -> None:
        if not self.quiet:
            self._print(self._style("warning: ", "33", sys.stderr) + safe(text), sys.stderr)

    def error(self, message: str, hint: str | None = None) -> None:
        for line in message.splitlines() or [""]:
            self._print(self._style("error: ", "31;1", sys.stderr) + safe(line), sys.stderr)
        if hint:
            self._print(self._style("hint:  ", "36", sys.stderr) + safe(hint), sys.stderr)

    def _print(self, line: str, stream: IO[str]) -> None:
        if self._activity is not None:
            self._activity.clear()
        try:
            print(line, file=stream)
        except BrokenPipeError:
            drop_output(stream)

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Say on the terminal what goes on whenever nothing has been shown for a second."""
        if not sys.stderr.isatty():
            yield
            return
        with Activity(name, sys.stderr) as self._activity:
            try:
                yield
            finally:
                self._activity = None

    def _style(self, text: str, code: str, stream: IO[str] | None = None) -> str:
        stream = stream or sys.stdout
        wanted = self.colour
        if wanted is None:
            wanted = bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and not os.environ.get("NO_COLOR"))
        return f"\033[{code}m{text}\033[0m" if wanted else text

    @contextmanager
    def progress(self, what: str, total: int, *, of_bytes: bool = True) -> Iterator[JobControl]:
        """Show bytes and rate (or the share done) and time left on stderr while a job runs, on a terminal."""
        watch = JobControl()
        if self.quiet or total == 0 or not sys.stderr.isatty():
            yield watch
            return
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            Task,
            TaskProgressColumn,
            TextColumn,
            TransferSpeedColumn,
        )
        from rich.text import Text

        class TimeLeft(ProgressColumn):
            """The time left at the mean speed so far, from the first step on."""

            def render(self, task: Task) -> Text:
                if not task.completed or not task.elapsed or task.total is None:
                    return Text("-:--:--")
                left = task.elapsed * max(task.total - task.completed, 0) / task.completed
                return Text(f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")

        lock, moved = threading.Lock(), 0
        amount: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if of_bytes else [TaskProgressColumn()]
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeLeft(),
            console=RichConsole(stderr=True, markup=False),
            transient=True,
        )
        task = bar.add_task(safe(what), total=total)
        shown = time.monotonic()

        def advance(count: int) -> None:
            nonlocal moved, shown
            with lock:
                moved += count
                if time.monotonic() - shown > 0.1:
                    shown = time.monotonic()
                    bar.update(task, completed=moved)

        watch.progress = advance
        activity = self._activity
        if activity is not None:
            activity.pause()
        try:
            with bar:
                yield watch
                bar.update(task, completed=moved)
        finally:
            if activity is not None:
                activity.go_on()


def drop_output(stream: IO[str]) -> None:
    """Let what is still printed go nowhere: the reader of our output is gone (`| head`), the work goes on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _columns() -> int | None:
    """Return how wide a table may be: COLUMNS, or the terminal; None where there is neither."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        return None
    return shutil.get_terminal_size().columns


def human_bytes(count: float) -> str:
    """Return a size in decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def human_count(count: int) -> str:
    """Return a count of parameters as people say it: 46.70 B."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(count)


console = Console()
