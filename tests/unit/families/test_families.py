"""Every family of the table, in every layout, against the model that transformers builds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto import modeling_auto

from moesurgery import apply, count_params, open_checkpoint, plan_of, recognise, write_plan
from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.family import Projection
from moesurgery.families.routing import second_moments
from moesurgery.families.table import FAMILIES, by_model_type
from moesurgery.families.table.remote import REMOTE
from moesurgery.surgery.rescale.data_free_factor import normalised
from tests.families import LAYOUTS, ROWS
from tests.quantise import rewrite
from tests.tiny import OLDER, load, logits, read_tensors

# The attribute that sets the top-k of a transformers config, where it is not the usual one.
TOP_K = {"aria": "moe_topk", "aria_text": "moe_topk", "gemma4": "top_k_experts", "diffusion_gemma": "top_k_experts"}
# The modules whose output takes the factor, where that is not `experts`.
OUTPUT = {"jetmoe": r"\.output_linear$", "doge": r"\.up_embed$"}


def anatomy_of(path: Path) -> Anatomy:
    checkpoint = open_checkpoint(path)
    return recognise(checkpoint.config, checkpoint.tensors)


def with_top_k(path: Path, model_type: str, top_k: int, edited: Path | None = None) -> torch.nn.Module:
    """Return the model with another top-k. Tables of experts by token, which decide what the new slots are, are those
    of `edited`: tests/commands/test_hash_layers.py compares them with a loop over tokens."""
    if model_type in ("dbrx", "deepseek_v4"):
        model = load(path)
        written = read_tensors(edited) if edited is not None else {}
        tables = iter([written[name] for name in sorted(written) if name.endswith("tid2eid")])
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = top_k
            if hasattr(module, "tid2eid"):
                module.tid2eid.data = next(tables)
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


@pytest.mark.parametrize(("model_type", "fused"), LAYOUTS)
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
    learned = sum(p.numel() for p in model.parameters())
    learned += sum(b.numel() for name, b in model.named_buffers() if name.endswith(".alpha"))  # before 5.24 a buffer
    assert counts.total == learned

    fixed = anatomy.family.routing.fixed_top_k
    if fixed is not None or "rescale" in anatomy.family.refuses:
        with pytest.raises(RefusedError, match=anatomy.family.name):
            apply(plan, "rescale", top_k=3)
        return
    plan = apply(plan, "rescale", top_k=3, scale=rescale_choice(anatomy))
    write_plan(plan, tmp_path / "out")
    report = dict(plan.steps[0].report)
    reference = with_top_k(path, model_type, 3, tmp_path / "out")
    unscaled = logits(reference)
    found = logits(load(tmp_path / "out"))
    if report["class"] == "C":
        assert (found - unscaled).abs().max() == 0
        return
    expected = logits(multiplied(reference, model_type, report))
    assert (expected - unscaled).abs().max() > 1e-4 * unscaled.abs().max()  # else the test could not fail
    assert (found - expected).abs().max() < 3e-6 * max(1.0, float(expected.abs().max()))


# What the router reads, and what it makes of it

ESTIMATED = [
    model_type
    for model_type in ROWS
    for family in by_model_type(model_type)
    if not (
        family.routing.special
        or family.routing.no_estimate
        or family.routing.after == "routed"
        or family.routing.fixed_top_k
        or "rescale" in family.refuses
    )
]


def module_of(tensor: str) -> str:
    return tensor.rsplit(".", 1)[0]


@pytest.mark.parametrize("model_type", ESTIMATED)
def test_the_estimate_follows_the_models_own_routing(models: Any, model_type: str) -> None:
    """The norm that the table names feeds the router, and the weights that the router gives have our moments."""
    path = models(model_type, fused=True)
    model, anatomy, stored = load(path), anatomy_of(path), read_tensors(path)
    for block in anatomy.main_blocks:
        if block.of is not None and not block.of.text:
            continue
        if block.named("expert_table"):
            continue  # a table chooses, and nothing is estimated: tests/commands/test_hash_layers.py
        assert block.router is not None
        norm = (block.of or anatomy.settings.family).norm
        norm_name = next(n for p in (norm.path, *norm.others) if (n := f"{block.layer_path}.{p}") in stored)
        normed, read, weights = seen(model, model_type, module_of(norm_name), module_of(block.router.name))
        hidden = read.reshape(-1, read.shape[-1])
        assert torch.equal(normed.reshape(hidden.shape), hidden)

        embedding = torch.randn(40, hidden.shape[1], generator=torch.Generator().manual_seed(1))
        ours = normalised(embedding.numpy(), norm.kind) * (stored[norm_name] + (norm.kind == "rms1")).numpy()
        theirs = model.get_submodule(module_of(norm_name))(embedding).detach().numpy()
        assert np.allclose(ours, theirs, atol=1e-4)

        raw = hidden @ stored[block.router.name].T
        for member in block.named("router_bias"):
            raw = raw + stored[member.name]
        bias = next((stored[m.name].flatten().numpy() for m in block.named("correction_bias")), None)
        moments = second_moments(anatomy.settings, raw.numpy(), bias)
        assert moments[1] == pytest.approx(second_moment(weights, len(hidden), anatomy), rel=1e-4)


def seen(model: torch.nn.Module, model_type: str, norm: str, router: str) -> tuple[torch.Tensor, ...]:
    """Return what a norm gives, what a router reads, and the weights that it gives its experts."""
    found: dict[str, torch.Tensor] = {}

    def weights(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        given = [*args, *kwargs.values()]
        found["weights"] = next(v for v in given if v.is_floating_point() and v.dim() == 2 and v.shape[1] == 2)

    modules = dict(model.named_modules())
    layer = re.sub(r"((?:layers|blocks)\.\d+)\..*", r"\1.", router)
    handles = [
        modules[norm].register_forward_hook(lambda m, i, out: found.update(norm=out)),
        modules[router].register_forward_pre_hook(lambda m, i: found.update(read=i[0])),
        modules[module_of(router)].register_forward_hook(lambda m, i, out: found.update(weights=out[2]))
        if model_type == "jetmoe"  # it has no module of experts that gets the weights
        else next(
            m for n, m in modules.items() if n.startswith(layer) and n.endswith(".experts")
        ).register_forward_pre_hook(weights, with_kwargs=True),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return found["norm"].detach(), found["read"].detach(), found["weights"].detach()


def second_moment(weights: torch.Tensor, tokens: int, anatomy: Anatomy) -> float:
    """Return the mean of the summed squares of the weights, in units of their sum or of the config's number."""
    if weights.dim() == 2 and anatomy.settings.renormalised:
        sums = weights.sum(-1)
        assert torch.allclose(sums, sums[0].expand_as(sums), rtol=1e-4)
        weights = weights / sums[0]
    elif not anatomy.settings.renormalised:
        weights = weights / (anatomy.settings.routed_scale_key or 1.0)
    return float((weights.double() ** 2).sum() / tokens)


