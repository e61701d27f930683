"""A line on the terminal that says what goes on while nothing else is shown: imports, headers, planning."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import IO

AFTER = 1.0  # seconds of silence after which the line appears


class Activity:
    """Shows `moesurgery NAME: importing torch, 3 s` on stderr, a terminal, from a second of silence on.

    Whoever prints calls `clear` first. `pause` and `go_on` stand around a progress bar.
    """

    def __init__(self, name: str, stream: IO[str]) -> None:
        self._name, self._stream = name, stream
        self._lock = threading.RLock()
        self._since = self._started = time.monotonic()
        self._shown = 0
        self._paused = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Activity:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.clear()

    def clear(self) -> None:
        """Take the line away; it returns after another second of silence."""
        with self._lock:
            if self._shown:
                self._write("\r" + " " * self._shown + "\r")
                self._shown = 0
            self._since = time.monotonic()

    def pause(self) -> None:
        with self._lock:
            self._paused += 1
            self.clear()

    def go_on(self) -> None:
        with self._lock:
            self._paused -= 1
            self.clear()

    def _run(self) -> None:
        while not self._ended.wait(0.25):
            with self._lock:
                if self._ended.is_set() or self._paused or time.monotonic() - self._since < AFTER:
                    continue
                text = f"{self._name}: {_current_work()}, {time.monotonic() - self._started:.0f} s"
                self._write("\r" + text.ljust(self._shown))
                self._shown = len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._ended.set()  # the terminal is gone


def _current_work() -> str:
    """Say what takes long: the import of a large library, or work on the checkpoint."""
    for library in ("torch", "transformers"):
        spec = getattr(sys.modules.get(library), "__spec__", None)
        if getattr(spec, "_initializing", False):
            return f"importing {library}"
    return "reading and planning"
