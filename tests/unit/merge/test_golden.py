"""Every merge method against mergekit 0.1.5 on the same recipe: tests/golden/make.py recorded what that computes.

With torch instead of numpy: tests/unit/merge/test_merge_device.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Result
from tests.golden.cases import EXACT, MODELS, RANDOM, ROUNDED
from tests.golden.models import EXPERTS, tensors, write
from tests.tiny import read_tensors

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / "mergekit.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {
        kind + letter: write(kind, which, folder / f"{kind}{letter}")
        for kind in ("llama", "mixtral")
        for letter, which in MODELS.items()
    }


def merged(ok: Cli, places: dict[str, Path], kind: str, text: str, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """Merge, and return the tensors under the names and in the forms that mergekit gives them."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(re.sub(r"\b([OABC])\b", lambda m: str(places[kind + m[1]]), text) + "granularity: tensor\n")
    ok("merge", recipe, "-o", out, *options)
    return as_mergekit(read_tensors(out))


def as_mergekit(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuse the experts and rename the router, as transformers 5 holds them in memory."""
    result = {}
    for name, value in found.items():
        match = re.fullmatch(r"(.*)block_sparse_moe\.(gate\.weight|experts\.0\.w1\.weight)", name)
        if match and match[2] == "gate.weight":
            result[f"{match[1]}mlp.gate.weight"] = value
        elif match:
            at = f"{match[1]}block_sparse_moe.experts."
            gate, up, down = (
                torch.stack([found[f"{at}{e}.{w}.weight"] for e in range(EXPERTS)]) for w in ("w1", "w3", "w2")
            )
            result[f"{match[1]}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            result[f"{match[1]}mlp.experts.down_proj"] = down
        elif "block_sparse_moe" not in name:
            result[name] = value
    return result


def compared(
    ours: dict[str, torch.Tensor], recorded: Mapping[str, np.ndarray], case: str, kind: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, ours, mergekit's): recorded are all tensors in the order of their names."""
    theirs = torch.from_numpy(recorded[f"{case}.{kind}"]).view(torch.bfloat16)
    assert len(theirs) == sum(value.numel() for value in ours.values())
    for name in sorted(ours):
        value = ours[name]
        yield name, value, theirs[: value.numel()].view(value.shape)
        theirs = theirs[value.numel() :]


def roundings_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return how many bf16 numbers lie between two tensors, element by element."""

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(a) - ordered(b)).abs()


# What mergekit does with a stack of experts that it should not, by case and tensor.
WRONG = {
    # Columns are taken over the first axis, which in [E, out, in] counts experts: one angle for each weight of an
    # expert, between as many numbers as there are experts. A column of an expert is what the parameter says.
    "nuslerp-rows": "mlp.experts.",
}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("case", EXACT)
def test_equal_to_mergekit(
    case: str, kind: str, recorded: Mapping[str, np.ndarray], places: dict[str, Path], ok: Cli, tmp_path: Path
) -> None:
    ours = merged(ok, places, kind, EXACT[case], tmp_path / "out")
    for name, value, theirs in compared(ours, recorded, case, kind):
        apart = roundings_apart(value, theirs)
        if case in WRONG and WRONG[case] in name:
            assert int(apart.max()) > 100
        else:
            assert int(apart.max()) <= 1, (name, int(apart.max()), int((apart > 1).sum()))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("case", ROUNDED)
def test_with_dtype_bfloat16_one_rounding_is_nearer_than_mergekits_many(
    case: str, kind: str, recorded: Mapping[str, np.ndarray], places: dict[str, Path], ok: Cli, tmp_path: Path
) -> None:
    ours = merged(ok, places, kind, ROUNDED[case], tmp_path / "a")
    once = merged(ok, places, kind, EXACT[case], tmp_path / "b")
    exact = merged(ok, places, kind, EXACT[case].replace("out_dtype: bfloat16", "out_dtype: float32"), tmp_path / "c")
    mine = yours = 0.0
    for name, value, theirs in compared(ours, recorded, f"{case}-rounded", kind):
        assert torch.equal(value, once[name])
        mine += float((value.float() - exact[name]).abs().sum())
        yours += float((theirs.float() - exact[name]).abs().sum())
    assert 1.2 * mine < yours


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("case", RANDOM)
def test_random_masks_are_distributed_as_mergekits(
    case: str, kind: str, recorded: Mapping[str, np.ndarray], places: dict[str, Path], ok: Cli, tmp_path: Path
) -> None:
    base, model = (as_mergekit(tensors(kind, which)) for which in (0, 1))
    ours = merged(ok, places, kind, RANDOM[case], tmp_path / "out")
    kept: dict[str, list[float]] = {"mine": [], "yours": []}
    large: dict[str, list[float]] = {"mine": [], "yours": []}
    for name, value, theirs in compared(ours, recorded, case, kind):
        delta = model[name] - base[name]
        half = delta.abs() > delta.abs().median()
        for who, result in (("mine", value), ("yours", theirs)):
            change = result.float() - base[name]
            there = change.abs() > delta.abs() / 2 + 0.004  # what is dropped is the base, but for bf16
            kept[who] += there.flatten().tolist()
            large[who] += there[half].flatten().tolist()
            # What stays is the difference, times one factor for the tensor that keeps the sum of magnitudes.
            if value.dim() > 1:
                factor = delta.abs().sum() / delta[there].abs().sum()
                torch.testing.assert_close(change[there], delta[there] * factor, rtol=0.12, atol=0.02)
    for found in (kept, large):
        n = len(found["mine"])
        share = {who: sum(values) / n for who, values in found.items()}
        assert abs(share["mine"] - share["yours"]) < 4 * (0.5 / n) ** 0.5, share
