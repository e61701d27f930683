"""Running models with torch on a GPU where there is one, else on the processor. No test of this file is ever skipped.

Run it on a machine with CUDA to see that nothing mixes the host's tensors with the device's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting.ablation import ablate
from moesurgery.fitting.collector import collect
from moesurgery.fitting.group_fit import fit_groups
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.forward import engine as engine_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.loss import losses_of_several
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.repair_file import FittedBlock
from moesurgery.surgery.group_experts import merger
from tests.commands.test_drop_experts import with_prediction_layer
from tests.quantise import make_fp8, make_mxfp4
from tests.tiny import PROMPT, load, logits
from tests.unit.fitting.test_layer_fit import TEXT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "llama4", "jetmoe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_transformers(models: Any, model_type: str) -> None:
    path = models(model_type)
    found: list[torch.Tensor] = []
    engine = Engine(plan_of(open_checkpoint(path)), keep=0, device=DEVICE)
    engine.run(Tokens(PROMPT), logits=lambda first, part, values: found.append(values.float().cpu()))
    assert (torch.cat(found) - logits(load(path))).abs().max() < 1e-4


@pytest.mark.parametrize(("model_type", "quantise"), [("deepseek_v3", make_fp8), ("gpt_oss", make_mxfp4)])
def test_quantised_weights(models: Any, tmp_path: Path, model_type: str, quantise: Any) -> None:
    quantise(models(model_type), tmp_path / "quantised")
    plan = plan_of(open_checkpoint(tmp_path / "quantised"))
    found: dict[str, list[torch.Tensor]] = {DEVICE: [], "cpu": []}
    for device, parts in found.items():
        Engine(plan, keep=0, device=device).run(
            Tokens(PROMPT), logits=lambda first, part, values, parts=parts: parts.append(values.float().cpu())
        )
    assert (torch.cat(found[DEVICE]) - torch.cat(found["cpu"])).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_statistics_do_not_depend_on_device_or_batch(
    models: Any, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    plan = plan_of(open_checkpoint(models(model_type)))
    there = collect(Engine(plan, device=DEVICE), Tokens(TEXT), [1], [6], every_expert=True)
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", TEXT.shape[1])
    here = collect(Engine(plan, device="cpu"), Tokens(TEXT), [1], [6], every_expert=True)
    for where, block in here.blocks.items():
        for name, values in block.sums.items():
            if not name.startswith("recon@"):  # chosen on the first batch
                scale = max(1.0, float(np.abs(values).max()))
                assert np.abs(there.blocks[where].sums[name] - values).max() < 1e-4 * scale, name


def test_statistics_of_prediction_layers(models: Any, tmp_path: Path) -> None:
    with_prediction_layer(models("deepseek_v3"), tmp_path / "predicting")
    plan = plan_of(open_checkpoint(tmp_path / "predicting"))
    there, here = (collect(Engine(plan, device=device), Tokens(TEXT)).prediction for device in (DEVICE, "cpu"))
    assert list(there) == list(here) == ["model.layers.2"]
    for where, block in here.items():
        for name, values in block.sums.items():
            scale = max(1.0, float(np.abs(values).max()))
            assert np.abs(there[where].sums[name] - values).max() < 1e-4 * scale, name


@pytest.mark.parametrize("kind", ["scalar", "expert", "down", "all"])
def test_repairs(models: Any, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    edited = apply(plan, "drop-experts", experts=[1, 6])
    options = RepairOptions(kind, ridge=0.1, minimum=1)
    found: dict[str, list[FittedBlock]] = {"there": [], "here": []}
    fit_layers(Engine(plan, device=DEVICE), Engine(edited, device=DEVICE), Tokens(TEXT), options, found["there"].append)
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", TEXT.shape[1])
    fit_layers(Engine(plan, device="cpu"), Engine(edited, device="cpu"), Tokens(TEXT), options, found["here"].append)
    for there, here in zip(found["there"], found["here"], strict=True):
        # Conjugate gradients of few steps in float32 enlarge what the order of sums changes: on one processor alone,
        # by other batches or weights that differ by 1e-7, these errors are .2595 to .2612.
        assert there.error_after == pytest.approx(here.error_after, abs=5e-3 if kind == "all" else 1e-3)
        assert there.error_after < there.error_before
        assert there.matrices.keys() == here.matrices.keys()


def test_groups_are_fitted(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    merge = merger(plan, groups=[[0, 1, 2], [5, 7]], align="activations", router="lse", fitted=True)
    there = fit_groups(Engine(plan, device=DEVICE), Tokens(TEXT), merge)
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", TEXT.shape[1])
    here = fit_groups(Engine(plan, device="cpu"), Tokens(TEXT), merge)
    for one, other in zip(there, here, strict=True):
        assert {e: o.tolist() for e, o in one.orders.items()} == {e: o.tolist() for e, o in other.orders.items()}
        assert one.router["router"] == pytest.approx(other.router["router"], abs=1e-4)


def test_leaving_experts_out(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    found = []
    for device, batch in ((DEVICE, TEXT.numel()), ("cpu", TEXT.shape[1])):
        monkeypatch.setattr(engine_module, "BATCH_TOKENS", batch)
        engine = Engine(plan, device=device)
        found.append(ablate(engine, Tokens(TEXT), {b.where: [2, 5] for b in engine.blocks}, ["mask", "zero"]))
    there, here = found
    assert there.base == pytest.approx(here.base, abs=1e-4)
    for mode in ("mask", "zero"):
        assert there.index[mode] == pytest.approx(here.index[mode], abs=1e-4)
        for where, losses in here.single[mode].items():
            assert there.single[mode][where] == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("memory", [0, 400_000])
def test_models_in_lockstep(models: Any, memory: int) -> None:
    """What each loses alone, also where memory holds few hidden states and no second layer."""
    plan = plan_of(open_checkpoint(models("deepseek_v3")))
    where = plan.anatomy.main_blocks[-1].layer_path
    plans = [plan, *(apply(plan, "drop-experts", experts={where: [e, e + 4]}) for e in (0, 1, 2))]
    first = Engine(plan, device=DEVICE, memory=memory)
    domains = [Domain("text", TEXT[:4])]
    found = losses_of_several([[first, *map(first.sharing, plans[1:])]], domains)
    for plan, each in zip(plans, found, strict=True):
        ((alone,),) = losses_of_several([[Engine(plan, device=DEVICE)]], domains)
        assert each[0].nats == pytest.approx(alone.nats, abs=1e-6)
