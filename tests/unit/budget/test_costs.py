"""The costs of a shape are those of the plan that has it; what fits is what a search of all shapes finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.budget.budget import budget_of
from moesurgery.budget.candidates import AXES, Choices, fitting_shapes
from moesurgery.budget.costs import ShapeCosts
from moesurgery.budget.limits import Limits, parse_parameters, parse_speed, parse_tokens
from moesurgery.budget.shape import MixtureShape, narrower_forms
from moesurgery.count.accelerators import ACCELERATORS
from moesurgery.count.kv_cache import kv_bytes, kv_layers
from moesurgery.count.params import count_params
from moesurgery.count.roofline import roofline
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.plan.plan import Plan
from moesurgery.plan.written_forms import WRITTEN_FORMS
from tests.quantise import FORMS, make_form

Models = Callable[..., Path]
CONTEXT = 1000


def costs_of(plan: Plan, header_bytes: int = 0) -> ShapeCosts:
    card = ACCELERATORS["h100"]
    return ShapeCosts(plan.anatomy, plan.tensors, context=CONTEXT, batch=1, accelerator=card, header_bytes=header_bytes)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_costs_are_those_of_the_edited_plan(models: Models, family: str, fused: bool) -> None:
    plan = plan_of(open_checkpoint(models(family, fused=fused or family == "gpt_oss", dtype="float32")))
    costs = costs_of(plan)
    own = costs.shape
    shape = MixtureShape(own.experts // 2, own.width // 2, max(1, own.top_k // 2), "bfloat16")
    edited = apply(plan, "rescale", top_k=shape.top_k, scale="none")
    edited = apply(edited, "slim-experts", width=shape.width, by="weights")
    edited = apply(edited, "drop-experts", keep=shape.experts, by="random")
    edited = apply(edited, "convert", dtype="bfloat16")
    cost = costs.of(shape)
    assert cost.weight_bytes == edited.nbytes
    counts = count_params(edited.anatomy, edited.tensors)
    assert counts.active is not None
    assert cost.active == pytest.approx(counts.active["all"], abs=2)
    layers = kv_layers(edited.anatomy, edited.tensors)
    assert layers is not None
    assert cost.kv_bytes == kv_bytes(layers, CONTEXT)


@pytest.mark.parametrize(
    ("family", "form", "fused"),
    [
        *(("qwen3_moe", form, number % 2 == 0) for number, form in enumerate(WRITTEN_FORMS)),
        *(("deepseek_v3", "int4", True), ("gpt_oss", "mxfp4", True), ("mixtral", "fp8", False)),
    ],
)
def test_costs_of_quantised_experts_are_those_of_the_edited_plan(
    models: Models, tmp_path: Path, family: str, form: str, fused: bool
) -> None:
    """To the byte; and headers are no larger than was thought."""
    width = {"qwen3_moe": "moe_intermediate_size", "deepseek_v3": "moe_intermediate_size"}.get(
        family, "intermediate_size"
    )
    dtype = "float32" if family == "mixtral" else "bfloat16"
    checkpoint = open_checkpoint(models(family, fused=fused, dtype=dtype, hidden_size=64, **{width: 64}))
    plan = plan_of(checkpoint)
    assert narrower_forms(plan.anatomy, plan.tensors, [form]) == [form]
    costs = costs_of(plan, sum(header.data_start + 4096 for header in checkpoint.headers))
    shape = MixtureShape(costs.shape.experts // 2, 32, costs.shape.top_k, form)
    edited = apply(plan, "drop-experts", keep=shape.experts, by="random")
    edited = apply(edited, "slim-experts", width=shape.width, by="weights")
    edited = apply(edited, "convert", quantize=form, **({"dtype": "bfloat16"} if dtype == "float32" else {}))
    assert sum(costs.tensor_bytes(shape)) == edited.nbytes
    itself = costs_of(edited)
    assert itself.of(itself.shape).weight_bytes == edited.nbytes
    speed = itself.of(itself.shape).tokens_per_second  # in that of another shape, routers are as large as before
    assert costs.of(shape).tokens_per_second == pytest.approx(speed, rel=0.1)
    write_plan(edited, tmp_path / "out")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert edited.nbytes < size <= costs.of(shape).weight_bytes


@pytest.mark.parametrize(
    ("family", "form"), [("qwen3_moe", "int4"), ("gpt_oss", "fp8"), ("granitemoe", "fp8"), ("longcat_flash", "fp8")]
)
def test_forms_that_experts_cannot_have(models: Models, family: str, form: str) -> None:
    """Hidden sizes that groups do not divide; experts that no layout has one by one; a family that is not converted."""
    plan = plan_of(open_checkpoint(models(family, dtype="bfloat16", hidden_size=48)))
    assert narrower_forms(plan.anatomy, plan.tensors, [form]) == []
    with pytest.raises(RefusedError):
        apply(plan, "convert", quantize=form)


@pytest.mark.parametrize("form", [n for n, form in FORMS.items() if form.dequantised and n not in ("gptq", "awq")])
def test_costs_of_a_quantised_model_are_those_of_the_edited_plan(models: Models, tmp_path: Path, form: str) -> None:
    make_form(models("qwen3_moe", moe_intermediate_size=64), tmp_path / "model", form)
    plan = plan_of(open_checkpoint(tmp_path / "model"))
    costs = costs_of(plan)
    edited = apply(plan, "slim-experts", width=32, by="weights")
    edited = apply(edited, "drop-experts", keep=4, by="random")
    assert costs.of(MixtureShape(4, 32, costs.shape.top_k)).weight_bytes == edited.nbytes


def test_the_speed_is_that_of_the_roofline(models: Models) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    costs, card = costs_of(plan), ACCELERATORS["h100"]
    found = roofline(plan.anatomy, plan.tensors, count_params(plan.anatomy, plan.tensors), CONTEXT, card)
    assert found is not None
    assert found.kv_bytes_per_token is not None
    read = found.weight_bytes[1] + found.kv_bytes_per_token * CONTEXT
    assert costs.of(costs.shape).tokens_per_second == pytest.approx(card.terabytes_per_second * 1e12 / read)


def test_what_fits_is_what_a_search_of_all_shapes_finds(models: Models) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    costs = costs_of(plan)
    own = costs.shape
    whole = costs.of(own)
    choice = Choices(range(1, own.experts + 1), range(4, own.width + 1, 4), [1, 2, 3])
    limits = Limits(int(0.6 * whole.memory))
    found = {shape for shape, _ in fitting_shapes(costs, choice, limits, whole.active)}
    every = [MixtureShape(*numbers) for numbers in itertools.product(choice.experts, choice.width, choice.top_k)]
    fits = [
        s
        for s in every
        if s.experts >= s.top_k and costs.of(s).memory <= limits.memory and costs.of(s).active <= whole.active
    ]

    def contained(shape: MixtureShape) -> bool:
        def in_it(other: MixtureShape) -> bool:
            top_k = other.top_k == shape.top_k or shape.top_k < other.top_k <= own.top_k
            return top_k and other.experts >= shape.experts and other.width >= shape.width and other != shape

        return any(in_it(other) for other in fits)

    assert found == {shape for shape in fits if not contained(shape)}
    assert len(found) > 3


def test_nothing_fits_and_what_would(models: Models) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    budget = budget_of(plan.anatomy, plan.tensors, Limits(1000), context=16, batch=1, axes=AXES)
    with pytest.raises(RefusedError, match="no shape of this model fits: the smallest takes") as refused:
        budget.check()
    asked = str(refused.value.hint).split()[1].rstrip(",")
    assert asked.endswith("MB")
    enough = Limits(int(float(asked[:-2]) * 1e6))
    budget_of(plan.anatomy, plan.tensors, enough, context=16, batch=1, axes=AXES).check()
    with pytest.raises(RecipeError, match="--speed"):
        budget_of(plan.anatomy, plan.tensors, Limits(1000, speed=1.0), context=16, batch=1, axes=AXES)


def test_numbers_with_units() -> None:
    assert parse_tokens("32k") == 32 * 1024
    assert parse_parameters("3B") == 3_000_000_000
    assert parse_speed("40tok/s") == parse_speed("40") == 40
    for wrong in ("", "many", "0", "3x"):
        with pytest.raises(RecipeError):
            parse_parameters(wrong)
