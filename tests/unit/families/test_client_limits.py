"""Numbers that clients' kernels take badly: each rule against the condition in the client's own source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.families.client_limits import NUMBER_RULES, MoeShape, awkward_numbers, moe_shape
from moesurgery.families.clients import CLIENTS

GOOD = MoeShape(128, 2048, "softmax")


def said(client: str, shape: MoeShape) -> list[str]:
    return [rule.misses(shape) for rule in awkward_numbers(client, shape)]


def test_round_numbers_are_taken_by_all() -> None:
    for client in CLIENTS:
        assert said(client, GOOD) == []
        assert said(client, replace(GOOD, groups=8)) == []
    assert {rule.client for rule in NUMBER_RULES} <= CLIENTS.keys()


@pytest.mark.parametrize(
    ("client", "shape", "expected"),
    [
        ("vllm", replace(GOOD, experts=192), []),
        ("vllm", replace(GOOD, experts=96), ["96 experts"]),
        ("vllm", replace(GOOD, experts=103), ["103 experts", "103 experts over 2, 4 and 8 ranks"]),
        ("vllm", replace(GOOD, experts=144, score="sqrt-softplus"), ["144 experts"]),
        ("vllm", replace(GOOD, width=1536), []),
        ("vllm", replace(GOOD, width=1536, block=128), ["width 1536 in blocks of 128 over 8 ranks"]),
        ("vllm", replace(GOOD, width=320, block=128), ["width 320 in blocks of 128 over 2, 4 and 8 ranks"]),
        ("sglang", replace(GOOD, experts=180), ["180 experts over 8 ranks"]),
        ("sglang", replace(GOOD, experts=192, groups=8), ["192 experts in 8 groups"]),
        ("sglang", replace(GOOD, experts=256, groups=4), ["256 experts in 4 groups"]),
        ("llama.cpp", replace(GOOD, width=1856), ["width 1856"]),
        ("mlx", replace(GOOD, width=1856), []),
        ("mlx", replace(GOOD, width=96), ["width 96"]),
        ("transformers5", replace(GOOD, width=100), ["width 100"]),
        ("llama.cpp", replace(GOOD, width=None), []),
    ],
)
def test_awkward_numbers(client: str, shape: MoeShape, expected: list[str]) -> None:
    """Figures of the issues that the rules name: 144, 320 in blocks, 1536 over 8, 1856."""
    assert said(client, shape) == expected


@pytest.mark.parametrize("width", [8, 16, 20, 24, 100])
def test_widths_of_grouped_products(width: int) -> None:
    """transformers 5 multiplies by `torch._grouped_mm`: what that takes is what the rule says."""
    hidden, weights = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(2, 32, width, dtype=torch.bfloat16)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    fits = not said("transformers5", replace(GOOD, width=width))
    try:
        torch._grouped_mm(hidden, weights, offs=offsets)
    except (RuntimeError, ValueError):
        assert not fits
    else:
        assert fits


def test_a_drop_says_what_its_number_costs(models: Any) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    assert moe_shape(plan.anatomy) == MoeShape(8, 48, "softmax")
    notes = " ".join(apply(plan, "drop-experts", keep=6, by="random").steps[-1].notes)
    assert "6 experts: vllm wants a power of two" in notes
    assert "6 experts over 4 and 8 ranks: sglang wants" in notes
    assert "width" not in notes  # which it did not change
    assert "experts over 8 ranks" in " ".join(apply(plan, "drop-experts", keep=4, by="random").steps[-1].notes)
    assert "wants" not in " ".join(apply(plan, "drop-experts", keep=8, by="random").steps[-1].notes)


def test_validate_says_so_too(models: Any) -> None:
    from moesurgery.validate.run_checks import validate_checkpoint

    report = validate_checkpoint(models("mixtral"), level="config", client="llama.cpp")
    (found,) = [finding for finding in report.findings if finding.code == "K07"]
    assert found.severity == "note"
    assert "width 48: llama.cpp wants a width that is a multiple of 256" in found.message
