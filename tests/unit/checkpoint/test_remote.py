"""`hf://` checkpoints against a real HTTP server with ranges on loopback, and other fsspec URLs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moesurgery.checkpoint.http_answers import RangeRequest
from moesurgery.checkpoint.remote_source import RemoteSource
from moesurgery.errors import CheckpointError
from tests.conftest import ROOT, Result
from tests.gguf_make import write_gguf
from tests.tiny import read_tensors, same_bits

WAITS = ("Retry-After: 61", "Retry-After: 100000", "Retry-After: " + "9" * 5000, 'RateLimit: "api";r=0;t=100000')
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lfs(data: bytes) -> dict[str, Any]:
    """Return what the Hub says of a large file."""
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub that reading needs: model info, file tree, and files by range."""

    folder: ClassVar[Path]
    served: ClassVar[list[tuple[str, int]]] = []
    wrong: ClassVar[str] = ""  # in what the answers about shards are wrong, once their headers are read
    asked: ClassVar[int] = 0
    fault: ClassVar[str] = ""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = self.path.split("?")[0].replace("%40", "@")
        api = "/api/models/acme/tiny"
        weights = path.endswith(".safetensors")
        if self.fault == "commit" and path.startswith(api) and "tree" not in path:
            self.send(b'{"id": "acme/tiny", "sha": "../../evil", "siblings": []}', head)
        elif self.fault == "junk" and path.startswith(api):
            self.send(b'{"id": 1, "sha": null, "siblings": "x"}', head)
        elif self.fault == "packed facts" and path.startswith(api):
            self.send(gzip.compress(bytes(1 << 20)), head, encoding="gzip")
        elif self.fault == "long facts" and path.startswith(api):
            self.endless(65 << 20)
        elif self.fault in ("endless", "packed", "slow") and weights:
            getattr(self, self.fault)()
        elif self.fault in WAITS and weights:
            name, _, value = self.fault.partition(": ")
            self.send(b"", head, status=429, **{name.replace("-", "_"): value})
        elif self.fault in ("loop", "many pages", "size", "many files") and path.startswith(f"{api}/tree/"):
            self.listing(head)
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": f.name} for f in sorted(self.folder.iterdir())]
            self.send(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode(), head)
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": str(f.relative_to(self.folder)), "size": f.stat().st_size, "oid": "0" * 40}
                | ({"lfs": lfs(f.read_bytes())} if f.suffix == ".safetensors" else {})
                for f in sorted(self.folder.rglob("*"))
                if f.is_file()
            ]
            self.send(json.dumps(tree).encode(), head)
        elif path.startswith(f"{api}/paths-info/"):
            self.send(b"[]", head)
        elif path == "/acme/tiny/resolve/main":
            links = "".join(f'<a href="{name}">{name}</a>' for name in ("?C=N;O=D", *os.listdir(self.folder)))
            self.send(links.encode(), head, content_type="text/html")
        elif path.startswith("/acme/tiny/resolve/"):
            file = self.folder / path.split("/", 5)[5]
            if file.is_file():
                ranges = self.headers.get("Range") is not None and file.suffix == ".safetensors" and not head
                type(self).asked += ranges
                if not (ranges and self.wrong and self.asked > 6 and self.answer_wrongly(file.read_bytes())):
                    self.send(file.read_bytes(), head, ranged=True)
            else:
                self.missing()
        else:
            self.missing()

    def endless(self, length: int = 1 << 34) -> None:
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        part = bytes(1 << 20)
        for _ in range(0, length, len(part)):
            self.wfile.write(b"100000\r\n" + part + b"\r\n")

    def packed(self) -> None:
        self.send(gzip.compress(bytes(64 << 20)), False, status=206, encoding="gzip")

    def slow(self) -> None:
        self.send_response(206)
        self.send_header("Content-Length", "512")
        self.end_headers()
        for _ in range(512):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def listing(self, head: bool) -> None:
        """Answer with a page of the file tree that is wrong."""
        page = int(self.path.partition("page=")[2] or 0)
        files = [{"type": "file", "path": "config.json", "size": 10, "oid": "0" * 40}]
        if self.fault == "size":
            files[0]["size"] = -5
        if self.fault == "many files":
            files += [{"type": "file", "path": f"{i}.json", "size": 3, "oid": "0" * 40} for i in range(20_001)]
        following = page + 1 if self.fault == "many pages" else page
        link = f'<http://{self.headers["Host"]}{self.path.partition("?")[0]}?page={following}>; rel="next"'
        endless = self.fault in ("loop", "many pages")
        self.send(json.dumps(files).encode(), head, **({"link": link} if endless else {}))

    def send(
        self, data: bytes, head: bool, ranged: bool = False, status: int = 200, encoding: str = "", **more: str
    ) -> None:
        wanted = self.headers.get("Range")
        size = len(data)
        first = 0
        if ranged and wanted:
            first_text, _, last_text = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first_text), min(int(last_text or size - 1), size - 1)
            data, status = data[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        for name, value in {**({"content_encoding": encoding} if encoding else {}), **more}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not head:
            self.wfile.write(data)
            if ranged:
                self.served.append((self.path, len(data)))

    def answer_wrongly(self, data: bytes) -> bool:
        """Answer a request for a range in the way that `wrong` says; whether it was answered."""
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        length, size = last + 1 - first, len(data)
        told = {"Content-Range": f"bytes {first}-{last}/{size}", "ETag": '"abc"'}
        status, body = 206, data[first : last + 1]
        if self.wrong == "another range":
            told["Content-Range"] = f"bytes {max(0, first - 4096)}-{max(0, first - 4096) + length - 1}/{size}"
            body = data[max(0, first - 4096) :][:length]
        elif self.wrong == "a longer range":
            told["Content-Range"] = f"bytes {first}-{last + 64}/{size}"
        elif self.wrong == "no range":
            del told["Content-Range"]
        elif self.wrong == "unreadable range":
            told["Content-Range"] = f"items {first}-{last}"
        elif self.wrong == "another size":
            told["Content-Range"] = f"bytes {first}-{last}/{size + 8}"
        elif self.wrong == "another file":
            told["ETag"], body = '"def"', bytes(length)
        elif self.wrong == "all of another page":
            status, body = 200, bytes(length)
            del told["Content-Range"]
        elif self.wrong == "all of the file":
            status, body = 200, data
            del told["Content-Range"]
        elif self.wrong == "an encoding":
            told["Content-Encoding"] = "gzip"
            body = gzip.compress(body)
        elif self.wrong == "too little":
            body = body[:-1]
        elif self.wrong == "another weak tag":
            told["ETag"] = 'W/"abc"'
        else:
            raise AssertionError(self.wrong)
        self.send_response(status)
        for key, value in told.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return True

    def missing(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound" if "/api/" in self.path else "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = missing  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(demo: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Hub that holds the demo model as acme/tiny; yields the environment of its clients."""
    Hub.folder, Hub.served, Hub.wrong, Hub.asked, Hub.fault = demo, [], "", 0, ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    yield environment
    server.shutdown()
    server.server_close()
    thread.join()


def command(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run moesurgery as a process: huggingface_hub reads its endpoint when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from moesurgery.cli import main; sys.exit(main())", *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_count_params_downloads_headers_only(hub: dict[str, str], demo: Path) -> None:
    done = command(hub, "count-params", "hf://acme/tiny", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == f"hf://acme/tiny@{COMMIT}"
    local = json.loads(command(hub, "count-params", demo, "--json").stdout)
    assert {**found, "model": ""} == {**local, "model": ""}
    weights = sum(size for path, size in Hub.served if path.endswith(".safetensors"))
    assert weights <= 3 * (1 << 17)  # one read of at most 128 KiB per shard


def test_a_remote_model_is_validated_by_its_headers(hub: dict[str, str], demo: Path) -> None:
    done = command(hub, "validate", "hf://acme/tiny", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["levels"], found["findings"]) == (["container", "config"], [])
    assert any("V01" in skipped["codes"] for skipped in found["not_checked"])
    assert sum(size for path, size in Hub.served if path.endswith(".safetensors")) <= 6 * (1 << 17)
    same = command(hub, "diff", "hf://acme/tiny", demo)
    assert same.returncode == 0, same.stderr


def test_rescale_of_a_remote_model_equals_that_of_a_local_copy(hub: dict[str, str], demo: Path, tmp_path: Path) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    for source, output in (("hf://acme/tiny@main", remote), (demo, local)):
        done = command(hub, "rescale", source, "--top-k", "3", "-o", output, "-q")
        assert done.returncode == 0, done.stderr
    expected = read_tensors(local)
    found = read_tensors(remote)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[n], expected[n]) for n in expected)
    record = json.loads((remote / "moesurgery.json").read_text())
    assert record["inputs"][0]["identity"] == f"hf://acme/tiny@{COMMIT}"
    assert "base_model:\n- acme/tiny" in (remote / "README.md").read_text()


def cached(environment: dict[str, str], model: Path, files: list[str]) -> Path:
    """Put files of the demo model into the Hub's cache, as huggingface_hub lays it out; return the snapshot."""
    root = Path(environment["HF_HOME"]) / "hub" / "models--acme--tiny"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "refs", root / "blobs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(files):
        shutil.copy(model / file, root / "blobs" / str(i))
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    return snapshot


def test_offline_reads_the_cache_and_nothing_else(hub: dict[str, str], demo: Path, tmp_path: Path) -> None:
    offline = {**hub, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    refused = command(offline, "count-params", "hf://acme/tiny")
    assert refused.returncode == 2
    assert "not in the Hub's cache" in refused.stderr
    assert "hf download acme/tiny" in refused.stderr
    cached(hub, demo, [f.name for f in demo.iterdir()])
    for reference in ("hf://acme/tiny", "hf://acme/tiny@main", f"hf://acme/tiny@{COMMIT}"):
        done = command(offline, "count-params", reference, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"] == f"hf://acme/tiny@{COMMIT}"
    assert "not in the Hub's cache" in command(offline, "count-params", "hf://acme/tiny@other").stderr
    recipe = tmp_path / "r.yml"
    recipe.write_text("models:\n- model: acme/tiny\n  parameters: {weight: 1}\nmerge_method: linear\ndtype: bfloat16\n")
    assert command(offline, "merge", recipe, "-o", tmp_path / "merged").returncode == 0
    unreachable = command({**offline, "HF_HUB_OFFLINE": "0"}, "count-params", "hf://acme/tiny")
    assert unreachable.returncode == 2
    assert "HF_HUB_OFFLINE=1 reads the snapshot" in unreachable.stderr
    assert Hub.served == []


def test_files_in_the_cache_are_not_downloaded_again(hub: dict[str, str], demo: Path, tmp_path: Path) -> None:
    shards = sorted(f.name for f in demo.glob("*.safetensors"))
    cached(hub, demo, ["config.json", *shards[:-1]])
    output = tmp_path / "out"
    done = command(hub, "rescale", "hf://acme/tiny", "--top-k", "3", "-o", output, "-q")
    assert done.returncode == 0, done.stderr
    asked = {path.split("?")[0].rsplit("/", 1)[-1] for path, _ in Hub.served}
    assert shards[-1] in asked
    assert not asked & {"config.json", *shards[:-1]}
    command(hub, "rescale", demo, "--top-k", "3", "-o", tmp_path / "local", "-q")
    expected, found = read_tensors(tmp_path / "local"), read_tensors(output)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[n], expected[n]) for n in expected)


def test_a_gguf_on_the_hub_is_read_by_ranges(hub: dict[str, str], tmp_path: Path, cli: Callable[..., Result]) -> None:
    """By its file, in a folder too: headers alone to count, and the same bytes as of a local copy to write."""
    Hub.folder = tmp_path / "repository"
    (Hub.folder / "Q8").mkdir(parents=True)
    first = write_gguf(Hub.folder / "Q8" / "m.gguf", "Q8_0", parts=2)
    Hub.served.clear()
    done = command(hub, "count-params", f"hf://acme/tiny/Q8/{first.name}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"hf://acme/tiny@{COMMIT}/Q8/{first.name}"
    remote, local = tmp_path / "remote", tmp_path / "local"
    for source, output in ((f"hf://acme/tiny/Q8/{first.name}@main", remote), (first, local)):
        done = command(hub, "drop-experts", source, "--experts", "1", "-o", output, "-q")
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in local.glob("*.gguf"))
    assert len(names) == 2
    assert all((remote / name).read_bytes() == (local / name).read_bytes() for name in names)
    missing = command(hub, "count-params", "hf://acme/tiny/Q8/other.gguf")
    assert missing.returncode == 2
    assert "other.gguf" in missing.stderr
    assert cli("count-params", f"file://{first}", "--json").json["num_experts"] == 4


def test_any_url_that_fsspec_opens(demo: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    for source, output in ((demo.resolve().as_uri(), tmp_path / "url"), (str(demo), tmp_path / "local")):
        done = cli("rescale", source, "--top-k", "3", "-o", output, "-q")
        assert done.code == 0, done.err
    expected, found = read_tensors(tmp_path / "local"), read_tensors(tmp_path / "url")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[n], expected[n]) for n in expected)
    done = cli("count-params", "nosuch://bucket/model")
    assert done.code == 2
    assert "nosuch://bucket/model" in done.err


def test_a_repository_that_does_not_exist(hub: dict[str, str]) -> None:
    done = command(hub, "count-params", "hf://acme/nothing")
    assert done.returncode == 2
    assert "hf://acme/nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there(hub: dict[str, str]) -> None:
    done = command({**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}, "count-params", "hf://acme/tiny")
    assert done.returncode == 2
    assert "check the name and the network" in done.stderr


@pytest.mark.parametrize("reference", ["hf://acme", "hf://a/b/c", "hf://", "hf://acme/ti ny"])
def test_names_that_cannot_be(hub: dict[str, str], reference: str) -> None:
    done = command(hub, "count-params", reference)
    assert done.returncode == 2
    assert reference in done.stderr


RESCALE = ("rescale", "hf://acme/tiny", "--top-k", "3", "--scale", "1.5", "-q")


@pytest.mark.parametrize(
    ("wrong", "said", "hint"),
    [
        ("another range", "were asked for, the server answered with bytes", "a proxy between"),
        ("a longer range", "were asked for, the server answered with bytes", "a proxy between"),
        ("no range", "were asked for, the server answered with Content-Range ''", "a proxy between"),
        ("unreadable range", "the server answered with Content-Range 'items ", "a proxy between"),
        ("another size", "changed while it was in use: it had", "wait until nothing writes to it"),
        (
            "another file",
            'changed while it was in use: it was "abc", now it is "def"',
            "wait until nothing writes to it",
        ),
        ("all of another page", "the server answered with all of the file (status 200)", "download the model first"),
        ("all of the file", "the server answered with all of the file (status 200)", "download the model first"),
        ("an encoding", "the server answered in the encoding 'gzip'", "a proxy between"),
        ("too little", "were asked for, the server answered with", "a proxy between"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(
    hub: dict[str, str], tmp_path: Path, wrong: str, said: str, hint: str
) -> None:
    Hub.wrong = wrong
    done = command(hub, *RESCALE, "-o", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message, advice = done.stderr.split("hint:")
    assert f"hf://acme/tiny@{COMMIT}/model-0000" in message
    assert said in " ".join(message.split())
    assert hint in " ".join(advice.split())
    assert not (tmp_path / "out").exists()
    # The finished shards stay, and the command ends the work when the server answers as it should.
    Hub.wrong = ""
    assert command(hub, *RESCALE, "-o", tmp_path / "out").returncode == 0
    Hub.wrong = "another weak tag"  # the same state, said in another way
    again = command(hub, *RESCALE, "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    for name, value in read_tensors(tmp_path / "again").items():
        assert same_bits(value, read_tensors(tmp_path / "out")[name]), name


@pytest.mark.parametrize(
    ("status", "headers", "size", "said"),
    [
        (206, {"content-range": "bytes 8-15/100"}, 100, None),
        (206, {"content-range": "bytes 8-15/*"}, 100, None),
        (206, {"content-range": "bytes 8-15/90"}, 100, "it had 100 bytes, now 90"),
        (206, {"content-range": "bytes 8-16/100"}, 100, "answered with bytes 8 to 16"),
        (206, {"content-range": "bytes */100"}, 100, "answered with Content-Range 'bytes \\*/100'"),
        (206, {"content-type": "multipart/byteranges"}, 100, "answered with Content-Range ''"),
        (200, {}, 16, "all of the file"),
        (206, {"content-range": "bytes 8-15/100", "etag": '"other"'}, 100, 'it was "first", now it is "other"'),
        (206, {"content-range": "bytes 8-15/100", "last-modified": "Mon"}, 100, 'it was "first", now it is Mon'),
    ],
)
def test_what_an_answer_says_of_itself(status: int, headers: dict[str, str], size: int, said: str | None) -> None:
    asked = RangeRequest("x/model.safetensors", 8, 16, size, "model.safetensors", {"model.safetensors": '"first"'})
    if said is None:
        asked.check(status, headers)
    else:
        with pytest.raises(CheckpointError, match=said):
            asked.check(status, headers)


def test_a_server_without_ranges_may_send_a_small_file_whole() -> None:
    RangeRequest("x/config.json", 0, 16, 16, "config.json", {}).check(200, {"content-length": "16"})


@pytest.mark.parametrize("wrong", ["another range", "another file", "all of another page", "too little", "no range"])
def test_answers_over_plain_http_are_checked_too(hub: dict[str, str], demo: Path, wrong: str) -> None:
    pytest.importorskip("aiohttp")
    source = RemoteSource(f"{hub['HF_ENDPOINT']}/acme/tiny/resolve/main", "http")
    file = "model-00001-of-00003.safetensors"
    data = (demo / file).read_bytes()
    source.sizes[file] = len(data)
    for start in range(0, 800, 100):
        assert source.read(file, start, 100) == data[start : start + 100]
    Hub.wrong = wrong
    with pytest.raises(CheckpointError, match=r"were asked for|changed while it was in use") as caught:
        source.read(file, 5000, 100)
    assert "model-00001-of-00003.safetensors" in caught.value.message
    assert caught.value.hint


def test_many_threads_may_read_first(hub: dict[str, str], demo: Path) -> None:
    """As in a worker, which gets a source that another process opened."""
    url = f"hf://acme/tiny@{COMMIT}"
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from moesurgery.checkpoint.remote_source import HubSource
source = HubSource(url={url!r}, label={url!r})
with ThreadPoolExecutor(8) as pool:
    parts = pool.map(lambda i: source.read("model-00001-of-00003.safetensors", 100 * i, 100), range(40))
    sys.stdout.buffer.write(b"".join(parts))
"""
    done = subprocess.run([sys.executable, "-c", code], env=hub, cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout == (demo / "model-00001-of-00003.safetensors").read_bytes()[:4000], done.stderr.decode()


def test_a_folder_of_a_web_server(hub: dict[str, str], demo: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Its list of links names the files; sizes are asked for one by one, and bytes by ranges."""
    pytest.importorskip("aiohttp")
    url = f"{hub['HF_ENDPOINT']}/acme/tiny/resolve/main"
    for source, output in ((url, tmp_path / "web"), (str(demo), tmp_path / "local")):
        done = cli("drop-experts", source, "--keep", "0,2,3,5", "-o", output, "-q")
        assert done.code == 0, done.err
    expected, found = read_tensors(tmp_path / "local"), read_tensors(tmp_path / "web")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[n], expected[n]) for n in expected)


FAULTS = {
    "commit": "the server names no commit, but '../../evil'",
    "junk": "the server's answer is not understood",
    "packed facts": "the server answered in the encoding 'gzip', which was not asked for",
    "long facts": "the server answers with more than the 67,108,864 bytes that were asked for",
    "endless": "the server answers with more than the 131,072 bytes that were asked for",
    "packed": "the server answered in the encoding 'gzip', which was not asked for",
    "slow": "the server is too slow: ",
    "loop": "the server leads to the same page more than 10 times",
    "many pages": "the server leads to more than 200 requests, from one to the next",
    "size": "config.json: the server says that it has -5 bytes",
    "many files": "holds more than 20,000 files",
    **{
        wait: f"the server asks to wait {wait.partition(': ')[2].rpartition('=')[2][:20]} s (status 429)"
        for wait in WAITS
    },
}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[:30] for fault in FAULTS])
def test_a_server_costs_what_was_asked_for(fault: str, hub: dict[str, str]) -> None:
    Hub.fault = fault
    begun = time.monotonic()
    # A process of its own, which may take less memory than an answer would.
    quick = "import moesurgery.checkpoint.hub_client as w; w.GRACE = 1.0; " if fault == "slow" else ""
    code = f"{quick}import sys; from moesurgery.cli import main; code = main(['inspect', 'hf://acme/tiny']); "
    code += "print(next(v.split()[1] for v in open('/proc/self/status') if v.startswith('VmHWM'))); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], env=hub, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(errors) == 2, done.stderr
    assert FAULTS[fault] in errors[0]
    assert errors[0].startswith("error: hf://acme/tiny")
    assert int(done.stdout.split()[-1]) < 500_000
    assert time.monotonic() - begun < 60


def test_a_short_wait_is_waited_for(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    send = Hub.send

    def busy_once(self: Hub, data: bytes, head: bool, *given: Any, **more: Any) -> None:
        nonlocal asked
        asked += self.path.endswith(".safetensors")
        if self.path.endswith(".safetensors") and asked == 1:
            send(self, b"", head, status=503, retry_after="1")
        else:
            send(self, data, head, *given, **more)

    monkeypatch.setattr(Hub, "send", busy_once)
    done = command(hub, "count-params", "hf://acme/tiny", "--json")
    assert done.returncode == 0, done.stderr


def test_bounds_are_for_our_requests_alone(hub: dict[str, str], tmp_path: Path) -> None:
    """A program that uses moesurgery as a library downloads what it wants to."""
    code = (
        "from moesurgery import open_checkpoint; open_checkpoint('hf://acme/tiny');"
        " from huggingface_hub import get_session; import os;"
        " r = get_session().get(os.environ['HF_ENDPOINT'] + '/acme/tiny/resolve/main/model-00001-of-00003.safetensors',"
        " headers={'Range': 'bytes=0-9'}); print(len(r.content), r.request.headers['accept-encoding'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=hub, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("10 "), done.stderr
    assert "gzip" in done.stdout


@pytest.mark.parametrize("spelling", ["spaces", "order", "padding"])
@pytest.mark.parametrize("source", ["hf://acme/tiny", "file://{}"])
def test_an_unchanged_shard_is_copied_byte_for_byte(
    source: str, spelling: str, hub: dict[str, str], demo: Path, tmp_path: Path
) -> None:
    """However its header is written: ours has no spaces, sorts its metadata, and is padded to a page."""
    model = tmp_path / "model"
    shutil.copytree(demo, model)
    Hub.folder = model
    for file in model.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if spelling == "order":
            header = dict(reversed(header.items()))
        text = json.dumps(header, indent=1 if spelling == "spaces" else None).encode() + b" " * 77
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for option in ([], ["--no-fsync", "--jobs", "1"], ["--checksums"]):
        out = tmp_path / f"out{len(option)}"
        done = command(
            hub, "rescale", source.format(model), "--top-k", "3", "--scale", "none", "-q", "-o", out, *option
        )
        assert done.returncode == 0, done.stderr
        for file in model.glob("*.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes()
        assert command(hub, "validate", out, "--level", "container").returncode == 0
