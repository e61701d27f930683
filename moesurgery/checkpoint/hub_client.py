"""Bounds on every response of the Hub: size, transfer rate, waiting time and number of requests.

huggingface_hub reads a response whole, waits as long as Retry-After sets and follows every link. Here a response may
have as many bytes as were requested, must keep a minimum rate, and the number of requests per operation is limited. The
bounds hold for requests that are made within `bounded()`, and for no others of the process.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from moesurgery.checkpoint.http_answers import ASK_AGAIN
from moesurgery.errors import CheckpointError

MAX_ANSWER = 64 << 20  # bytes of an answer to anything but a byte range: lists of files, facts about a model
MAX_REQUESTS = 200  # of one operation: a list of 20,000 files comes in 20 pages
MAX_TRIES = 10  # of one and the same request: huggingface_hub makes six
MAX_WAIT = 60  # seconds that a server may ask to wait before the next try
SILENCE = 30.0  # seconds without a byte
GRACE = 30.0  # seconds that any answer may take, and then as long as PACE allows
PACE = 100_000  # bytes per second

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_RESET = re.compile(r";\s*t\s*=\s*(\d+)")
_CLIENT_LOCK = threading.Lock()  # a client that is replaced while another thread uses it is closed under its hands
_LATER = "run the same command again later: finished shards are kept"


class _Operation:
    """One listing or one read, and the requests that it has made."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.requests: Counter[str] = Counter()

    def refuse(self, what: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.where}: the server {what}", hint or "is it the Hub that answers?")


_own = threading.local()
_open: list[_Operation] = []  # of all threads: huggingface_hub lists folders in threads of its own


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Bound the requests that are made within; `where` names in messages what is read."""
    operation = _Operation(where)
    before = getattr(_own, "operation", None)
    _own.operation = operation
    _open.append(operation)
    try:
        yield
    finally:
        _own.operation = before
        _open.remove(operation)


def _current() -> _Operation | None:
    own: _Operation | None = getattr(_own, "operation", None)
    return own or next(iter(_open), None)


def bound_the_hub() -> None:
    """Have huggingface_hub make its requests through a client that checks every response."""
    with _CLIENT_LOCK:
        _bound_the_hub()


@cache
def _bound_the_hub() -> None:
    from huggingface_hub import get_session, set_client_factory

    present: Any = get_session()
    kind, hooks = type(present), present.event_hooks
    # httpx or what took its place, as huggingface_hub has it.
    stream = sys.modules[kind.__module__.partition(".")[0]].SyncByteStream
    bounded_stream = type("BoundedStream", (_Bounded, stream), {})

    def look(response: Any) -> None:
        _check_answer(response, bounded_stream)

    def client() -> Any:
        return kind(
            event_hooks={"request": [*hooks["request"], _prepare], "response": [*hooks["response"], look]},
            follow_redirects=True,
            timeout=present.timeout,
        )

    set_client_factory(client)


def _prepare(request: Any) -> None:
    """Count a request, and set it to accept no compression: a few bytes could expand to any number."""
    operation = _current()
    if operation is None:
        return
    address = f"{request.method} {request.url} {request.headers.get('range', '')}"
    operation.requests[address] += 1
    if operation.requests[address] > MAX_TRIES:
        raise operation.refuse(f"leads to the same page more than {MAX_TRIES} times")
    if operation.requests.total() > MAX_REQUESTS:
        raise operation.refuse(f"leads to more than {MAX_REQUESTS} requests, from one to the next")
    request.headers["accept-encoding"] = "identity"
    timeout = request.extensions.get("timeout") or {}
    wanted = {key: timeout.get(key) or SILENCE for key in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": wanted}


def _check_answer(response: Any, bounded_stream: Any) -> None:
    """Refuse a response with too long a wait or too large a body; bound the body of any other before it is read."""
    operation = _current()
    if operation is None:
        return
    encoding = response.headers.get("content-encoding", "identity")
    if encoding not in ("identity", ""):
        raise operation.refuse(f"answered in the encoding {encoding[:50]!r}, which was not asked for", ASK_AGAIN)
    for wait in (response.headers.get("retry-after", ""), *_RESET.findall(response.headers.get("ratelimit", ""))):
        if response.status_code >= 400 and wait.strip().isdecimal() and not _at_most(wait.strip(), MAX_WAIT):
            raise operation.refuse(
                f"asks to wait {wait.strip()[:20]} s (status {response.status_code}); {MAX_WAIT} s are waited for",
                _LATER,
            )
    asked = _RANGE.fullmatch(response.request.headers.get("range", ""))
    limit = int(asked[2]) - int(asked[1]) + 1 if asked and response.status_code < 400 else MAX_ANSWER
    stated = response.headers.get("content-length", "")
    if response.request.method != "HEAD" and stated.isdecimal() and not _at_most(stated, limit):
        sizes = f"{stated[:20]} bytes where {limit:,} were asked for"
        if asked and response.status_code == 200:
            raise operation.refuse(f"answered with all of the file (status 200), {sizes}", "download the model first")
        raise operation.refuse(f"answers with {sizes}")
    response.stream = bounded_stream(response.stream, limit, operation)


def _at_most(digits: str, limit: int) -> bool:
    return len(digits) < 19 and int(digits) <= limit


class _Bounded:
    """The body of a response, of at most `limit` bytes, at a minimum rate."""

    def __init__(self, stream: Any, limit: int, operation: _Operation) -> None:
        self.stream, self.limit, self.operation = stream, limit, operation

    def __iter__(self) -> Iterator[bytes]:
        begun, length = time.monotonic(), 0
        for part in self.stream:
            length += len(part)
            if length > self.limit:
                raise self.operation.refuse(f"answers with more than the {self.limit:,} bytes that were asked for")
            if time.monotonic() - begun > GRACE + length / PACE:
                took = f"{length:,} bytes in {time.monotonic() - begun:.0f} s"
                raise self.operation.refuse(f"is too slow: {took}", _LATER)
            yield part

    def close(self) -> None:
        self.stream.close()
