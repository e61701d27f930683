"""Read checkpoints with mlx-lm, for `tests/clients/run.py`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_lm.utils import load_model
from reading import read_all


def logprobs(path: Path, tokens: list[int]) -> numpy.ndarray:
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    logits = numpy.array(model(mx.array([tokens]))[0].astype(mx.float32), dtype=numpy.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))


if __name__ == "__main__":
    read_all(logprobs, f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}")
