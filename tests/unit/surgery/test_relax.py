"""Relaxed ties: a stock PEFT adapter beside the tied model, read by peft itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import OutputError, RefusedError
from moesurgery.write.write_plan import WriteOptions
from tests.commands.test_tie_blocks import FAMILIES, Models, shared, tied
from tests.quantise import make_fp8
from tests.tiny import load, logits, read_config, read_tensors


def relaxed(path: Path) -> torch.nn.Module:
    """Load a tied model and its adapter; the adapter must fit to the last tensor."""
    model = load(path)
    adapted = peft.PeftModel.from_pretrained(model, path / "adapter")
    stored = read_tensors(path / "adapter")
    assert peft.get_peft_model_state_dict(adapted).keys() == stored.keys()
    return adapted.eval()


OTHERS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("jamba", {}, [0, 1, 0, 1]),  # Mamba layers: their linears are read directly, so they are not shared
    ("llama4_text", {"num_hidden_layers": 4}, [0, 1, 0, 3]),  # experts stored [E, in, out]
]


@pytest.mark.parametrize(("model_type", "changes", "blocks"), [*FAMILIES, *OTHERS])
def test_full_rank_gives_the_original_back(
    models: Models, tmp_path: Path, model_type: str, changes: dict[str, Any], blocks: list[int]
) -> None:
    path = models(model_type, **changes)
    original = logits(load(path))
    out = tied(path, tmp_path / "full", blocks=blocks, relax=64)
    found = logits(relaxed(out))
    assert (found - original).abs().max() < 1e-5
    assert (logits(load(out)) - original).abs().max() > 1e-3  # the base alone is another function
    apart = "|".join(map(re.escape, read_config(out)["layer_tie_exclude"]))
    assert shared(load(out), blocks, apart)


@pytest.mark.parametrize("rank", [3, 40])
def test_the_adapter_is_the_best_of_its_rank(models: Models, tmp_path: Path, rank: int) -> None:
    """Of every linear and of every expert: the truncated singular value decomposition of what tying took."""
    model_type, changes, blocks = FAMILIES[2]
    path = models(model_type, **changes)
    tensors, adapter = (
        read_tensors(path),
        read_tensors(tied(path, tmp_path / "out", blocks=blocks, relax=rank) / "adapter"),
    )

    def factors(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(adapter[f"base_model.model.model.layers.2.{module}.lora_{x}.weight"] for x in "BA")

    def best(inside: list[str]) -> torch.Tensor:
        own, other = (
            torch.cat([tensors[f"model.layers.{block}.{name}.weight"] for name in inside]).double() for block in (2, 1)
        )
        u, s, v = torch.linalg.svd(own - other, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    b, a = factors("self_attn.q_proj")
    assert (a.shape, b.shape) == ((rank, 32), (32, rank))
    assert (b.double() @ a.double() - best(["self_attn.q_proj"])).abs().max() < 1e-6
    b, a = factors("mlp.experts.base_layer")
    for expert in range(8):  # PEFT holds them by expert in A, by rank in B
        product = b.view(96, rank, 8)[..., expert].double() @ a.view(8, rank, 32)[expert].double()
        inside = f"block_sparse_moe.experts.{expert}."
        assert (product - best([f"{inside}w1", f"{inside}w3"])).abs().max() < 1e-6


def test_the_base_of_an_adapter_stays_tied(models: Models, tmp_path: Path) -> None:
    path = models("llama", num_hidden_layers=4, intermediate_size=48)
    adapted = relaxed(tied(path, tmp_path / "out", scheme="all", relax=2))
    bases = [layer.self_attn.q_proj.base_layer.weight for layer in adapted.base_model.model.model.layers[1:]]
    first = adapted.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert {base.data_ptr() for base in bases} == {first.data_ptr()}


def test_an_adapter_beside_a_stock_model(models: Models, tmp_path: Path) -> None:
    path = models("llama", num_hidden_layers=4, intermediate_size=48)
    out = tied(path, tmp_path / "out", scheme="cycle", init="average", relax=64, materialize=True)
    assert (logits(relaxed(out)) - logits(load(path))).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes", "parameters", "message"),
    [
        ("llama", {"intermediate_size": 48}, {"scheme": "repeat"}, "every position has its own weights already"),
        ("doge", {"num_hidden_layers": 4}, {"scheme": "cycle"}, "not known how transformers holds the experts"),
        ("axk2", {"num_hidden_layers": 4}, {"blocks": [0, 1, 1, 3]}, "PEFT knows axk2 under other names"),
        ("jetmoe", {"num_hidden_layers": 4}, {"blocks": [0, 0, 2, 3]}, "one of two sets of experts"),
    ],
)
def test_refusals(
    models: Models, model_type: str, changes: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        apply(plan_of(open_checkpoint(models(model_type, **changes))), "tie-blocks", relax=2, **parameters)


def test_quantised_weights_have_no_adapter(models: Models, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3", num_hidden_layers=4), tmp_path / "fp8")
    plan = plan_of(open_checkpoint(tmp_path / "fp8"))
    with pytest.raises(RefusedError, match="is quantised"):
        apply(plan, "tie-blocks", blocks=[0, 1, 1, 3], relax=2, materialize=True)


def test_replacing_a_folder_that_holds_an_adapter(models: Models, tmp_path: Path) -> None:
    """--force knows adapter/ for what it is; a folder of anything else is not deleted."""
    path = models("llama", num_hidden_layers=4, intermediate_size=48)
    plan = apply(plan_of(open_checkpoint(path)), "tie-blocks", relax=2)
    write_plan(plan, tmp_path / "out")
    write_plan(plan, tmp_path / "out", WriteOptions(force=True))
    assert open_checkpoint(tmp_path / "out").tensors.keys() == plan.tensors.keys()
    (tmp_path / "out" / "adapter" / "notes.doc").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.doc"):
        write_plan(plan, tmp_path / "out", WriteOptions(force=True))


@pytest.mark.parametrize(("operation", "parameters"), [("convert", {"dtype": "bf16"}), ("rescale", {"top_k": 1})])
def test_weights_do_not_change_under_an_adapter(models: Models, operation: str, parameters: dict[str, Any]) -> None:
    path = models("mixtral", num_hidden_layers=4)
    plan = apply(plan_of(open_checkpoint(path)), "tie-blocks", relax=2)
    with pytest.raises(RefusedError, match=r"adapter/adapter_model\.safetensors was planned for the weights before"):
        apply(plan, operation, **parameters)
    apply(apply(plan_of(open_checkpoint(path)), operation, **parameters), "tie-blocks", relax=2)
