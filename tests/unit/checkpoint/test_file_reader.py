"""Files that are read do not stay open: a process may have about 1,000, and releases have hundreds of shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from moesurgery.checkpoint.file_reader import MOST_OPEN, FileReader
from moesurgery.checkpoint.source import LocalSource
from tests.conftest import DEMO, Result


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # one was of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(f"{folder}/")]


def test_a_reader_of_many_files_has_few_of_them_open(tmp_path: Path) -> None:
    count = 3 * MOST_OPEN
    for i in range(count):
        (tmp_path / f"{i}.bin").write_bytes(bytes([i]) * 8)
    source, reader = LocalSource(tmp_path), FileReader()
    source.files()
    for i in [*range(count), *range(count)]:
        reader.begin_chunk()
        assert reader.read(source, f"{i}.bin", 0, 8).tolist() == [i] * 8
        assert len(open_files(tmp_path)) <= MOST_OPEN
    reader.check()
    del reader
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        ("perplexity", DEMO, DEMO.parent / "heldout-code.txt", "--window", 64, "--limit", 1),
        ("compare", DEMO, DEMO, "--text", DEMO.parent / "heldout-code.txt", "--window", 64, "--limit", 1),
    ],
    ids=lambda command: command[0],
)
def test_a_model_that_was_run_has_no_file_open(ok: Callable[..., Result], command: tuple[object, ...]) -> None:
    before = len(open_files(DEMO))
    ok(*command)
    assert len(open_files(DEMO)) == before
