"""`push`, and outputs on the Hub, against a server on loopback that takes commits and large files as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moesurgery.write.card import front_matter
from moesurgery.write.hub_upload import prepare_upload
from tests.conftest import Result
from tests.killing import contents
from tests.unit.checkpoint.test_remote import Hub, command, lfs

EDIT = ("rescale", "hf://acme/tiny", "--top-k", "3", "--max-shard-size", "4MB", "-q", "--checksums")


class WritableHub(Hub):
    """Beside acme/tiny, which is read: repositories that are made, committed to by LFS, and listed."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    commits: ClassVar[list[dict[str, list[str]]]] = []
    created: ClassVar[list[dict[str, Any]]] = []
    blobs: ClassVar[dict[str, bytes]] = {}
    puts: ClassVar[list[str]] = []
    fail_after: ClassVar[int | None] = None  # uploads of large files that still work

    @property
    def written(self) -> str | None:
        """The repository that a request is about, unless it is the one that is read."""
        parts = (
            self.path.split("?")[0].strip("/").removeprefix("api/models/").removesuffix(".git/info/lfs/objects/batch")
        )
        name = "/".join(parts.split("/")[:2])
        return None if name == "acme/tiny" or not name.startswith("acme/") else name

    def answer(self, head: bool) -> None:
        name = self.written
        if name is None:
            super().answer(head)
        elif name not in self.repositories:
            self.missing()
        elif "/tree/" in self.path:
            branch = self.branch(name)
            if branch in self.repositories:
                self.send(json.dumps([self.entry(n, d) for n, d in self.repositories[branch].items()]).encode(), head)
            else:
                self.json({}, status=404, error="RevisionNotFound")
        else:
            self.send(json.dumps({"id": name, "sha": "1" * 40, "siblings": []}).encode(), head)

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
        if name.endswith(".safetensors"):
            entry["lfs"] = lfs(data)
        return entry

    def branch(self, name: str) -> str:
        """Return the key of the branch whose name ends a request's path."""
        revision = self.path.split("?")[0].rsplit("/", 1)[-1]
        return name if revision == "main" else f"{name}@{revision}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:  # noqa: N802 - the name that http.server calls
        data = self.body()
        if self.fail_after is not None and len(self.puts) >= self.fail_after:
            self.send(b"", False, status=403)
            return
        self.puts.append(self.path)
        self.blobs[hashlib.sha256(data).hexdigest()] = data
        self.send(b"", False)

    def do_POST(self) -> None:  # noqa: N802
        path, name = self.path.split("?")[0], self.written
        if path == "/api/repos/create":
            asked = json.loads(self.body())
            self.created.append(asked)
            made = f"{asked['organization']}/{asked['name']}"
            exists = made in self.repositories
            self.repositories.setdefault(made, {".gitattributes": b""})
            self.json({"url": f"http://{self.headers['Host']}/{made}"}, status=409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.body()
            self.json({"errors": [], "warnings": []})
        elif name is None:
            self.missing()
        elif "/preupload/" in path:
            files = json.loads(self.body())["files"]
            mode = {True: "lfs", False: "regular"}
            self.json(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for f in files
                    ]
                }
            )
        elif path.endswith("/objects/batch"):
            objects = []
            for each in json.loads(self.body())["objects"]:
                known = each["oid"] in self.blobs
                href = f"http://{self.headers['Host']}/lfs/{each['oid']}"
                objects.append(each | ({} if known else {"actions": {"upload": {"href": href, "header": {}}}}))
            self.json({"transfer": "basic", "objects": objects})
        elif "/paths-info/" in path:
            wanted = self.wanted_paths()
            there = self.repositories[name]
            self.json([self.entry(n, there[n]) for n in wanted if n in there])
        elif "/branch/" in path:
            self.body()
            self.repositories[self.branch(name)] = dict(self.repositories[name])
            self.json({})
        elif "/commit/" in path:
            self.commit(self.branch(name))
        else:
            self.missing()

    def wanted_paths(self) -> list[str]:
        from urllib.parse import parse_qs

        text = self.body().decode()
        return json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]

    def commit(self, name: str) -> None:
        files, done = dict(self.repositories[name]), {"added": [], "deleted": []}
        for line in self.body().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                done["added"].append(value["path"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                done["added"].append(value["path"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
                done["deleted"].append(value["path"])
        self.repositories[name] = files
        self.commits.append(done)
        oid = f"{len(self.commits):040x}"
        address = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        self.json({"success": True, "commitOid": oid, "commitUrl": address, "hookOutput": ""})

    def json(self, content: object, status: int = 200, error: str = "") -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        lfs = "objects/batch" in self.path
        self.send_header("Content-Type", "application/vnd.git-lfs+json" if lfs else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(demo: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The server; yields the environment of its clients."""
    Hub.folder, Hub.served, Hub.wrong, Hub.asked, Hub.fault = demo, [], "", 0, ""
    for kept in (
        WritableHub.repositories,
        WritableHub.commits,
        WritableHub.created,
        WritableHub.blobs,
        WritableHub.puts,
    ):
        kept.clear()
    WritableHub.fail_after = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), WritableHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    yield environment | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_testing",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.shutdown()
    server.server_close()
    thread.join()


def there(name: str = "acme/out") -> dict[str, bytes]:
    files = dict(WritableHub.repositories[name])
    files.pop(".gitattributes", None)
    return files


def test_from_the_hub_to_the_hub_and_an_interruption(hub: dict[str, str], tmp_path: Path) -> None:
    """A shard, a commit; the index with the last one. Uploads that fail are resumed, and what was there stays."""
    done = command(hub, *EDIT, "-o", tmp_path / "expected")
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path / "expected")
    WritableHub.fail_after = 2
    output = (*EDIT, "-o", "hf://acme/out", "--scratch", tmp_path)
    failed = command(hub, *output)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "hf://acme/out/model" in failed.stderr or "hf://acme/out cannot" in failed.stderr
    assert "run the same command again" in failed.stderr
    assert sum(name.endswith(".safetensors") for name in there()) == 2
    assert not {"config.json", "model.safetensors.index.json"} & there().keys()
    assert WritableHub.created[0]["visibility"] == "private"
    WritableHub.fail_after = None
    again = command(hub, *output)
    assert again.returncode == 0, again.stderr
    assert there() == expected
    added = [name for commit in WritableHub.commits for name in commit["added"] if name.endswith(".safetensors")]
    assert len(added) == len(set(added)) == sum(name.endswith(".safetensors") for name in expected)
    assert {"config.json", "model.safetensors.index.json"} <= set(WritableHub.commits[-1]["added"])
    assert not (tmp_path / "out.partial").exists()
    refused = command(hub, *output)
    assert refused.returncode == 2
    assert "--force" in refused.stderr


def test_push_sends_a_checkpoint_in_one_commit(hub: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(hub, *EDIT, "-o", out).returncode == 0
    (out / "notes.docx").write_text("mine")
    dry = command(hub, "push", out, "acme/out", "--dry-run", "--json", "--no-validate")
    assert dry.returncode == 0, dry.stderr
    told = json.loads(dry.stdout)
    assert WritableHub.repositories == {}
    WritableHub.fail_after = 1
    failed = command(hub, "push", out, "acme/out", "--private", "-q", "--no-validate")
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert there() == {}
    WritableHub.fail_after = None
    sent = len(WritableHub.puts)
    done = command(hub, "push", out, "acme/out", "--private", "--no-validate")
    assert done.returncode == 0, done.stderr
    assert "/acme/out/commit/" in done.stdout
    assert "0 of the files, 0 B, are those of the base" in done.stdout
    assert WritableHub.created[0]["visibility"] == "private"
    found, local = there(), contents(out)
    assert found.keys() == local.keys() - {"notes.docx"}
    assert {name: len(data) for name, data in found.items()} == told["files"]
    assert all(found[name] == local[name] for name in found if name != "README.md")
    assert len(WritableHub.commits) == 1
    shards = sum(name.endswith(".safetensors") for name in found)
    assert len(WritableHub.puts) - sent == shards - sent  # what had arrived is not sent again
    refused = command(hub, "push", out, "acme/out", "--no-validate")
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    WritableHub.repositories["acme/out"]["model-00009-of-00009.safetensors"] = b""
    assert command(hub, "push", out, "acme/out", "--force", "-q", "--no-validate").returncode == 0
    assert there() == found


def test_what_is_stored_once_is_said(hub: dict[str, str], demo: Path, tmp_path: Path) -> None:
    """Shards that an edit of the config leaves as they are have the base's digests."""
    out = tmp_path / "out"
    assert command(hub, *EDIT[:4], "--scale", "none", "-q", "-o", out).returncode == 0
    done = command(hub, "push", out, "acme/out", "--json", "--no-validate")
    assert done.returncode == 0, done.stderr
    shards = [file.stat().st_size for file in demo.glob("*.safetensors")]
    assert json.loads(done.stdout)["same_as_base"] == {"files": len(shards), "bytes": sum(shards)}


def test_a_new_branch_has_nothing_of_the_model_on_the_main_one(hub: dict[str, str], demo: Path) -> None:
    old = dict.fromkeys((".gitattributes", "config.json", "model-00009-of-00009.safetensors"), b"{}")
    WritableHub.repositories["acme/out"] = dict(old)
    done = command(hub, "push", demo, "acme/out", "--revision", "v2", "--no-validate", "-q")
    assert done.returncode == 0, done.stderr
    assert WritableHub.repositories["acme/out"] == old
    assert there("acme/out@v2").keys() == {f.name for f in demo.iterdir()} | {"README.md"}


def test_push_refuses_what_is_no_checkpoint(cli: Any, demo: Path, tmp_path: Path) -> None:
    def refusal(*arguments: object) -> str:
        done: Result = cli("push", *arguments)
        assert done.code == 2
        return done.err

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refusal(empty, "acme/out")
    assert "org/name" in refusal(demo, "out")
    assert "two revisions" in refusal(demo, "acme/out@main", "--revision", "v2")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    assert "still being written" in refusal(partial, "acme/out")
    wrong = tmp_path / "wrong"
    assert cli("rescale", demo, "--top-k", "3", "-o", wrong).code == 0
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    assert "--no-validate" in refusal(wrong, "acme/out", "--dry-run")
    assert cli("push", wrong, "acme/out", "--dry-run", "--no-validate").code == 0


CARD = """---
license: other
license_name: acme
base_model: acme/older
model-index:
- name: tiny
---
# Tiny
Its own words.
"""


def test_the_card_keeps_the_licence_and_names_the_parent(cli: Any, demo: Path, tmp_path: Path) -> None:
    """Where README.md is the parent's it stays, but for what would be false of the edit."""
    out = tmp_path / "out"
    assert cli("rescale", demo, "--top-k", "3", "-o", out).code == 0
    (out / "README.md").write_text(CARD)
    record = json.loads((out / "moesurgery.json").read_text())
    record["inputs"][0]["identity"] = "hf://acme/tiny@" + "0" * 40
    (out / "moesurgery.json").write_text(json.dumps(record))
    upload = prepare_upload(out)
    front, body = front_matter(upload.card.decode())
    assert (front["license"], front["license_name"]) == ("other", "acme")
    assert front["base_model"] == ["acme/tiny"]
    assert "model-index" not in front
    assert "Its own words." in body
    assert "rescale" in body
    assert (out / "README.md").read_text() == CARD


def test_a_new_card_has_the_licence_of_the_source(cli: Any, demo: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(demo, model)
    (model / "README.md").write_text(CARD)
    assert cli("rescale", model, "--top-k", "3", "-o", tmp_path / "out", "--card").code == 0
    front, _ = front_matter((tmp_path / "out" / "README.md").read_text())
    assert (front["license"], front["license_name"]) == ("other", "acme")