# Which rows and columns are whose

# Where the up-projection does not enter linearly: (up + 1) * gate, soft caps, or no gate at all.
UP_NOT_LINEAR = {"gpt_oss", "openai_privacy_filter", "minimax_m3_vl", "inkling2", "inkling2_loop", "nemotron_h"}


# An expert of doge is one neuron.
@pytest.mark.parametrize(("model_type", "fused"), [case for case in LAYOUTS if case[0] != "doge"])
def test_neurons_stand_where_the_table_says(models: Any, tmp_path: Path, model_type: str, fused: bool) -> None:
    """Reordering an expert's neurons changes nothing; nor does doubling its up-projection and halving its down."""
    path = models(model_type, fused=fused)
    anatomy, tensors = anatomy_of(path), read_tensors(path)
    factor = 1.0 if model_type in UP_NOT_LINEAR else 2.0
    changed = 0
    for block in anatomy.main_blocks:
        if block.of is not None:
            continue
        for member in block.members:
            if member.part is None:
                continue
            tensor = tensors[member.name]
            shaped = tensor.view(block.experts, -1, tensor.shape[-1]) if member.part.rows else tensor
            edited = edit_neurons(shaped.clone(), member.part, member.stem.bias, factor)
            tensors[member.name] = edited.reshape(tensor.shape)
            changed += not torch.equal(tensors[member.name], tensor)
    assert changed
    rewrite(path, tmp_path / "out", tensors, {})
    before, after = logits(load(path)), logits(load(tmp_path / "out"))
    assert (before - after).abs().max() < 3e-6 * max(1.0, float(before.abs().max()))


