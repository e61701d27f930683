"""Edits of a folder that mlx-lm wrote, against mlx-lm itself on the same edit of the original."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesurgery import open_checkpoint
from moesurgery.validate.difference import diff_checkpoints
from tests.clients import cases
from tests.conftest import ROOT, Result

HERE = Path(__file__).resolve().parent
CLIENTS = Path(os.environ.get("MOESURGERY_CLIENTS", ROOT / "out" / "clients"))
PYTHON = CLIENTS / "mlx" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"mlx-lm is not in {CLIENTS}: `make clients` installs it"),
]
Ok = Callable[..., Result]
_CONVERT = "import sys, json, mlx_lm; mlx_lm.convert(sys.argv[1], mlx_path=sys.argv[2], quantize=True, "
_CONVERT += "**json.loads(sys.argv[3]))"
EDITS = {
    "dropped": ("drop-experts", "--experts", "1,4"),
    "rescaled": ("rescale", "--top-k", 3, "--scale", 0.5),
}


def in_mlx(*arguments: object) -> None:
    command = [PYTHON, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_edited_then_converted_is_converted_then_edited(family: str, bits: int, tmp_path: Path, ok: Ok) -> None:
    """Byte for byte, and mlx-lm computes the same of both; of the model before the edit it computes something else."""
    model_type, changes = cases.MIXTURES[family]
    count = {"qwen3-moe": "num_experts", "mixtral": "num_local_experts"}[family]
    cases.save(tmp_path / "model", model_type, {**changes, count: 6, "intermediate_size": 128})
    settings = json.dumps({"q_bits": bits, "q_group_size": 32, "dtype": "bfloat16" if bits == 8 else None})
    in_mlx("-c", _CONVERT, tmp_path / "model", tmp_path / "whole", settings)
    models = {"whole": tmp_path / "whole"}
    for name, edit in EDITS.items():
        ok(edit[0], tmp_path / "model", *edit[1:], "-o", tmp_path / f"{name}-hf", "-q")
        in_mlx("-c", _CONVERT, tmp_path / f"{name}-hf", tmp_path / f"{name}-before", settings)
        ok(edit[0], tmp_path / "whole", *edit[1:], "-o", tmp_path / f"{name}-after", "-q", "--validate")
        models |= {f"{name}-{when}": tmp_path / f"{name}-{when}" for when in ("before", "after")}
    out = tmp_path / "out"
    out.mkdir()
    job = {"models": {name: str(path) for name, path in models.items()}, "tokens": cases.prompt(), "out": str(out)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    in_mlx(HERE / "read_mlx.py", tmp_path / "job.json")
    assert not list(out.glob("*.error"))
    whole = np.load(out / "whole.npy")
    for name in EDITS:
        found = diff_checkpoints(*(open_checkpoint(models[f"{name}-{when}"]) for when in ("before", "after")))
        assert not found.tensors
        before, after = (np.load(out / f"{name}-{when}.npy") for when in ("before", "after"))
        assert np.array_equal(before, after)
        assert np.abs(after - whole).max() > 0.1
