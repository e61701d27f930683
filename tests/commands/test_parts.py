"""`--part I/N` and `finish`: several processes write one output, in any order, killed and started twice."""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgery.checkpoint.source import LocalSource
from moesurgery.cli import main
from moesurgery.write import expected_output, parts, shard_manifest
from moesurgery.write.open_folder import OpenFolder
from tests.conftest import Result
from tests.killing import contents

Cli = Callable[..., Result]
NOBODY = 65534
EDIT = ["rescale", "--top-k", "3", "--scale", "1.5", "--max-shard-size", "1MB"]


@pytest.fixture
def expected(cli: Cli, demo: Path, tmp_path: Path) -> dict[str, bytes]:
    assert cli(EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "expected").code == 0
    return contents(tmp_path / "expected")


def start(demo: Path, output: Path, *more: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moesurgery", EDIT[0], str(demo), *EDIT[1:], "-o", str(output), "-j", "1", *more]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command,
        cwd=cwd or output.parent,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate()
    return process.returncode, out + err


@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_parts_in_any_order(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes], count: int
) -> None:
    output = tmp_path / "out"
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(output)]
    for number in range(count, 0, -1):
        assert not output.exists()
        assert cli(*arguments, "--part", f"{number}/{count}").code == 0
    done = cli("finish", output)
    assert done.code == 0, done.err
    assert contents(output) == expected
    assert not (tmp_path / "out.partial").exists()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE((tmp_path / "expected").stat().st_mode)


def test_parts_divide_shards_evenly_and_completely(cli: Cli, demo: Path, tmp_path: Path) -> None:
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(tmp_path / "out"), "--json"]
    answers = [cli(*arguments, "--part", f"{i}/4").json for i in range(1, 5)]
    assert [answer["missing"] for answer in answers[:3]] == sorted((a["missing"] for a in answers[:3]), reverse=True)
    assert answers[-1]["missing"] == 0
    sizes = [answer["nbytes"] for answer in answers]
    assert max(sizes) - min(sizes) <= 1_100_000  # about one shard
    assert sum(a["shards"] for a in answers) == len(list((tmp_path / "out.partial").glob("*.safetensors")))


