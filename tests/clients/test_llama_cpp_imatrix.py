"""An imatrix that llama-imatrix computes of a trained mixture: read as statistics, beside what `collect` measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from moesurgery import open_checkpoint, plan_of
from moesurgery.stats.criteria import scores, spearman
from moesurgery.stats.imatrix_file import imatrix_scores, load_imatrix
from moesurgery.stats.statistics_file import stats_for
from tests.clients.llama_cpp import CLIENTS, INSTALLED, converted, imatrix_of, trained_model
from tests.conftest import DEMO, Result

pytestmark = [
    *INSTALLED,
    pytest.mark.skipif(not (CLIENTS / "llama-imatrix").exists(), reason="llama-imatrix is not built: `make clients`"),
]
WINDOW, LETTERS = 256, 24_000
Ok = Callable[..., Result]


def test_llama_imatrix_ranks_experts_as_collect_does(tmp_path: Path, ok: Ok) -> None:
    """Rank correlations of at least .95; and its file chooses the experts that leave its GGUF."""
    text = tmp_path / "text.txt"
    text.write_text((DEMO.parent / "calibration-code.txt").read_text()[:LETTERS])
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text.read_text()).ids
    windows = len(ids) // WINDOW  # all of the text: of a longer one `collect` takes windows from all over
    model = converted(trained_model(tmp_path / "model"), tmp_path / "whole", "f32")
    path = imatrix_of(model, text, tmp_path / "i.gguf", window=WINDOW, chunks=windows)
    options = (
        "--tokens",
        WINDOW * windows,
        "--window",
        WINDOW,
        "-o",
        tmp_path / "s",
        "--imatrix",
        tmp_path / "ours.gguf",
    )
    ok("collect", DEMO, "--text", text, *options, "-q")
    plan, theirs, ours = plan_of(open_checkpoint(DEMO)), load_imatrix(path), load_imatrix(tmp_path / "ours.gguf")
    stats = stats_for(tmp_path / "s.safetensors", plan.anatomy, "test")
    for by in ("frequency", "ean"):
        alike = [
            spearman(np.array(imatrix_scores(theirs, plan, block, by)), scores(stats.blocks[block.where], by))
            for block in plan.anatomy.blocks
        ]
        print(f"{by}: rank correlation {np.mean(alike):.3f}, worst layer {min(alike):.3f}")
        assert np.mean(alike) >= 0.95
    experts = {name for name in theirs.sums if "_exps" in name}
    assert experts == {name for name in ours.sums if "_exps" in name}
    assert all(theirs.sums[name].shape == ours.sums[name].shape for name in experts)
    done = ok("drop-experts", model, "--count", 2, "--stats", path, "-o", tmp_path / "out", "--json", "--validate")
    dropped = [set(layer["dropped"]) for layer in done.json["steps"][0]["report"]["layers"]]
    lowest = [np.argsort(imatrix_scores(theirs, plan, block, "ean"))[:2] for block in plan.anatomy.blocks]
    assert dropped == [set(map(int, row)) for row in lowest]
    assert json.loads((tmp_path / "out" / "moesurgery.json").read_text())["steps"]
