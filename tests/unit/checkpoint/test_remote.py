"""`hf://` checkpoints against a real HTTP server with ranges on loopback, and other fsspec URLs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.conftest import ROOT, Result
from tests.tiny import read_tensors, same_bits

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub that reading needs: model info, file tree, and files by range."""

    folder: ClassVar[Path]
    served: ClassVar[list[tuple[str, int]]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = self.path.split("?")[0].replace("%40", "@")
        api = "/api/models/acme/tiny"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": f.name} for f in sorted(self.folder.iterdir())]
            self.send(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode(), head)
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                for f in sorted(self.folder.iterdir())
            ]
            self.send(json.dumps(tree).encode(), head)
        elif path.startswith(f"{api}/paths-info/"):
            self.send(b"[]", head)
        elif path.startswith("/acme/tiny/resolve/"):
            file = self.folder / path.split("/", 5)[5]
            if file.is_file():
                self.send(file.read_bytes(), head, ranged=True)
            else:
                self.missing()
        else:
            self.missing()

    def send(self, data: bytes, head: bool, ranged: bool = False) -> None:
        status, wanted = 200, self.headers.get("Range")
        size = len(data)
        first = 0
        if ranged and wanted:
            first_text, _, last_text = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first_text), min(int(last_text or size - 1), size - 1)
            data, status = data[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not head:
            self.wfile.write(data)
            if ranged:
                self.served.append((self.path, len(data)))

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
    Hub.folder, Hub.served = demo, []
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