def test_parts_at_once_from_other_folders_the_last_publishes(
    demo: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folders = [tmp_path / f"cwd{i}" for i in range(5)]
    for folder in folders:
        folder.mkdir()
    # Two are started twice.
    numbers = [1, 1, 2, 2, 3]
    jobs = [
        start(demo, tmp_path / "out", "--part", f"{number}/3", "--finish", cwd=folder)
        for number, folder in zip(numbers, folders, strict=True)
    ]
    ends = [outcome(job) for job in jobs]
    # Who starts when all others have ended finds the output.
    assert all(
        code == 0 or (code == 2 and "exists and is not empty" in " ".join(text.split())) for code, text in ends
    ), ends
    assert sum("is published" in text for _, text in ends) == 1, ends
    assert contents(tmp_path / "out") == expected


def test_a_part_that_begins_when_its_twin_has_published(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(tmp_path / "out"), "--part", "1/1", "--finish"]
    claim = parts.claim

    def late(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(parts, "claim", claim)
        assert main(arguments) == 0
        return claim(*given, **more)

    monkeypatch.setattr(parts, "claim", late)
    result = cli(*arguments)
    assert result.code == 2
    assert "exists and is not empty" in " ".join(result.err.split())
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_part_whose_twin_replaces_a_shard_before_its_manifest_is_written(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, raced = shard_manifest._manifest, []

    def twin(folder: OpenFolder, name: str, *more: Any) -> dict[str, Any]:
        found = manifest(folder, name, *more)
        if name not in raced:
            raced.append(name)
            shutil.copyfile(folder.path / name, tmp_path / f"twin-{name}")
            os.replace(tmp_path / f"twin-{name}", folder.path / name)
        return found

    monkeypatch.setattr(shard_manifest, "_manifest", twin)
    assert cli(EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "out", "--part", "1/1", "--finish").code == 0
    assert contents(tmp_path / "out") == expected
    assert len(raced) > 4


@pytest.mark.parametrize("reader", [shard_manifest, expected_output], ids=["manifest", "check"])
def test_a_part_whose_twin_replaces_a_shard_that_is_being_read(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, reader: Any
) -> None:
    digest, raced = reader.sampled_digest, []

    def twin(source: LocalSource, name: str, size: int) -> str:
        if name not in raced:
            raced.append(name)
            source.read(name, 0, 8)
            shutil.copyfile(source.root / name, tmp_path / f"twin-{name}")
            os.replace(tmp_path / f"twin-{name}", source.root / name)
        found: str = digest(source, name, size)
        return found

    monkeypatch.setattr(reader, "sampled_digest", twin)
    assert cli(EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "out", "--part", "1/1", "--finish").code == 0
    assert contents(tmp_path / "out") == expected
    assert len(raced) > 4


@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_killed_part_is_started_again(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes], count: int
) -> None:
    output = tmp_path / "out"
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(output)]
    killed = f"{min(2, count)}/{count}"
    job = start(demo, output, "--part", killed)
    while not list((tmp_path / "out.partial").glob("*.safetensors")) and job.poll() is None:
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    for number in range(1, count + 1):
        if f"{number}/{count}" != killed:
            assert cli(*arguments, "--part", f"{number}/{count}").code == 0
    early = cli("finish", output)
    if early.code != 0:  # else it was killed when its last shard was written
        assert job.returncode != 0
        assert early.code == 2
        assert "are missing" in early.err or "is missing" in early.err or "there is no unfinished job" in early.err
        assert cli(*arguments, "--part", killed, "--finish").code == 0
    assert contents(output) == expected


def test_a_part_of_another_plan_is_refused(cli: Cli, demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert cli(*[EDIT[0], demo, *EDIT[1:], "-o", output, "--part", "1/2"]).code == 0
    before = contents(tmp_path / "out.partial")
    for force in ([], ["--force"]):
        other = cli("rescale", demo, "--top-k", "3", "--scale", "1.6", "-o", output, "--part", "2/2", *force)
        assert other.code == 2
        assert "another recipe or of changed inputs" in other.err
    assert contents(tmp_path / "out.partial") == before


def test_one_process_can_end_what_parts_began(cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    output = tmp_path / "out"
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(output)]
    assert cli(*arguments, "--part", "2/3").code == 0
    whole = cli(*arguments, "--json")
    assert whole.json["shards_resumed"] > 0
    assert contents(output) == expected


def test_parts_replace_an_old_output_only_with_force(
    cli: Cli, demo: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(demo, output)
    arguments = [EDIT[0], str(demo), *EDIT[1:], "-o", str(output), "--part", "1/1"]
    assert "--force" in cli(*arguments).err
    assert cli(*arguments, "--force").code == 0
    assert cli("finish", output).code == 2
    assert cli("finish", output, "--force", "--checksums").code == 0
    made = contents(output)
    assert {name for name, content in made.items() if content != expected[name]} == {"moesurgery.json"}
    assert all("sha256" in shard for shard in json.loads(made["moesurgery.json"])["outputs"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--part", "0/3"], "is not I/N"),
        (["--part", "4/3"], "is not I/N"),
        (["--part", "x"], "is not I/N"),
        (["--finish"], "goes with --part"),
        (["--part", "1/2", "--no-fsync"], "--no-fsync is not for one part"),
        (["--part", "1/2", "--share-with", "no-such-group"], "there is no group"),
    ],
)
def test_wrong_options(cli: Cli, demo: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    result = cli(*[EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "out", *flags])
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "out.partial").exists()


def test_parts_do_not_run_a_model(cli: Cli, demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 1000)
    result = cli("drop-experts", demo, "--count", "1", "--text", text, "-o", tmp_path / "out", "--part", "1/2")
    assert result.code == 2
    assert "moesurgery collect" in result.err


def test_nothing_to_finish(cli: Cli, tmp_path: Path) -> None:
    result = cli("finish", tmp_path / "out")
    assert result.code == 2
    assert "there is no unfinished job" in result.err


def test_a_copied_job_is_not_finished(cli: Cli, demo: Path, tmp_path: Path) -> None:
    assert cli(*[EDIT[0], demo, *EDIT[1:], "-o", tmp_path / "out", "--part", "1/1"]).code == 0
    shutil.copytree(tmp_path / "out.partial", tmp_path / "copy.partial")
    result = cli("finish", tmp_path / "copy")
    assert result.code == 2
    assert "is of another folder" in result.err
    assert not (tmp_path / "copy").exists()


def as_nobody(arguments: list[str]) -> int:
    """Run a command as another user, and return its exit code. All that it imports must have been imported."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            code = main(arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of two users")
def test_two_users_of_a_group(cli: Cli, demo: Path, expected: dict[str, bytes]) -> None:
    name = grp.getgrgid(NOBODY).gr_name
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to others
        os.chmod(shared, 0o777)
        model, output = Path(shared) / "model", Path(shared) / "out"
        shutil.copytree(demo, model)
        arguments = [EDIT[0], str(model), *EDIT[1:], "-o", str(output), "-j", "1", "--part"]
        assert cli(*arguments, "1/2", "--share-with", name).code == 0
        assert as_nobody([*arguments, "2/2"]) == 2  # the folder is another user's
        assert as_nobody([*arguments, "2/2", "--share-with", name, "--finish"]) == 0
        made = contents(output)
        shards = [file for file in expected if file.endswith(".safetensors")]
        assert {output.joinpath(shard).stat().st_uid for shard in shards} == {0, NOBODY}
        assert {shard: made[shard] for shard in shards} == {shard: expected[shard] for shard in shards}
