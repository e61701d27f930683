"""The one place that prints: results on stdout, everything else on stderr.

Tensor names, file names and config values come from strangers: control characters and direction marks are
shown escaped, and nothing is parsed as markup.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.errors import OutputError
from moesurgery.escape import one_line, safe
from moesurgery.write.shard import JobControl

_LONGEST = 2000  # characters of a line of an error: a recipe or a config may hold any number of them


@contextmanager
def _answering() -> Iterator[None]:
    """Say where an answer cannot go; a reader that is gone (`| head`) is no error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"the answer cannot be written to standard output: {error.strerror}",
            "let it go elsewhere, as with > FILE on a disk with space; what was written to -o is complete",
        ) from None


class Console:
    """What a command prints with. `quiet` leaves results and errors only."""

    def __init__(self) -> None:
        self.quiet = False
        self.colour: bool | None = None

    def result(self, text: str = "") -> None:
        """Print a line of the answer."""
        self._print(safe(text))

    def json(self, value: Any) -> None:
        """Print one JSON document, the whole of stdout."""
        self._print(ascii_json(value))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print aligned columns; those in `right` are aligned to the right."""
        cells = [[safe(str(c)) for c in row] for row in (header, *rows)]
        widths = [max(width(row[i]) for row in cells) for i in range(len(header))]
        for n, row in enumerate(cells):
            shown = [
                " " * (w - width(c)) + c if i in right else c + " " * (w - width(c))
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            line = "  ".join(shown).rstrip()
            self._print(self._style(line, "1") if n == 0 else line)

    def _print(self, line: str) -> None:
        with _answering():
            print(line, file=sys.stdout)

    def flush(self) -> None:
        """Write what was printed. Raises OutputError where it cannot be written."""
        with _answering():
            sys.stdout.flush()

    def _say(self, line: str) -> None:
        """Print on stderr; where that cannot be written, there is nobody to be told."""
        with suppress(OSError):
            print(line, file=sys.stderr)

    def note(self, text: str) -> None:
        """Say something that is not the answer."""
        if not self.quiet:
            self._say(safe(text))

    def warning(self, text: str) -> None:
        if not self.quiet:
            self._say(self._style("warning: ", "33", sys.stderr) + safe(text))

    def error(self, message: str, hint: str | None = None) -> None:
        for line in message.splitlines() or [""]:
            self._say(self._style("error: ", "31;1", sys.stderr) + one_line(line, _LONGEST))
        if hint:
            self._say(self._style("hint:  ", "36", sys.stderr) + one_line(hint, _LONGEST))

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
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        lock, moved = threading.Lock(), 0
        amount: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if of_bytes else [TaskProgressColumn()]
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
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
        with bar:
            yield watch
            bar.update(task, completed=moved)


def width(text: str) -> int:
    """Return the columns that `text` takes; wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


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
