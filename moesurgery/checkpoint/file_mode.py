"""Access rights of files that a library writes."""

from __future__ import annotations

import os
from pathlib import Path


def follow_umask(file: Path) -> None:
    """Give a file the rights of one that was opened for writing: safetensors' own writer makes files private."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
