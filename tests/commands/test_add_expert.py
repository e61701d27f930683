"""Experts of another checkpoint appended: the bytes, the config, and what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Result
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Cli = Callable[..., Result]


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("other_layout", ["hub", "fused"])
def test_bytes_config_and_function(layout: str, other_layout: str, models: Any, ok: Cli, tmp_path: Path) -> None:
    model = models("mixtral", fused=layout == "fused")
    other = models("mixtral", fused=other_layout == "fused", rope_theta=5e5, num_local_experts=4)
    hub = read_tensors(models("mixtral", rope_theta=5e5, num_local_experts=4))
    ok("add-expert", model, "--source", other, "--experts", "3,1", "-o", tmp_path / "out")
    ok("validate", tmp_path / "out", "--level", "forward")
    found, before = read_tensors(tmp_path / "out"), read_tensors(model)
    assert read_config(tmp_path / "out")["num_local_experts"] == 10
    for layer in range(2):
        at = f"model.layers.{layer}.block_sparse_moe."
        router = at + "gate.weight" if layout == "hub" else f"model.layers.{layer}.mlp.gate.weight"
        assert same_bits(found[router], torch.cat([before[router], hub[at + "gate.weight"][[3, 1]]]))
        for number, origin in ((8, 3), (9, 1)):
            gate, up, down = (hub[f"{at}experts.{origin}.{w}.weight"] for w in ("w1", "w3", "w2"))
            if layout == "hub":
                held = [found[f"{at}experts.{number}.{w}.weight"] for w in ("w1", "w3", "w2")]
                assert all(same_bits(a, b) for a, b in zip(held, (gate, up, down), strict=True))
            else:
                stacked = f"model.layers.{layer}.mlp.experts."
                assert same_bits(found[stacked + "gate_up_proj"][number], torch.cat([gate, up]))
                assert same_bits(found[stacked + "down_proj"][number], down)
    assert all(same_bits(found[n], t) for n, t in before.items() if n in found and found[n].shape == t.shape)
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


@pytest.mark.parametrize(
    ("family", "source", "options", "message"),
    [
        ("mixtral", "qwen3_moe", (), "this is a mixtral, the source of experts a qwen3_moe"),
        ("mixtral", "mixtral", ("--experts", "9"), "has no expert 9: it has 0 to 7"),
        ("deepseek_v3", "deepseek_v3", (), "scores experts in 2 groups"),
        ("longcat_flash", "longcat_flash", (), "identity experts of longcat_flash have the numbers after"),
        ("nllb-moe", "nllb-moe", (), "has experts in two stacks"),
    ],
)
def test_what_is_refused(
    family: str, source: str, options: tuple[str, ...], message: str, models: Any, cli: Cli, tmp_path: Path
) -> None:
    result = cli("add-expert", models(family), "--source", models(source), *options, "-o", tmp_path / "out")
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe", "lfm2_moe", "ernie4_5_moe"])
def test_a_model_with_its_own_experts_twice_routes_to_either(family: str, models: Any, ok: Cli, tmp_path: Path) -> None:
    """With two copies of every expert and twice the top-k, each pair shares what one had: the same function."""
    model = models(family)
    ok("add-expert", model, "--source", model, "-o", tmp_path / "out")
    key = "moe_k" if family == "ernie4_5_moe" else "num_experts_per_tok"
    doubled = load(tmp_path / "out", **{key: 2 * read_config(model)[key]})
    torch.testing.assert_close(logits(doubled), logits(load(model)), rtol=1e-3, atol=1e-3)
