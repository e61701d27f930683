"""Outputs in an object store: moto's S3 server on loopback, through s3fs as a user has it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesurgery.errors import OutputError
from moesurgery.write.object_store import ObjectStore, is_url, open_store
from tests.conftest import ROOT, Result
from tests.killing import contents

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install moesurgery[s3]")
moto_server = pytest.importorskip("moto.server", reason="moto is not installed: pip install moesurgery[dev]")
boto3 = pytest.importorskip("boto3")

Cli = Callable[..., Result]
EDIT = ("rescale", "--top-k", "3", "--scale", "1.5", "--max-shard-size", "2MB")
URL = "s3://models/edits/tiny"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty bucket `models`; the test runs in an empty folder."""
    import fsspec

    for key, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    fsspec.filesystem("s3").clear_instance_cache()
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="models")
    yield client
    for name in listed(client):
        client.delete_object(Bucket="models", Key=name)
    client.delete_bucket(Bucket="models")


def listed(client: Any) -> dict[str, Any]:
    return {each["Key"]: each for each in client.list_objects_v2(Bucket="models").get("Contents", [])}


def stored(client: Any) -> dict[str, bytes]:
    """Return what lies below URL, with its bytes."""
    prefix = "edits/tiny/"
    names = [name for name in listed(client) if name.startswith(prefix)]
    return {n.removeprefix(prefix): client.get_object(Bucket="models", Key=n)["Body"].read() for n in names}


@pytest.fixture
def expected(cli: Cli, demo: Path, tmp_path: Path) -> dict[str, bytes]:
    assert cli(EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "expected").code == 0
    return contents(tmp_path / "expected")


