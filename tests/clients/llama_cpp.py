"""llama.cpp as `make clients` installs it: its converter, its quantiser, and what it computes.

The folder is `out/clients`, or what MOESURGERY_CLIENTS names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import DEMO, ROOT

HERE = Path(__file__).resolve().parent
CLIENTS = Path(os.environ.get("MOESURGERY_CLIENTS", ROOT / "out" / "clients"))
NODE, SOURCES, PYTHON = CLIENTS / "node", CLIENTS / "llama.cpp-source", CLIENTS / "llama.cpp" / "bin" / "python"
INSTALLED = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SOURCES.is_dir() and NODE.is_dir() and PYTHON.exists()),
        reason=f"llama.cpp is not in {CLIENTS}: `make clients` installs it",
    ),
]
_CONVERT = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import read_llama_cpp as r"
_CONVERT += "; r.convert(sys.argv[2], Path(sys.argv[3]))"


def trained_model(to: Path) -> Path:
    """Copy the demo's model, its tokenizer's class under the name that the converter's older transformers knows."""
    shutil.copytree(DEMO, to)
    file = to / "tokenizer_config.json"
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return to


def converted(model: Path, to: Path, kind: str) -> Path:
    """Convert a checkpoint with llama.cpp's own converter."""
    settings = {"MOESURGERY_NODE": str(NODE), "MOESURGERY_LLAMA_CPP": str(SOURCES), "MOESURGERY_GGUF": kind}
    command = [PYTHON, "-c", _CONVERT, HERE, model, to]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "", **settings}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:].decode() + Path(f"{to}.said").read_text()[-2000:]
    return Path(f"{to}.gguf")


def _library() -> Path:
    (library,) = NODE.glob("node_modules/@node-llama-cpp/linux-x64/bins/*/libllama.v*.so")
    return library


def quantised(jobs: Sequence[tuple[Path, Path, int, Path | None]]) -> None:
    """Quantise files with llama.cpp's own library: (from, to, number of the type, imatrix) each."""
    told = json.dumps([[str(a), str(b), kind, imatrix and str(imatrix)] for a, b, kind, imatrix in jobs])
    command = [sys.executable, HERE / "quantise_gguf.py", _library(), told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def imatrix_of(model: Path, text: Path, to: Path, *, window: int, chunks: int) -> Path:
    """Let llama-imatrix run a GGUF over the first `chunks` windows of a text. It finds its backends where it stands."""
    command = [CLIENTS / "llama-imatrix", "-m", model, "-f", text, "-o", to, "-c", window, "-b", window, "-t", 1]
    told = [*map(str, command), "--chunks", str(chunks), "--no-ppl"]
    done = subprocess.run(told, cwd=_library().parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return to


def log_probabilities(folder: Path, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """Return what llama.cpp computes, [tokens, vocabulary], of every GGUF in a folder, by its name."""
    command = ["node", HERE / "read_gguf.mjs", NODE, folder, json.dumps(list(tokens))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {}
    for file in sorted(folder.glob("*.gguf")):
        answer = file.with_suffix(".json")
        assert answer.exists(), f"{file.name}: {done.stderr[-2000:]}"
        found[file.stem] = np.log(np.array(json.loads(answer.read_text())))
    return found


def perplexity(rows: np.ndarray, tokens: Sequence[int]) -> float:
    """Return the perplexity of tokens after the first, of log-probabilities [tokens, vocabulary]."""
    return float(np.exp(-np.mean([rows[i, token] for i, token in enumerate(tokens[1:])])))
