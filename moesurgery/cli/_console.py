"""The one place that prints: results on stdout, everything else on stderr.

Tensor names, file names and config values come from strangers: control characters and direction marks are
shown escaped, and nothing is parsed as markup.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.cli._activity import Activity
from moesurgery.cli._table import table_lines
from moesurgery.errors import OutputError
from moesurgery.escape import one_line, safe
from moesurgery.write.job_control import JobControl

LOG_SECONDS = 30  # between lines of progress where there is no terminal
_LONGEST = 2000  # characters of a line of an error: a recipe or a config may hold any number of them


@contextmanager
def _answering() -> Iterator[None]:
    """Say where an answer cannot go; a reader that is gone (`| head`) is no error."""
    try:
        yield
    except BrokenPipeError:
        drop_output(sys.stdout)
    except OSError as error:
        raise OutputError(
            f"the answer cannot be written to standard output: {error.strerror}",
            "let it go elsewhere, as with > FILE on a disk with space; what was written to -o is complete",
        ) from None


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
        self._print(safe(text))

    def json(self, value: Any) -> None:
        """Print one JSON document, the whole of stdout."""
        self._print(ascii_json(value))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print aligned columns, no wider than the terminal; those in `right` are aligned to the right."""
        cells = [[safe(str(c)) for c in row] for row in (header, *rows)]
        for line, of_header in table_lines(cells, right, _columns()):
            self._print(self._style(line, "1") if of_header else line)

    def _print(self, line: str) -> None:
        self._clear_activity()
        with _answering():
            print(line, file=sys.stdout)

    def flush(self) -> None:
        """Write what was printed. Raises OutputError where it cannot be written."""
        with _answering():
            sys.stdout.flush()

    def _say(self, line: str) -> None:
        """Print on stderr; where that cannot be written, there is nobody to be told."""
        self._clear_activity()
        with suppress(OSError):
            print(line, file=sys.stderr)

    def _clear_activity(self) -> None:
        if self._activity is not None:
            self._activity.clear()

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

    @contextmanager
    def _instead_of_activity(self) -> Iterator[None]:
        """Keep the line of `activity` away while progress is shown."""
        activity = self._activity
        if activity is None:
            yield
            return
        activity.pause()
        try:
            yield
        finally:
            activity.go_on()

    def _style(self, text: str, code: str, stream: IO[str] | None = None) -> str:
        stream = stream or sys.stdout
        wanted = self.colour
        if wanted is None:
            wanted = bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and not os.environ.get("NO_COLOR"))
        return f"\033[{code}m{text}\033[0m" if wanted else text

    @contextmanager
    def layer_progress(self, what: str, tokens: int, layers: int) -> Iterator[JobControl]:
        """Show layer, tokens per second and time left on stderr while all tokens go through all layers.

        On a terminal that is one line; elsewhere a line every `LOG_SECONDS`.
        """
        watch, lock, terminal = JobControl(), threading.Lock(), sys.stderr.isatty()
        moved = 0
        shown = time.monotonic()
        base: tuple[float, int] | None = None  # what the first call brings may be what an earlier run has done

        def advance(count: int) -> None:
            nonlocal moved, shown, base
            with lock:
                moved += count
                now = time.monotonic()
                if base is None:
                    base = now, moved
                if self.quiet or now - shown < (0.2 if terminal else LOG_SECONDS):
                    return
                shown = now
                rate = (moved - base[1]) / layers / max(now - base[0], 1e-9)
                left = duration((tokens * layers - moved) / layers / rate) if rate else "an unknown time"
                layer = min(layers, moved // max(tokens, 1) + 1)
                line = f"{what}: layer {layer} of {layers}, {rate:,.0f} tokens/s, {left} left"
                end = "" if terminal else "\n"
                print(f"\r{line}\033[K" if terminal else line, end=end, file=sys.stderr, flush=True)

        watch.progress = advance
        try:
            with self._instead_of_activity():
                yield watch
        finally:
            if terminal and not self.quiet:
                print("\r\033[K", end="", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, what: str, total: int | None, *, of_bytes: bool = True) -> Iterator[JobControl]:
        """Show bytes and rate (or the share done) and time left on stderr while a job runs, on a terminal.

        `total`: None where the job says with `expect` how many bytes there are.
        """
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

        watch.progress, watch.expect = advance, lambda count: bar.update(task, total=count)
        with self._instead_of_activity(), bar:
            yield watch
            bar.update(task, completed=moved)


def drop_output(stream: IO[str]) -> None:
    """Let what is still printed go nowhere: the reader of our output is gone (`| head`), the work goes on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def duration(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


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
