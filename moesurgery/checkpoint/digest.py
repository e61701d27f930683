"""Digests of files: of a few blocks of them, which costs nothing, and of all of them.

A writer copies most bytes inside the kernel and never sees them, so a digest of all of them means reading them
again. 64 blocks spread over the file, the last one among them, tell a shard from one with the same header that
holds other weights, and from an interrupted copy; they do not tell a single changed value.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from moesurgery.checkpoint.source import Source
from moesurgery.errors import CheckpointError

SAMPLES = 64
SAMPLE_BYTES = 4096
_PART = 8 << 20


def sampled_digest(source: Source, file: str, size: int) -> str:
    """Return the SHA-256 of 64 evenly spread blocks of 4 kB, the first and the last among them.

    Raises CheckpointError where the file cannot be read.
    """
    found = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    starts = list(dict.fromkeys(last * i // (SAMPLES - 1) for i in range(SAMPLES)))
    path = source.local(file)
    if path is None:
        for start in starts:
            found.update(source.read(file, start, SAMPLE_BYTES))
        return found.hexdigest()
    try:
        with open(path, "rb") as opened:  # once: finding a file costs more than reading a block of it
            for start in starts:
                found.update(os.pread(opened.fileno(), SAMPLE_BYTES, start))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return found.hexdigest()


def whole_digest(source: Source, file: str, size: int, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of a whole file."""
    found = hashlib.sha256()
    for start in range(0, size, _PART):
        data = source.read(file, start, min(_PART, size - start))
        found.update(data)
        progress(len(data))
    return found.hexdigest()
