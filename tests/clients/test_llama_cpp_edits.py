"""Edits of a GGUF against llama.cpp itself: its converter on the same edit of the original, and what it computes.

`make clients` installs it; the folder is `out/clients`, or what MOESURGERY_CLIENTS names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moesurgery import open_checkpoint
from moesurgery.validate.difference import diff_checkpoints
from tests.conftest import DEMO, ROOT, Result
from tests.tiny import load

HERE = Path(__file__).resolve().parent
CLIENTS = Path(os.environ.get("MOESURGERY_CLIENTS", ROOT / "out" / "clients"))
NODE, SOURCES, PYTHON = CLIENTS / "node", CLIENTS / "llama.cpp-source", CLIENTS / "llama.cpp" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SOURCES.is_dir() and NODE.is_dir() and PYTHON.exists()),
        reason=f"llama.cpp is not in {CLIENTS}: `make clients` installs it",
    ),
]
_CONVERT = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import read_llama_cpp as r"
_CONVERT += "; r.convert(sys.argv[2], Path(sys.argv[3]))"
EXPERTS = "1,4"


def converted(model: Path, to: Path, kind: str) -> Path:
    """Convert a checkpoint with llama.cpp's own converter."""
    settings = {"MOESURGERY_NODE": str(NODE), "MOESURGERY_LLAMA_CPP": str(SOURCES), "MOESURGERY_GGUF": kind}
    command = [PYTHON, "-c", _CONVERT, HERE, model, to]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "", **settings}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:].decode() + Path(f"{to}.said").read_text()[-2000:]
    return Path(f"{to}.gguf")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_drop_then_convert_is_convert_then_drop(kind: str, tmp_path: Path, ok: Callable[..., Result]) -> None:
    ok("drop-experts", DEMO, "--experts", EXPERTS, "-o", tmp_path / "hf", "-q")
    whole, dropped = (converted(m, tmp_path / m.name, kind) for m in (DEMO, tmp_path / "hf"))
    ok("drop-experts", whole, "--experts", EXPERTS, "-o", tmp_path / "gguf", "-q", "--validate")
    found = diff_checkpoints(open_checkpoint(dropped), open_checkpoint(tmp_path / "gguf"))
    assert not found.tensors
    assert {key.rpartition(".")[2] for key, *_ in found.config} <= {"name", "size_label", "tags", "moesurgery"}


def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, ok: Callable[..., Result]) -> None:
    """The perplexity of the pruned GGUF is that of the same prune in transformers, and so with a factor."""
    text = (DEMO.parent / "heldout-code.txt").read_text()[:2000]
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids[:96]
    whole = converted(DEMO, tmp_path / "whole", "f32")
    runs = tmp_path / "runs"
    runs.mkdir()
    wanted = {}
    for name, command in {
        "dropped": ("drop-experts", "--experts", EXPERTS),
        "rescaled": ("rescale", "--top-k", 3, "--scale", 1.1),
    }.items():
        for model, out in ((DEMO, tmp_path / f"{name}-hf"), (whole, tmp_path / f"{name}-gguf")):
            ok(command[0], model, *command[1:], "-o", out, "-q")
        (tmp_path / f"{name}-gguf" / whole.name).rename(runs / f"{name}.gguf")
        with torch.no_grad():
            logits = load(tmp_path / f"{name}-hf")(torch.tensor([tokens])).logits[0]
        wanted[name] = perplexity(logits.log_softmax(-1).double().numpy(), tokens)
    command = ["node", HERE / "read_gguf.mjs", NODE, runs, json.dumps(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for name, expected in wanted.items():
        assert (runs / f"{name}.json").exists(), done.stderr[-2000:]
        found = perplexity(np.log(np.array(json.loads((runs / f"{name}.json").read_text()))), tokens)
        assert found == pytest.approx(expected, rel=1e-3)
        print(f"{name}: {found:.5f} in llama.cpp, {expected:.5f} in transformers")


def perplexity(rows: np.ndarray, tokens: list[int]) -> float:
    return float(np.exp(-np.mean([rows[i, token] for i, token in enumerate(tokens[1:])])))
