"""Quantised weights as plain ones, against plain loops over their elements and transformers' own code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesurgery import open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.plan.dequantise import dequantised
from moesurgery.plan.plan import Step
from tests.quantise import FORMS, fp8_blocks, fp8_value, make_mxfp4, rewrite, values_of
from tests.tiny import read_tensors, same_bits
from tests.unit.families.test_quantised import forms, plain_model  # noqa: F401


def evaluated(expr: Expr, step: int | None = None) -> torch.Tensor:
    """Return the values of an expression, read in pieces of `step` granules."""
    reader, expr = FileReader(), pickle.loads(pickle.dumps(expr))
    size = (step or expr.numel) * expr.chunk_multiple
    parts = [expr.evaluate(at, min(at + size, expr.numel), reader).clone() for at in range(0, expr.numel, size)]
    reader.close()
    return torch.cat(parts).view(expr.shape)


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if form.dequantised])
def test_values_are_those_of_a_loop(models: Any, forms: Any, name: str) -> None:  # noqa: F811
    found, renamed = dequantised(plan_of(open_checkpoint(forms(name))))
    expected = values_of(forms(name), name)
    assert found.keys() == read_tensors(plain_model(models)).keys()
    assert set(renamed.values()) <= expected.keys()
    assert " at 0x" not in repr(found)  # it goes into the plan's digest, which other processes must find as well
    for weight, value in expected.items():
        assert found[weight].dtype == "F32"
        tolerance = 1e-6 if name.startswith("nvfp4") else 0.0  # the loop multiplies three numbers as doubles
        assert torch.allclose(evaluated(found[weight], 1), value.float(), rtol=tolerance, atol=0), weight


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if not form.dequantised])
def test_other_forms_are_refused_by_name(forms: Any, name: str) -> None:  # noqa: F811
    with pytest.raises(RefusedError, match=FORMS[name].method):
        dequantised(plan_of(open_checkpoint(forms(name))))


@pytest.mark.parametrize("name", ["fp8-block", "fp8-e8m0", "mxfp8", "fp4"])
def test_values_are_those_of_transformers(forms: Any, name: str) -> None:  # noqa: F811
    found, _ = dequantised(plan_of(open_checkpoint(forms(name))), "BF16")
    stored = read_tensors(forms(name))
    base = "model.layers.1.mlp.experts.3.down_proj"
    theirs = Fp8Dequantize(None)._dequantize_one(
        stored[f"{base}.weight"], stored[base + FORMS[name].scale], output_dtype=torch.bfloat16
    )
    assert same_bits(evaluated(found[f"{base}.weight"], 1), theirs)


def test_mxfp4_is_that_of_transformers(models: Any, tmp_path: Path) -> None:
    make_mxfp4(models("gpt_oss"), tmp_path / "m")
    found, renamed = dequantised(plan_of(open_checkpoint(tmp_path / "m")), "BF16")
    stored = read_tensors(tmp_path / "m")
    assert found.keys() == read_tensors(models("gpt_oss")).keys()
    for name, plain in renamed.items():
        theirs = convert_moe_packed_tensors(stored[name], stored[name.replace("_blocks", "_scales")])
        assert same_bits(evaluated(found[plain], 1), theirs.contiguous())


@pytest.mark.parametrize("shape", [(40, 24), (16, 50), (3, 40, 24), (2, 7, 33), (1, 5, 5)])
@pytest.mark.parametrize("step", [None, 1, 3])
def test_blocks_that_do_not_divide_the_matrix(models: Any, tmp_path: Path, shape: Any, step: int | None) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    pairs = [fp8_blocks(matrix) for matrix in weight.view(-1, *shape[-2:])]
    expected = torch.stack([fp8_value(*pair) for pair in pairs]).view(shape)
    stored = {
        "x.weight": torch.stack([w for w, _ in pairs]).view(shape),
        "x.weight_scale_inv": torch.stack([s for _, s in pairs]).view(*shape[:-2], *pairs[0][1].shape),
    }
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    rewrite(models("qwen3_moe"), tmp_path / "m", stored, {"quantization_config": quantisation})
    found, _ = dequantised(plan_of(open_checkpoint(tmp_path / "m")))
    assert torch.equal(evaluated(found["x.weight"], step), expected)


@pytest.mark.parametrize(("scale", "rows"), [((3,), 1), ((3, 1), 1), ((3, 1, 1), 1), ((3, 8), 8), ((3, 8, 1), 8)])
def test_scales_of_stacked_experts(models: Any, tmp_path: Path, scale: tuple[int, ...], rows: int) -> None:
    """One scale per expert, or one per expert and output, in every shape that is about."""
    weight = torch.randn(3, 8, 16).to(torch.float8_e4m3fn)
    scales = torch.rand(*scale) + 0.5
    rewrite(
        models("qwen3_moe"), tmp_path / "m", {"experts.down_proj": weight, "experts.down_proj_scale_inv": scales}, {}
    )
    found, _ = dequantised(plan_of(open_checkpoint(tmp_path / "m")))
    assert torch.equal(evaluated(found["experts.down_proj"]), weight.float() * scales.view(3, rows, 1))


def test_what_does_not_fit_is_refused(models: Any, tmp_path: Path) -> None:
    stored = {"x.weight": torch.zeros(10, 16).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(3, 2)}
    rewrite(models("qwen3_moe"), tmp_path / "m", stored, {})
    with pytest.raises(RefusedError, match=r"scales \[3, 2\] for \[10, 16\]"):
        dequantised(plan_of(open_checkpoint(tmp_path / "m")))


def test_written_values_are_rounded_once(forms: Any, tmp_path: Path) -> None:  # noqa: F811
    plan = plan_of(open_checkpoint(forms("fp8-block")))
    tensors, _ = dequantised(plan, "BF16")
    write_plan(plan.edited(Step("test", {}, ""), tensors=tensors), tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    for weight, value in values_of(forms("fp8-block"), "fp8-block").items():
        assert same_bits(written[weight], value.to(torch.bfloat16))
