"""Arrays into a safetensors file, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `arrays` and `metadata`, making the folder.

    The library writes the keys of the metadata in an order that differs from run to run. Here they are in theirs, so
    that the digest of the file, which provenance records, depends on the content alone.
    """
    from safetensors.numpy import save

    data = save(dict(arrays), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = compact_json(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as new:
        new.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
