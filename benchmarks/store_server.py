"""A read-only server of a folder on loopback with the rate of a network: plain HTTP, S3, and the Hub's endpoints.

All connections share `rate` bytes per second; each waits `latency` seconds before it answers, and gets at most
`connection_rate` bytes per second. `/NAME/FILE` are the files (with an HTML list at `/NAME/`), `/s3/NAME/FILE` what a
bucket called `s3` holds, and `/acme/NAME/resolve/REVISION/FILE` the repository acme/NAME of the Hub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEP = 256 << 10


class Rate:
    """Bytes per second, shared by all that take from it; what is not taken is lost but for 20 ms."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.next = time.monotonic()
        self.lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until so many bytes may have been sent."""
        with self.lock:
            self.next = max(self.next, time.monotonic() - 0.02) + count / self.rate
            wait = self.next - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Handler(BaseHTTPRequestHandler):
    folder: ClassVar[Path]
    shared: ClassVar[Rate]
    connection_rate: ClassVar[float]
    latency: ClassVar[float]
    lock: ClassVar[threading.Lock] = threading.Lock()
    sent: ClassVar[int] = 0
    requests: ClassVar[int] = 0
    first: ClassVar[float] = 0.0
    last: ClassVar[float] = 0.0
    protocol_version = "HTTP/1.1"
    own: Rate

    def setup(self) -> None:
        super().setup()
        self.own = Rate(self.connection_rate)

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.text(b"[]", "application/json", False)

    def answer(self, head: bool) -> None:
        if self.path == "/counts":
            seconds = Handler.last - Handler.first
            counts = {"bytes": Handler.sent, "requests": Handler.requests, "seconds": seconds}
            return self.text(json.dumps(counts).encode(), "application/json", False)
        Handler.first = Handler.first or time.monotonic()
        if self.latency:
            time.sleep(self.latency)
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        query = parse_qs(address.query, keep_blank_values=True)
        if parts[:2] == ["api", "models"] and len(parts) > 3:
            return self.hub(parts[3], parts[4:], head)
        if parts[0] == "s3":
            return self.s3(parts[1:], query, head)
        if "resolve" in parts:
            return self.file(self.folder / parts[1] / "/".join(parts[4:]), head, {"X-Repo-Commit": COMMIT})
        path = self.folder / "/".join(parts)
        if path.is_dir():
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in sorted(os.listdir(path)))
            return self.text(links.encode(), "text/html", head)
        return self.file(path, head)

    def hub(self, name: str, what: list[str], head: bool) -> None:
        files = [each for each in sorted((self.folder / name).iterdir()) if each.is_file()]
        if what[:1] == ["tree"]:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return self.text(json.dumps(tree).encode(), "application/json", head)
        siblings = [{"rfilename": each.name} for each in files]
        facts = {"id": f"acme/{name}", "sha": COMMIT, "siblings": siblings}
        return self.text(json.dumps(facts).encode(), "application/json", head)

    def s3(self, parts: list[str], query: dict[str, list[str]], head: bool) -> None:
        if "list-type" not in query:
            return self.file(self.folder / "/".join(parts), head)
        prefix = query.get("prefix", [""])[0]
        found = sorted(p for p in self.folder.rglob("*") if p.is_file() and self.key(p).startswith(prefix))
        rows = "".join(
            f"<Contents><Key>{self.key(p)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{tag(p)}&quot;</ETag><Size>{p.stat().st_size}</Size></Contents>"
            for p in found
        )
        listing = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>s3</Name>'
            f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        )
        return self.text(listing.encode(), "application/xml", head)

    def key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def text(self, data: bytes, kind: str, head: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def file(self, path: Path, head: bool, more: dict[str, str] | None = None) -> None:
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        for name, value in {
            "Content-Length": str(last + 1 - first),
            "Content-Type": "binary/octet-stream",
            "Accept-Ranges": "bytes",
            "Last-Modified": formatdate(0, usegmt=True),
            "ETag": f'"{tag(path)}"',
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if head:
            return
        self.wfile.flush()
        with open(path, "rb") as file:
            at = first
            while at <= last:
                count = min(STEP, last + 1 - at)
                self.own.take(count)
                self.shared.take(count)
                while count:
                    done = os.sendfile(self.connection.fileno(), file.fileno(), at, count)
                    at, count = at + done, count - done
        with self.lock:
            Handler.sent += last + 1 - first
            Handler.requests += 1
            Handler.last = time.monotonic()

    def log_message(self, *_: object) -> None:
        pass


def tag(path: Path) -> str:
    return hashlib.md5(f"{path.name} {path.stat().st_size}".encode(), usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=1e8)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--connection-rate", type=float, default=1e12)
    options = parser.parse_args()
    Handler.folder, Handler.shared = options.folder, Rate(options.rate)
    Handler.latency, Handler.connection_rate = options.latency, options.connection_rate
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
