"""Configs and tensor shapes of families as transformers saves them, for `tests.fuzz`: a process of its own, with torch.

`python -m tests.fuzz_families FILE COUNT` writes a JSON list of {"config", "tensors": {name: [dtype, shape]}}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from moesurgery.checkpoint.checkpoint import open_checkpoint
from tests.families import LAYOUTS
from tests.tiny import save_tiny


def main(target: str, count: int) -> None:
    found = []
    chosen = LAYOUTS[:: max(1, len(LAYOUTS) // count)][:count]
    for model_type, fused in chosen:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            save_tiny(model_type, path, fused=fused)
            checkpoint = open_checkpoint(path)
            tensors = {name: [info.dtype, list(info.shape)] for name, info in checkpoint.tensors.items()}
            found.append({"config": checkpoint.config, "tensors": tensors})
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
