"""Merging with torch: on a GPU where there is one, else on the processor. No test of this file is ever skipped.

Run it on a machine with CUDA to see that nothing mixes the host's arrays with the device's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.expr.tensors import Constant
from moesurgery.merge.compute import backend
from moesurgery.merge.compute.merge_expr import MergeExpr
from moesurgery.merge.compute.method import find_method, load_methods, methods, per_model, scalar
from moesurgery.recipe.parameters import MISSING
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.golden.cases import EXACT, MODELS, RANDOM
from tests.golden.models import write
from tests.quantise import make_fp8
from tests.tiny import read_tensors

Cli = Callable[..., Result]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (257, 513)  # several chunks, the last of them short

# What a recipe must give, for parameters without a default.
GIVEN = {"weight": (0.6, 0.3, 0.2), "t": 0.3}
CHOSEN = {"density": (0.4, 0.7, 0.5), "select_topk": 0.4, "epsilon": {"della": (0.2,) * 3, "della_linear": (0.2,) * 3}}
VARIANTS: dict[str, dict[str, Any]] = {
    "nuslerp, rows": {"nuslerp_flatten": False},
    "nuslerp, columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock, rows": {"filter_wise": True},
    "ties, not normalised": {"normalize": False, "lambda": 0.7},
    "dare_linear, not rescaled": {"rescale": False},
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "DEVICE_STEP", backend.STEP)


def inputs(count: int, dtype: str) -> list[Constant]:
    """Return a base and changes of it; where their dtype is BF16, many are equal in size."""
    random = np.random.Generator(np.random.PCG64(5))
    base = random.standard_normal(SHAPE)
    found = []
    for i in range(count):
        values = torch.from_numpy(base + 0.1 * random.standard_normal(SHAPE) * (i > 0)).float()
        data = values.bfloat16().view(torch.int16) if dtype == "BF16" else values
        found.append(Constant(data.numpy().tobytes(), dtype, SHAPE))
    return found


def merged(name: str, device: str, dtype: str, **changes: Any) -> torch.Tensor:
    method = find_method(name)
    count = min(method.models[1] or 3, 3)
    base, *models = inputs(count + 1, dtype)
    values: dict[str, Any] = {}
    for key, parameter in method.parameters.items():
        value = CHOSEN.get(key, GIVEN.get(key) if parameter.required else MISSING)
        value = value.get(name, MISSING) if isinstance(value, dict) else value
        default = scalar(parameter).default
        own = value if value is not MISSING else (default,) * count if per_model(parameter) else default
        values[key] = own[:count] if per_model(parameter) else own
    apart = method.base in ("required", "optional")
    expr = MergeExpr(
        name,
        tuple(models),
        base if apart else None,
        tuple({**values, **changes}.items()),
        "F32",
        SHAPE,
        "a.weight",
        77 if method.random else 0,
        method.origin,
        device,
    )
    reader = FileReader()
    half = expr.numel // expr.chunk_multiple // 2 * expr.chunk_multiple  # in two parts, as two threads would
    parts = [expr.raw(start, stop, reader) for start, stop in ((0, half), (half, expr.numel)) if start < stop]
    return torch.cat([torch.frombuffer(bytearray(part), dtype=torch.float32) for part in parts])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", [*methods(), *VARIANTS])
def test_every_method_gives_what_numpy_does(name: str, dtype: str) -> None:
    method, changes = name.split(",")[0], VARIANTS.get(name, {})
    found, wanted = merged(method, DEVICE, dtype, **changes), merged(method, "", dtype, **changes)
    off = ~torch.isclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert int(off.sum()) <= (3 if method == "arcee_fusion" else 0)  # its threshold is of logarithms and quartiles
    assert not torch.equal(wanted, torch.zeros_like(wanted))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {letter: write("mixtral", which, folder / letter) for letter, which in MODELS.items()}


@pytest.fixture
def both(ok: Cli, tmp_path: Path) -> Callable[..., Path]:
    """Merge by a recipe with numpy and on the device, compare, and return the second's folder."""

    def run(text: str, *options: object) -> Path:
        (tmp_path / "r.yaml").write_text(text)
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "host", "--force", *options)
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "device", "--force", "--device", DEVICE, *options)
        wanted = read_tensors(tmp_path / "host")
        for name, value in read_tensors(tmp_path / "device").items():
            assert value.dtype == wanted[name].dtype
            rounding = 2**-7 if value.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(value.float(), wanted[name].float(), rtol=rounding, atol=1e-5)
        return tmp_path / "device"

    return run


@pytest.mark.parametrize("name", ["slerp-gradient", "ties-slices", "della", "frankenmerge", "arcee_fusion"])
def test_recipes(name: str, places: dict[str, Path], both: Callable[..., Path]) -> None:
    text = {**EXACT, **RANDOM}[name]
    out = both(re.sub(r"\b([OABC])\b", lambda m: str(places[m[1]]), text))
    against = [places[letter] for letter in "OABC" if re.search(rf"\b{letter}\b", text)]
    report = validate_checkpoint(out, against=against)
    assert report.errors == 0
    assert not [skip for skip in report.not_checked if "R03" in skip.codes]
    step = json.loads((out / "moesurgery.json").read_text())["recipe"]["steps"][0]["merge"]
    assert step["device"] == DEVICE


def test_stages_tensors_at_once_and_alignment(places: dict[str, Path], both: Callable[..., Path]) -> None:
    a, b, c, base = (places[letter] for letter in "ABCO")
    both(f"""\
name: middle
models: [{a}, {b}]
merge_method: ties
base_model: {base}
parameters: {{weight: 0.5, density: 0.4}}
granularity: tensor
---
models: [middle, {c}]
merge_method: slerp
base_model: middle
parameters: {{t: 0.4}}
align: [experts, neurons]
""")


def test_quantised_models(models: Any, both: Callable[..., Path], tmp_path: Path) -> None:
    plain = models("deepseek_v3")
    make_fp8(plain, tmp_path / "fp8")
    both(f"models: [{tmp_path / 'fp8'}, {plain}]\nmerge_method: karcher\ndtype: bfloat16\nalign: experts\n")


def test_a_method_of_ones_own_gets_tensors_on_the_device(places: dict[str, Path], ok: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"""\
from moesurgery import merge_method

@merge_method("on-device", models=(2, 2))
def on_device(models):
    \"\"\"The mean.\"\"\"
    assert all(m.device.type == {DEVICE!r} for m in models)
    return (models[0] + models[1]) / 2
""")
    load_methods(tmp_path / "mine.py")
    (tmp_path / "r.yaml").write_text(f"models: [{places['A']}, {places['B']}]\nmerge_method: on-device\n")
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--device", DEVICE)
    a, b = (read_tensors(places[letter]) for letter in "AB")
    for name, value in read_tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)
