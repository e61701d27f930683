"""Shared fixtures: the command line in process, tiny models, header-only checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.update(NO_COLOR="1", COLUMNS="100", TERM="dumb", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
os.environ.pop("FORCE_COLOR", None)

from moesurgery.checkpoint.file_reader import BUFFER, FileReader
from moesurgery.cli import main

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo" / "model"


_begin_chunk = FileReader.begin_chunk


def _begin_chunk_after_overwriting(reader: FileReader) -> None:
    """What was read for the last chunk becomes NaN: who keeps it for the next one, uncopied, fails in every test."""
    for buffer in reader._buffers[: reader._used]:
        buffer.view[:BUFFER] = _NANS
    _begin_chunk(reader)


_NANS = b"\xff" * BUFFER
FileReader.begin_chunk = _begin_chunk_after_overwriting  # type: ignore[method-assign]


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process: `cli("rescale", model, "--top-k", 3)`."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def ok(cli: Callable[..., Result]) -> Callable[..., Result]:
    """Run a command that must succeed."""

    def run(*arguments: object) -> Result:
        result = cli(*arguments)
        assert result.code == 0, result.err
        return result

    return run


@pytest.fixture
def demo() -> Path:
    """The trained demo model."""
    return DEMO


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny random models by family and layout, made once per session: `models("mixtral", fused=True)`."""
    from tests.tiny import save_tiny

    made: dict[tuple[Any, ...], Path] = {}

    def get(model_type: str, *, fused: bool = False, dtype: str = "float32", **changes: Any) -> Path:
        key = (model_type, fused, dtype, repr(sorted(changes.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(f"{model_type}-{'fused' if fused else 'hub'}") / model_type
            save_tiny(model_type, path, fused=fused, dtype=dtype, **changes)
            made[key] = path
        return made[key]

    return get
