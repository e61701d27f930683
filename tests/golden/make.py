"""Record what mergekit 0.1.5 makes of the recipes in cases.py: run it with mergekit's Python, from the project's root.

    .work/mk/bin/python -m tests.golden.make      # an environment of its own: pip install mergekit==0.1.5

Writes tests/golden/mergekit.npz: for each case and kind all tensors in the order of their names, one after the other,
bf16 as uint16. No part of mergekit is kept, only numbers that it computed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from tests.golden.cases import EXACT, MODELS, RANDOM, ROUNDED
from tests.golden.models import write

HERE = Path(__file__).parent


def main() -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    rounded = {f"{name}-rounded": text for name, text in ROUNDED.items()}
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("llama", "mixtral"):
            places = {letter: write(kind, which, Path(folder) / f"{kind}{letter}") for letter, which in MODELS.items()}
            for name, text in [*EXACT.items(), *RANDOM.items(), *rounded.items()]:
                recipe = re.sub(r"\b([OABC])\b", lambda m, places=places: str(places[m[1]]), text)
                out = Path(folder) / "out" / f"{name}.{kind}"
                with contextlib.redirect_stderr(io.StringIO()):
                    run_merge(
                        MergeConfiguration.model_validate(yaml.safe_load(recipe)),
                        str(out),
                        MergeOptions(quiet=True, random_seed=7),
                    )
                made = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
                # arcee_fusion gives float32 whatever `out_dtype` says.
                values = torch.cat([made[tensor].to(torch.bfloat16).reshape(-1) for tensor in sorted(made)])
                found[f"{name}.{kind}"] = values.view(torch.uint16).numpy()
                print(name, kind, file=sys.stderr)
    np.savez_compressed(HERE / "mergekit.npz", **found)


if __name__ == "__main__":
    main()
