"""Checkpoints of which only the headers matter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def header_checkpoint(
    folder: Path,
    config: dict[str, Any],
    shapes: Mapping[str, list[int] | tuple[str, list[int]]],
    *,
    sparse: bool,
    shards: int = 1,
) -> None:
    """Write shards that hold headers: `sparse` with holes for data, else nothing after the header.

    A shape alone is bf16; other types stand before it: ("F32", [8, 8]).
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names[i::shards]:
            given = shapes[name]
            dtype, shape = given if isinstance(given, tuple) else ("BF16", given)
            size = WIDTH[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