def edit_neurons(tensor: torch.Tensor, part: Projection, bias: bool, factor: float) -> torch.Tensor:
    """Reverse the neurons of one projection, and multiply the up-projection by a factor, the down by its inverse."""
    if part.role == "down":
        if bias:
            return tensor
        return tensor.flip(-1 if part.order == "oi" else -2) / factor
    axis = -1 if bias or part.order == "io" else -2
    if part.role != "gate_up":
        return tensor.flip(axis) * (factor if part.role == "up" else 1.0)
    width = tensor.shape[axis]
    if part.interleaved:
        gate, up = (tensor.index_select(axis, torch.arange(start, width, 2)) for start in (0, 1))
        gate, up = gate.flip(axis), up.flip(axis) * factor
        return torch.stack([gate, up], dim=-1).flatten(-2) if axis == -1 else torch.stack([gate, up], 2).flatten(1, 2)
    gate, up = tensor.chunk(2, dim=axis)
    return torch.cat([gate.flip(axis), up.flip(axis) * factor], dim=axis)


# The table against transformers' own


def test_every_mixture_of_transformers_is_in_the_table() -> None:
    """Every type that transformers runs by code with a module of experts, its own code or another type's."""
    classes: set[str] = set()  # of files with a module of experts
    for code in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        text = code.read_text()
        if re.search(r"^class \w+(Experts|CDMoE|ParallelExperts)\(", text, re.MULTILINE):
            classes |= set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
    found = {
        model_type
        for name, mapping in vars(modeling_auto).items()
        if name.endswith("_MAPPING_NAMES")
        for model_type, named in mapping.items()
        if not classes.isdisjoint([named] if isinstance(named, str) else named)
    }
    towers = {model_type for model_type in found if model_type.endswith(("_vision", "_audio"))} | {"vitpose_backbone"}
    assert {"mixtral", "sarvam_moe", "sarvam_mla"} <= found or OLDER
    assert len(found) > 60
    assert found - towers - {model_type for family in FAMILIES for model_type in family.model_types} == set()


def test_every_entry_has_a_row_or_stands_with_the_remote_ones() -> None:
    rows = {family.name for model_type in ROWS for family in by_model_type(model_type)}
    remote = {family.name for family in REMOTE} | {"arctic", "grok1", "deepseek"}
    assert {family.name for family in FAMILIES} == rows | remote


def conversions() -> list[Any]:
    """Return (model type, conversion) for every conversion of experts that transformers knows."""
    found = []
    for model_type in [t for f in FAMILIES for t in f.model_types]:
        for step in get_checkpoint_conversion_mapping(model_type) or []:
            of_weights = isinstance(step, WeightConverter) and "scale" not in str(step.target_patterns)
            if of_weights and "experts" in str(step.target_patterns):
                found.append(pytest.param(model_type, step, id=f"{model_type}-{step.target_patterns[0]}"))
    return found


@pytest.mark.parametrize(("model_type", "step"), conversions())
def test_the_table_agrees_with_transformers_conversions(model_type: str, step: Any) -> None:
    (family,) = by_model_type(model_type)
    operations = {type(operation).__name__ for operation in step.operations}
    parts = [p for of in (family, *family.sets) for layout in of.layouts for p in layout.parts]

    def named(pattern: str) -> list[Projection]:
        path = pattern.replace("\\", "").replace("*", "#").removesuffix(".weight").lstrip(".")
        return [p for p in parts if p.path == path or p.path.endswith(f".{path}")]

    plain = [pattern for pattern in step.source_patterns if not re.search("_(scale|amax|denominator)$", pattern)]
    sources = [[p.role for p in named(pattern)] for pattern in plain]
    targets = [p for pattern in step.target_patterns for p in named(pattern)]
    assert targets
    expected = {1: {"down", "up", "gate_up"}, 2: {"gate_up"}}[len(sources)]
    assert {p.role for p in targets} <= expected
    if len(sources) == 2:  # gate first, then up
        assert set(sources[0]) == {"gate"}
        assert set(sources[1]) == {"up"}
    else:
        assert set(sources[0]) == {p.role for p in targets}
    if "Interleave" in operations:
        assert all(p.interleaved for p in named(step.source_patterns[0]))
        assert not any(p.interleaved for p in targets)
    if "Transpose" in operations:
        assert {p.order for p in named(step.source_patterns[0])} >= {"io"}
