"""Whether a server answered with the bytes that were asked for, of the file that was opened.

RFC 9110: 206 with the range in Content-Range (15.3.7, 14.4), 200 with the whole file where ranges are ignored (14.2),
and an ETag that identifies a version of the file (8.8.3). Client libraries check none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesurgery.errors import CheckpointError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
ASK_AGAIN = "run the same command again: finished shards are kept; a proxy between may be what answers"
CHANGED = "wait until nothing writes to it, then start again from the beginning"


@dataclass(frozen=True)
class RangeRequest:
    """A range of a file: bytes `start:stop` of `where`, which has `size` bytes (None: not known).

    `seen` holds, by file, the ETag of the first answer, or its Last-Modified: all others must have it.
    """

    where: str
    start: int
    stop: int
    size: int | None
    file: str
    seen: dict[str, str]

    def check(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise CheckpointError where an answer that is no error and no redirection is not what was asked for."""
        if status == 206:
            self._check_range(headers.get("content-range", ""))
        elif (self.start, self.stop) != (0, self.size):
            raise self._wrong(f"with all of the file (status {status})", "download the model first")
        encoding = headers.get("content-encoding", "identity")
        if encoding not in ("identity", ""):
            raise self._wrong(f"in the encoding {encoding[:40]!r}", ASK_AGAIN)
        tag = headers.get("etag", "").removeprefix("W/") or headers.get("last-modified", "")
        if tag and (first := self.seen.setdefault(self.file, tag)) != tag:
            raise CheckpointError(
                f"{self.where} changed while it was in use: it was {first[:80]}, now it is {tag[:80]}", CHANGED
            )

    def check_length(self, length: int) -> None:
        """Raise CheckpointError where other than all of the bytes came."""
        if length != self.stop - self.start:
            raise self._wrong(f"with {length:,} bytes", ASK_AGAIN)

    def _check_range(self, given: str) -> None:
        match = _CONTENT_RANGE.fullmatch(given)
        if match is None:
            raise self._wrong(f"with Content-Range {given[:80]!r}", ASK_AGAIN)
        if (int(match[1]), int(match[2]) + 1) != (self.start, self.stop):
            raise self._wrong(f"with bytes {int(match[1]):,} to {int(match[2]):,}", ASK_AGAIN)
        if self.size is not None and match[3] not in ("*", str(self.size)):
            message = f"{self.where} changed while it was in use: it had {self.size:,} bytes, now {int(match[3]):,}"
            raise CheckpointError(message, CHANGED)

    def _wrong(self, what: str, hint: str) -> CheckpointError:
        wanted = f"bytes {self.start:,} to {self.stop - 1:,}"
        return CheckpointError(f"{self.where}: {wanted} were asked for, the server answered {what}", hint)


def http_answers(request: RangeRequest) -> dict[str, Any]:
    """Return options with which `cat_file` of fsspec's HTTP file system (aiohttp) checks its response."""

    async def look(response: Any) -> None:
        if response.status < 300:
            request.check(response.status, {key.lower(): value for key, value in response.headers.items()})

    return {"raise_for_status": look, "headers": {"Accept-Encoding": "identity"}}
