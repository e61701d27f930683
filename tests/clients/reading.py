"""What every reader does with its job: one JSON file names models and tokens, one file per model answers.

No reader imports moesurgery: each runs in an environment of its client alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy


def read_all(logprobs: Callable[[Path, list[int]], numpy.ndarray], version: str) -> None:
    """Read each model of the job given on the command line; write `NAME.npy`, or why not to `NAME.error`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    (out / "version").write_text(version)
    for name, path in job["models"].items():
        try:
            found = logprobs(Path(path), job["tokens"])
        except Exception as error:  # whatever a client says of a file is the answer
            (out / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
        else:
            numpy.save(out / f"{name}.npy", found)
