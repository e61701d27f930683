"""A function that can be suspended at any depth of its call stack and resumed, like a greenlet.

It runs in a thread of its own, but only while its owner waits for it: only one of these threads, or the owner's, runs
at any time. (A generator cannot do this: every function of transformers in between would have to yield.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_here = threading.local()


class _Abandoned(BaseException):
    """Raised inside a coroutine that is closed, to unwind its stack."""


class Errand:
    """A request that the owner answers at once, by running `call()` in its own thread.

    Each thread that calls torch gets its own pool of worker threads; several pools would oversubscribe the cores.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


class Coroutine:
    """`function()`, run up to each `ask`. `request` is what it asked for; `done` and `result` are set at the end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.request: Any = None
        self.result: Any = None
        self.done = False
        self._function = function
        self._answer: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self, answer: Any = None) -> None:
        """Run until the next `ask` or the end, giving `answer` to the last `ask`. Raises what the function raises."""
        self._resume(answer)
        answer = None  # a large tensor is not to be kept alive from here
        while isinstance(self.request, Errand):
            self._resume(self.request.call())

    def _resume(self, answer: Any) -> None:
        self.request, self._answer = None, answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        answer = None
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Unwind the function where it waits. Harmless when it has ended or has not begun."""
        if self._thread.ident is not None and not self.done:
            self._abandoned = True
            self._turn.release()
            self._thread.join()

    def ask(self, request: Any) -> Any:
        """Called by the function: suspend with a request, and return the answer when resumed."""
        self.request = request
        del request
        self._back.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer

    def _run(self) -> None:
        _here.coroutine = self
        try:
            self.result = self._function()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.request, self.done = None, True
            self._back.release()


def current() -> Coroutine | None:
    """Return the coroutine that runs in this thread, if any."""
    return getattr(_here, "coroutine", None)
