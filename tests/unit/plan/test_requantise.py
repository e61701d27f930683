"""Weights stored again in the form that they came in, and plain ones quantised: against other libraries' own code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesurgery import open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import Scale
from moesurgery.expr.nodes import Expr, Reader, Unary
from moesurgery.plan.dequantise import dequantised
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.quantised_form import MAGNITUDES, Form, quantise
from moesurgery.plan.requantise import opened, written_back
from moesurgery.recipe.registry import apply
from tests.quantise import FORMS, bits_at, make_mxfp4, near_one, rewrite, words
from tests.tiny import read_tensors, same_bits
from tests.unit.families.test_quantised import forms, plain_model  # noqa: F401

KNOWN = [name for name, form in FORMS.items() if form.dequantised]
BASE = "model.layers.1.mlp.experts.3.down_proj"


@dataclass(frozen=True)
class Recomputed(Unary):
    """The same values, which nothing but their bits tells from an edit."""

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        return self.of.evaluate(start, stop, reader)


def values(expr: Expr, step: int | None = None) -> torch.Tensor:
    reader, expr = FileReader(), pickle.loads(pickle.dumps(expr))
    size = (step or expr.numel) * expr.chunk_multiple
    parts = [expr.evaluate(at, min(at + size, expr.numel), reader).clone() for at in range(0, expr.numel, size)]
    reader.close()
    return torch.cat(parts).view(expr.shape)


def edited(path: Path, edit: Callable[[Expr], Expr], only: str = ".experts.") -> tuple[Plan, Plan]:
    """Return the plan of a checkpoint, and the same with its experts edited and written back."""
    plan = plan_of(open_checkpoint(path))
    before = opened(plan)
    tensors = {name: edit(expr) if only in name else expr for name, expr in before.tensors.items()}
    return plan, written_back(before.edited(Step("edit", {}, ""), tensors=tensors), before)


def changed(plan: Plan, back: Plan) -> Iterator[str]:
    assert back.tensors.keys() == plan.tensors.keys()
    for name, expr in plan.tensors.items():
        new = back.tensors[name]
        assert (new.dtype, new.shape) == (expr.dtype, expr.shape), name
        if new is not expr:
            yield name


# The same bits again


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("step", [None, 1])
def test_what_is_decoded_is_encoded_to_the_same_bits(forms: Any, name: str, step: int | None) -> None:  # noqa: F811
    plan, back = edited(forms(name), Recomputed)
    computed = [
        n for n in changed(plan, back) if not n.endswith(("shape", "input_scale", "input_global_scale", "g_idx"))
    ]
    assert computed
    for tensor in computed:
        assert same_bits(values(back.tensors[tensor], step), values(plan.tensors[tensor])), tensor


def test_stacked_mxfp4_of_gpt_oss_keeps_its_bits(models: Any, tmp_path: Path) -> None:
    make_mxfp4(models("gpt_oss"), tmp_path / "m")
    plan, back = edited(tmp_path / "m", Recomputed, "experts")
    computed = list(changed(plan, back))
    assert computed
    for tensor in computed:
        assert same_bits(values(back.tensors[tensor]), values(plan.tensors[tensor])), tensor


@pytest.mark.parametrize("name", KNOWN)
def test_an_edit_of_one_expert_leaves_all_others_their_bytes(forms: Any, name: str) -> None:  # noqa: F811
    plan, back = edited(forms(name), lambda expr: Scale(expr, 1.3), ".experts.3.")
    assert all(".experts.3." in tensor for tensor in changed(plan, back))
    assert any(".experts.3." in tensor for tensor in changed(plan, back))


# Half a step


def gaps(form: Form, codes: torch.Tensor) -> torch.Tensor:
    """The distance from each code to its farther neighbour, in scales."""
    if form.numbers == "int":
        return torch.ones_like(codes, dtype=torch.float32)
    if form.numbers == "e2m1":
        numbers = torch.tensor(MAGNITUDES)
    else:
        numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    place = torch.searchsorted(numbers, form.numbers_of(codes, 0.0).abs())
    above = numbers[(place + 1).clamp(max=len(numbers) - 1)] - numbers[place]
    return torch.maximum(above, numbers[place] - numbers[(place - 1).clamp(min=0)])


ALL = [
    Form("e4m3", 8, 8, 16, "F32"),
    Form("e4m3", 8, 1, 64, "BF16"),
    Form("e4m3", 8, 1, 32, "U8"),
    Form("e2m1", 4, 1, 32, "U8"),
    Form("e2m1", 4, 1, 16, "F8_E4M3", overall="over"),
    Form("int", 4, 1, 32, "BF16"),
    Form("int", 4, 1, 16, "F16", zeros=True),
    Form("int", 4, 1, 16, "F16", zeros=True, less=1),
    Form("int", 8, 1, 64, "F32"),
]


@pytest.mark.parametrize("form", ALL, ids=str)
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_no_number_moves_by_more_than_half_a_step(form: Form, shift: float) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(64, 128, generator=generator) * torch.rand(64, 1, generator=generator) + shift
    weight[3] = 0
    overall = torch.tensor([448 * 6 / float(weight.abs().max())]) if form.overall else None
    found = quantise(weight.clone(), form, None, overall)
    scale = found.scale.float() if found.scale.dtype != torch.uint8 else torch.exp2(found.scale.float() - 127)
    scale = scale if overall is None else scale / overall
    wide = scale.repeat_interleave(form.tall, 0).repeat_interleave(form.wide, 1)
    zero: Any = float(form.middle)
    if found.zero is not None:
        zero = found.zero.float().repeat_interleave(form.wide, 1) + form.less
    read = form.numbers_of(found.codes, zero) * wide
    step = gaps(form, found.codes) * wide
    assert ((read - weight).abs() <= step / 2 * (1 + 1e-4)).all()
    assert (read[3] == 0).all()


@pytest.mark.parametrize("name", KNOWN)
def test_an_edited_weight_is_read_as_what_it_was_computed_to_be(forms: Any, name: str) -> None:  # noqa: F811
    _, back = edited(forms(name), lambda expr: Scale(expr, 0.83))
    exact = opened(plan_of(open_checkpoint(forms(name)))).tensors[f"{BASE}.weight"]
    read, _ = dequantised(back)
    wanted, found = values(exact) * 0.83, values(read[f"{BASE}.weight"])
    # Every code is as likely as any other: half a step is much of most numbers where there are eight steps.
    assert float((found - wanted).norm() / wanted.norm()) < (0.2 if "4" in name or name in ("awq", "gptq") else 0.05)


def test_a_number_that_is_not_finite_is_refused(forms: Any, tmp_path: Path) -> None:  # noqa: F811
    _, back = edited(forms("fp8-block"), lambda expr: Scale(expr, float("inf")))
    with pytest.raises(RefusedError, match="not finite"):
        write_plan(back, tmp_path / "out")


# Other libraries' own code


def scheme(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


CT: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8}),
    "nvfp4-compressed-tensors": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}


def decompressed(name: str, stored: dict[str, torch.Tensor], base: str) -> torch.Tensor:
    kind, weights = CT[name]
    state = {n[len(base) + 1 :]: t for n, t in stored.items() if n.startswith(f"{base}.")}
    state["weight_scale"] = (
        state["weight_scale"].float() if name != "nvfp4-compressed-tensors" else state["weight_scale"]
    )
    found: torch.Tensor = BaseCompressor.get_value_from_registry(kind).decompress(state, scheme(**weights))["weight"]
    return found.float()


@pytest.mark.parametrize("name", CT)
@pytest.mark.parametrize("again", [False, True])
def test_values_are_those_of_compressed_tensors(forms: Any, tmp_path: Path, name: str, again: bool) -> None:  # noqa: F811
    path = forms(name)
    if again:
        _, back = edited(path, lambda expr: Scale(expr, 1.3))
        write_plan(back, path := tmp_path / "again")
    ours = values(dequantised(plan_of(open_checkpoint(path)))[0][f"{BASE}.weight"])
    theirs = decompressed(name, read_tensors(path), BASE)
    assert torch.allclose(ours, theirs, rtol=1e-2 if "nvfp4" in name else 1e-6, atol=0)  # theirs are in bf16 or f16


def with_parts(models: Any, target: Path, parts: Callable[[int, int], dict[str, torch.Tensor]], settings: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(plain_model(models)).items():
        if ".experts." in name and name.endswith("_proj.weight"):
            base = name.removesuffix(".weight")
            tensors |= {base + suffix: part for suffix, part in parts(*tensor.shape).items()}
        else:
            tensors[name] = tensor
    rewrite(plain_model(models), target, tensors, {"quantization_config": settings})


@pytest.mark.parametrize("order", [False, True])
def test_zero_points_of_compressed_tensors(models: Any, tmp_path: Path, order: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}

    def parts(out: int, into: int) -> dict[str, torch.Tensor]:
        made = {
            ".weight_packed": words(generator, out, into // 8),
            ".weight_scale": near_one(generator, out, into // 8, dtype=torch.bfloat16),
            ".weight_zero_point": words(generator, out // 8, into // 8),
            ".weight_shape": torch.tensor([out, into]),
        }
        if order:
            made[".weight_g_idx"] = (torch.randperm(into, generator=generator) // 8).int()
        return made

    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    settings |= {"config_groups": {"group_0": {"weights": args}}}
    with_parts(models, tmp_path / "m", parts, settings)
    ours = values(opened(plan_of(open_checkpoint(tmp_path / "m"))).tensors[f"{BASE}.weight"])
    stored = {
        n.removeprefix(f"{BASE}."): t for n, t in read_tensors(tmp_path / "m").items() if n.startswith(f"{BASE}.")
    }
    for o in range(3):
        for i in range(ours.shape[1]):
            group = int(stored["weight_g_idx"][i]) if order else i // 8
            code = bits_at(int(stored["weight_packed"][o, i // 8]), 4, i % 8)
            zero = bits_at(int(stored["weight_zero_point"][o // 8, group]), 4, o % 8)
            assert float(ours[o, i]) == (code - zero) * float(stored["weight_scale"][o, group])
    if not order:  # theirs takes an order at run time only
        state = {**stored, "weight_scale": stored["weight_scale"].float()}
        theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme(**args))["weight"]
        assert torch.allclose(ours, theirs.float(), rtol=1e-6, atol=0)
    plan, back = edited(tmp_path / "m", Recomputed)
    for tensor in changed(plan, back):
        assert same_bits(values(back.tensors[tensor]), values(plan.tensors[tensor])), tensor


def test_an_order_of_inputs_of_gptq(models: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)

    def parts(out: int, into: int) -> dict[str, torch.Tensor]:
        made = FORMS["gptq"].make(out, into, generator)
        made[".g_idx"] = made[".g_idx"][torch.randperm(into, generator=generator)]
        return made

    with_parts(models, tmp_path / "m", parts, {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True})
    stored = {n.removeprefix(BASE): t for n, t in read_tensors(tmp_path / "m").items() if n.startswith(f"{BASE}.")}
    ours = values(opened(plan_of(open_checkpoint(tmp_path / "m"))).tensors[f"{BASE}.weight"])
    assert torch.equal(ours, FORMS["gptq"].value(stored, *ours.shape))
    plan, back = edited(tmp_path / "m", Recomputed)
    for tensor in changed(plan, back):
        assert same_bits(values(back.tensors[tensor]), values(plan.tensors[tensor])), tensor


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        (Form("int", 4, 1, 32, "F32"), {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        (Form("e4m3", 8, 1, 128, "F32"), {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (
            Form("e2m1", 4, 1, 32, "U8"),
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": torch.uint8,
                "zp_dtype": torch.uint8,
            },
        ),
    ],
    ids=str,
)
def test_new_scales_and_codes_are_those_of_compressed_tensors(form: Form, weights: dict[str, Any]) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    args = QuantizationArgs(**weights, symmetric=True)
    blocks = weight.view(16, -1, form.wide)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    theirs = quantize(weight, scale, zero, args).float()
    found = quantise(weight.clone(), form)
    ours = found.scale.float() if found.scale.dtype != torch.uint8 else torch.exp2(found.scale.float() - 127)
    assert torch.equal(ours, scale)
    assert torch.equal(form.numbers_of(found.codes, float(form.middle)), theirs)


def test_stacked_mxfp4_is_read_by_transformers(models: Any, tmp_path: Path) -> None:
    source = models("gpt_oss", dtype="bfloat16", hidden_size=64, intermediate_size=32)
    write_plan(apply(plan_of(open_checkpoint(source)), "convert", quantize="mxfp4"), tmp_path / "q")
    plain, stored = read_tensors(source), read_tensors(tmp_path / "q")
    name = "model.layers.1.mlp.experts.down_proj"
    theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert same_bits(
        values(dequantised(plan_of(open_checkpoint(tmp_path / "q")), "BF16")[0][name]), theirs.contiguous()
    )
    assert float((theirs.float() - plain[name].float()).norm() / plain[name].float().norm()) < 0.13


# Second scales


def test_gate_and_up_keep_one_second_scale(forms: Any) -> None:  # noqa: F811
    """Engines join them, and take one of the two."""
    _, back = edited(forms("nvfp4-compressed-tensors"), lambda expr: Scale(expr, 5000.0), ".experts.3.gate_proj")
    base = BASE.removesuffix("down_proj")
    gate, up = (values(back.tensors[f"{base}{part}_proj.weight_global_scale"]) for part in ("gate", "up"))
    before = opened(plan_of(open_checkpoint(forms("nvfp4-compressed-tensors"))))
    largest = max(5000 * float(values(before.tensors[f"{base}gate_proj.weight"]).abs().max()), 0.0)
    assert torch.equal(gate, up)
    assert float(gate) == pytest.approx(448 * 6 / largest, rel=1e-5)


def test_none_gives_plain_weights(forms: Any) -> None:  # noqa: F811
    plan = plan_of(open_checkpoint(forms("int4")))
    plain = apply(plan, "merge-experts", groups=[[0, 1]], requantize="none")
    assert {expr.dtype for expr in plain.tensors.values()} <= {"BF16", "F32"}
    assert "quantization_config" not in plain.config
    kept = apply(plan, "merge-experts", groups=[[0, 1]])
    assert kept.config["quantization_config"] == plan.config["quantization_config"]
    assert replace(kept, steps=()).nbytes < plain.nbytes
