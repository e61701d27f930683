"""Digests of files: of a few blocks of them, which costs nothing, and of all of them.

A writer copies most bytes inside the kernel, not through user memory, so a digest of all of them means reading them
again. 64 blocks spread over the file, the last one among them, distinguish a shard from one with the same header and
other weights, and from an interrupted copy; they do not detect a single changed value.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from moesurgery.checkpoint.finding import DAMAGED
from moesurgery.checkpoint.source import Source, read_in_parts
from moesurgery.errors import CheckpointError

SAMPLES = 64
SAMPLE_BYTES = 4096


def sampled_digest(source: Source, file: str, size: int) -> str:
    """Return the SHA-256 of 64 evenly spread blocks of 4 kB, the first and the last among them.

    Raises CheckpointError where the file cannot be read.
    """
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    starts = list(dict.fromkeys(last * i // (SAMPLES - 1) for i in range(SAMPLES)))
    path = source.local(file)
    if path is None:
        for start in starts:
            digest.update(source.read(file, start, min(SAMPLE_BYTES, size - start)))
        return digest.hexdigest()
    try:
        with open(path, "rb") as opened:  # once: finding a file costs more than reading a block of it
            for start in starts:
                digest.update(_block(opened.fileno(), start, min(SAMPLE_BYTES, size - start), path))
            source.check(file, opened.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _block(descriptor: int, start: int, length: int, path: Path) -> bytes:
    """Read `length` bytes, repeating short reads; raise CheckpointError where the file ends before."""
    data = b""
    while len(data) < length:
        part = os.pread(descriptor, length - len(data), start + len(data))
        if not part:
            raise CheckpointError(f"{path} ends at byte {start + len(data):,}, it had {start + length:,}", DAMAGED)
        data += part
    return data


def whole_digest(source: Source, file: str, size: int, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of a whole file."""
    digest = hashlib.sha256()
    length = 0
    for data in read_in_parts(source, file, size):
        digest.update(data)
        length += len(data)
        progress(len(data))
    if length != size:
        raise CheckpointError(f"{source.identity}/{file} ends at byte {length:,}, it had {size:,}", DAMAGED)
    return digest.hexdigest()
