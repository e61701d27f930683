"""Every family of the table, in every layout, against the model that transformers builds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, count_params, open_checkpoint, plan_of, recognise, write_plan
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy
from tests.families import ROWS
from tests.tiny import load, logits

LAYOUTS = [pytest.param(False, id="published"), pytest.param(True, id="fused")]
# The attribute that sets the top-k of a transformers config, where it is not the usual one.
TOP_K = {"aria": "moe_topk", "aria_text": "moe_topk", "gemma4": "top_k_experts", "diffusion_gemma": "top_k_experts"}
# The modules whose output takes the factor, where that is not `experts`.
OUTPUT = {"jetmoe": r"\.output_linear$", "doge": r"\.up_embed$"}


def anatomy_of(path: Path) -> Anatomy:
    checkpoint = open_checkpoint(path)
    return recognise(checkpoint.config, checkpoint.tensors)


def with_top_k(path: Path, model_type: str, top_k: int) -> torch.nn.Module:
    if model_type == "dbrx":
        model = load(path)
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = top_k
        return model
    return load(path, **{TOP_K.get(model_type, "num_experts_per_tok"): top_k})


def multiplied(model: torch.nn.Module, model_type: str, report: dict[str, Any]) -> torch.nn.Module:
    """Multiply in memory what the experts of each layer return, by the factors that a report names."""
    factors = {entry["layer"]: entry["factor"] for entry in report["layers"]}
    if report["where"] == "config":
        mean = math.exp(sum(map(math.log, factors.values())) / len(factors))
        factors = dict.fromkeys(factors, mean)
    if model_type == "longcat_flash":  # its experts module returns the identity experts' part too
        for name, parameter in model.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.data *= factor_of(name, factors)
        return model
    for name, module in model.named_modules():
        if re.search(OUTPUT.get(model_type, r"\.experts$"), name) and not re.search("talker|vision_tower", name):
            factor = factor_of(name, factors)
            module.register_forward_hook(lambda m, args, out, f=factor: out * f)
    return model


def factor_of(name: str, factors: dict[str, float]) -> float:
    """Return the factor of the block that a module belongs to: its layer's, and its set's where it has several."""
    (layer,) = re.findall(r"\.(?:layers|blocks)\.(\d+)\.", name)
    fitting = [f for where, f in factors.items() if re.search(rf"\.(layers|blocks)\.{layer}(\.|$)", f".{where}")]
    own = [
        f
        for where, f in factors.items()
        if f".{where.rsplit('.')[-1]}." in name and where.endswith(("attention", "moe"))
    ]
    return own[0] if own and len(fitting) > 1 else fitting[0]


def rescale_choice(anatomy: Anatomy) -> str | float:
    """Return the rule to test: the router's estimate where the family offers it."""
    assert anatomy.family is not None
    routing = anatomy.family.routing
    return 0.75 if routing.special else "norm" if routing.no_estimate else "router"


@pytest.mark.parametrize("fused", LAYOUTS)
@pytest.mark.parametrize("model_type", ROWS)
def test_counted_rescaled_and_reloaded(models: Any, tmp_path: Path, model_type: str, fused: bool) -> None:
    path = models(model_type, fused=fused)
    checkpoint = open_checkpoint(path)
    plan = plan_of(checkpoint)
    anatomy = plan.anatomy
    assert anatomy.family is not None
    assert anatomy.blocks
    assert anatomy.notes == []
    counts = count_params(anatomy, checkpoint.tensors)
    assert counts.unrecognised == []
    model = load(path)
    assert counts.total == sum(p.numel() for p in model.parameters())

    fixed = anatomy.family.routing.fixed_top_k
    if fixed is not None or "rescale" in anatomy.family.refuses:
        with pytest.raises(RefusedError, match=anatomy.family.name):
            apply(plan, "rescale", top_k=3)
        return
    plan = apply(plan, "rescale", top_k=3, scale=rescale_choice(anatomy))
    write_plan(plan, tmp_path / "out")
    report = dict(plan.steps[0].report)
    reference = with_top_k(path, model_type, 3)
    unscaled = logits(reference)
    found = logits(load(tmp_path / "out"))
    if report["class"] == "C":
        assert (found - unscaled).abs().max() == 0
        return
    expected = logits(multiplied(reference, model_type, report))
    assert (expected - unscaled).abs().max() > 1e-4 * unscaled.abs().max()  # else the test could not fail
    assert (found - expected).abs().max() < 3e-6 * max(1.0, float(expected.abs().max()))