def test_a_store_gets_the_bytes_of_a_folder(
    bucket: Any, cli: Cli, demo: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, present = [], []
    upload = ObjectStore.upload

    def watched(self: ObjectStore, path: Path, name: str, sha256: str) -> None:
        scratch = [f for f in Path("tiny.partial").rglob("*") if f.suffix in (".safetensors", ".tmp")]
        sizes.append(sum(f.stat().st_size for f in scratch))
        present.append(set(listed(bucket)))
        upload(self, path, name, sha256)

    monkeypatch.setattr(ObjectStore, "upload", watched)
    done = cli(EDIT[0], demo, *EDIT[1:], "-o", URL, "--validate")
    assert done.code == 0, done.err
    assert URL in done.out
    assert stored(bucket) == expected
    assert os.listdir(".") == []
    shards = [len(data) for name, data in expected.items() if name.endswith(".safetensors")]
    assert len(shards) > 4
    assert max(sizes) <= sum(sorted(shards)[-2:]) + 4096  # the one that is uploaded, the next, and a note
    for names in present:
        assert not any(name.endswith(("config.json", "index.json")) for name in names)


def test_files_of_many_parts_are_compared_with_their_etag(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 MB come in parts of 50 MiB; the ETag is computed from them, and nothing is read back."""
    file = tmp_path / "large.safetensors"
    file.write_bytes(os.urandom(1 << 20) * 120)
    monkeypatch.setattr("moesurgery.write.object_store.sampled_digest", None)
    open_store(URL).upload(file, "large.safetensors", "")
    head = bucket.head_object(Bucket="models", Key="edits/tiny/large.safetensors")
    assert head["ETag"].strip('"').endswith("-3")


@pytest.mark.parametrize("damage", ["short", "other bytes"])
def test_what_arrives_otherwise_is_no_output(
    bucket: Any, cli: Cli, demo: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    import s3fs

    put = s3fs.S3FileSystem.put_file

    def damaged(self: Any, local: str, remote: str, **more: Any) -> None:
        if "00002-of" in remote:
            data = Path(local).read_bytes()
            data = data[:-1] if damage == "short" else data[:-8] + bytes(8)
            self.pipe_file(remote, data)
        else:
            put(self, local, remote, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", damaged)
    done = cli(EDIT[0], demo, *EDIT[1:], "-o", URL)
    assert done.code == 2
    assert "00002-of" in done.err
    assert "run the same command again" in done.err
    assert "config.json" not in stored(bucket)
    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", put)
    assert cli(EDIT[0], demo, *EDIT[1:], "-o", URL).code == 0
    assert stored(bucket) == expected


@pytest.mark.parametrize("trial", range(int(os.environ.get("KILLS", "1"))))
def test_killed_at_any_moment_it_resumes(
    bucket: Any, cli: Cli, demo: Path, expected: dict[str, bytes], trial: int
) -> None:
    """Until all files are there no command takes it for a checkpoint. `KILLS=10` kills at ten moments."""
    draw = random.Random(trial)
    shards = sum(name.endswith(".safetensors") for name in expected)
    there, moment = (2, 0.0) if trial == 0 else (draw.randrange(shards + 1), 0.05 * draw.random())
    command = [sys.executable, "-m", "moesurgery", EDIT[0], str(demo), *EDIT[1:], "-o", URL]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and sum(name.endswith(".safetensors") for name in listed(bucket)) < there:
        time.sleep(0.002)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = stored(bucket)
    if {"config.json", "model.safetensors.index.json"} <= before.keys():
        assert all(before[name] == data for name, data in expected.items())
    else:
        assert cli("count-params", URL).code == 2
    sent = []
    put = ObjectStore._send

    def counted(self: ObjectStore, path: Path, name: str) -> None:
        sent.append(name)
        put(self, path, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "_send", counted)
        done = cli(EDIT[0], demo, *EDIT[1:], "-o", URL)
    assert done.code == 0, done.err
    assert stored(bucket) == expected
    assert os.listdir(".") == []
    again = [name for name in sent if name.endswith(".safetensors")]
    assert len(again) <= shards - there + 1  # one may have arrived before it was noted


def test_a_store_that_holds_something(bucket: Any, cli: Cli, demo: Path, expected: dict[str, bytes]) -> None:
    def put(name: str) -> None:
        bucket.put_object(Bucket="models", Key=f"edits/tiny/{name}", Body=b"{}")

    for name in ("config.json", "model-00009-of-00009.safetensors"):
        put(name)
    refused = cli(EDIT[0], demo, *EDIT[1:], "-o", URL)
    assert refused.code == 2
    assert "--force" in refused.err
    assert os.listdir(".") == []
    put("thesis.docx")
    refused = cli(EDIT[0], demo, *EDIT[1:], "-o", URL, "--force")
    assert refused.code == 2
    assert "thesis.docx" in refused.err
    assert "config.json" in stored(bucket)
    bucket.delete_object(Bucket="models", Key="edits/tiny/thesis.docx")
    done = cli(EDIT[0], demo, *EDIT[1:], "-o", URL, "--force")
    assert done.code == 0, done.err
    assert stored(bucket) == expected  # what the old one had besides is gone


def test_another_recipe_does_not_resume(bucket: Any, cli: Cli, demo: Path) -> None:
    bucket.put_object(Bucket="models", Key="edits/tiny/.moesurgery/upload-of-another", Body=b"")
    refused = cli(EDIT[0], demo, *EDIT[1:], "-o", URL)
    assert refused.code == 2
    assert "another recipe" in refused.err


def test_a_single_file_and_a_remote_input(bucket: Any, cli: Cli, models: Callable[..., Path], tmp_path: Path) -> None:
    model = models("mixtral")
    for file in model.iterdir():
        bucket.upload_file(str(file), "models", f"base/{file.name}")
    assert cli("rescale", model, "--top-k", "3", "-o", tmp_path / "expected").code == 0
    done = cli("rescale", "s3://models/base", "--top-k", "3", "-o", URL, "--scratch", tmp_path)
    assert done.code == 0, done.err
    whole = contents(tmp_path / "expected")
    found = stored(bucket)
    assert found.keys() == whole.keys()
    assert all(found[name] == whole[name] for name in whole if name not in ("moesurgery.json", "README.md"))
    inside = cli("rescale", "s3://models/base", "--top-k", "3", "-o", "s3://models/base/edited")
    assert inside.code == 2
    assert "inside the input" in inside.err


def test_refusals_before_anything_is_planned(bucket: Any, cli: Cli, demo: Path) -> None:
    def refusal(output: str, *more: str) -> str:
        done = cli(EDIT[0], demo, *EDIT[1:], "-o", output, *more)
        assert done.code == 2
        assert os.listdir(".") == []
        return done.err

    assert "no-such-bucket" in refusal("s3://no-such-bucket/tiny")
    assert "file:///tmp/x" in refusal("file:///tmp/x")
    assert "not written" in refusal("https://example.com/x")
    assert "cannot be opened" in refusal("nosuch://bucket/x")
    assert "hf://org/name" in refusal("hf://gpt2")
    assert "is a store" in refusal(URL, "--part", "1/2")
    assert "mkdir -p" in refusal(URL, "--scratch", "missing")
    assert "goes with a store" in refusal("folder", "--scratch", ".")


def test_a_dry_run_writes_nothing(bucket: Any, cli: Cli, demo: Path) -> None:
    answer = cli(EDIT[0], demo, *EDIT[1:], "-o", URL, "--dry-run", "--json").json
    assert answer["output"] == URL
    assert answer["bytes_of_new_disk_space"] < answer["bytes_written"] / 2
    assert (listed(bucket), os.listdir(".")) == ({}, [])


def test_the_network_goes_away(bucket: Any, cli: Cli, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("the connection was reset")

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", gone)
    done = cli(EDIT[0], demo, *EDIT[1:], "-o", URL)
    assert done.code == 2
    assert "model-00001-of" in done.err
    assert "the connection was reset" in done.err
    assert "kept" in done.err
    shutil.rmtree("tiny.partial")


def test_what_is_the_address_of_a_store() -> None:
    assert is_url("s3://bucket/name")
    assert not is_url("./a:b")
    with pytest.raises(OutputError, match="names no folder"):
        open_store("s3://")
