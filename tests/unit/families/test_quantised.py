"""Quantised checkpoints: logical counts, and factors on scales where those are exact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, count_params, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Copy
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.headers import header_checkpoint
from tests.quantise import (
    FORMS,
    fp8_blocks,
    fp8_value,
    make_form,
    make_fp8,
    make_mxfp4,
    mxfp4_value,
    rewrite,
    values_of,
)
from tests.tiny import read_config, read_tensors, same_bits

Cli = Callable[..., Result]


def counts(path: Path) -> Any:
    checkpoint = open_checkpoint(path)
    return count_params(plan_of(checkpoint).anatomy, checkpoint.tensors)


@pytest.fixture
def fp8(models: Any, tmp_path: Path) -> Path:
    make_fp8(models("deepseek_v3"), tmp_path / "fp8")
    return tmp_path / "fp8"


@pytest.fixture
def mxfp4(models: Any, tmp_path: Path) -> Path:
    make_mxfp4(models("gpt_oss"), tmp_path / "mxfp4")
    return tmp_path / "mxfp4"


@pytest.mark.parametrize(("form", "model_type"), [("fp8", "deepseek_v3"), ("mxfp4", "gpt_oss")])
def test_logical_counts(request: pytest.FixtureRequest, models: Any, form: str, model_type: str) -> None:
    plain, quantised = counts(models(model_type)), counts(request.getfixturevalue(form))
    assert quantised.total == plain.total
    assert quantised.active == plain.active
    assert quantised.components == plain.components
    assert quantised.quantisation == form
    assert quantised.not_counted["quantisation"] > 0
    assert quantised.stored_bytes < plain.stored_bytes / 2


def test_fp8_takes_the_factor_in_the_config(fp8: Path, tmp_path: Path) -> None:
    plan = apply(plan_of(open_checkpoint(fp8)), "rescale", top_k=4, scale="norm")
    assert plan.steps[0].report["where"] == "config"
    write_plan(plan, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (fp8 / "model.safetensors").read_bytes()


def test_fp8_takes_the_factor_in_its_scales(fp8: Path, tmp_path: Path) -> None:
    write_plan(apply(plan_of(open_checkpoint(fp8)), "rescale", top_k=4, scale="norm", where="scales"), tmp_path / "out")
    before, after = read_tensors(fp8), read_tensors(tmp_path / "out")
    factor = math.sqrt(2)
    changed = 0
    for name, tensor in before.items():
        if ".mlp.experts." in name and name.endswith("down_proj.weight_scale_inv"):
            assert same_bits(after[name], tensor * factor)
            weight = name.removesuffix("_scale_inv")
            expected = fp8_value(before[weight], tensor) * factor
            assert torch.allclose(fp8_value(after[weight], after[name]), expected, rtol=1e-6)
            changed += 1
        else:
            assert same_bits(after[name], tensor), name
    assert changed == 8


def test_fp8_weights_are_multiplied_only_on_request(fp8: Path) -> None:
    plan = plan_of(open_checkpoint(fp8))
    for where, ending in (("scales", "down_proj.weight_scale_inv"), ("weights", "down_proj")):
        edited = apply(plan, "rescale", top_k=4, scale=1.1, where=where)
        changed = {n for n, expr in edited.tensors.items() if expr != plan.tensors[n]}
        assert changed == {n for n in plan.tensors if ".mlp.experts." in n and ending in n}


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 8.0])
def test_mxfp4_takes_powers_of_two_exactly(mxfp4: Path, tmp_path: Path, factor: float) -> None:
    write_plan(apply(plan_of(open_checkpoint(mxfp4)), "rescale", top_k=4, scale=factor), tmp_path / "out")
    before, after = read_tensors(mxfp4), read_tensors(tmp_path / "out")
    changed = set()
    for name, tensor in before.items():
        if name.endswith("down_proj_scales"):
            blocks = name.replace("_scales", "_blocks")
            assert torch.equal(mxfp4_value(after[blocks], after[name]), mxfp4_value(before[blocks], tensor) * factor)
            changed.add(name)
        elif name.endswith("down_proj_bias"):
            assert same_bits(after[name], tensor * factor)
            changed.add(name)
        else:
            assert same_bits(after[name], tensor), name
    assert len(changed) == 4


def test_mxfp4_reference_agrees_with_transformers(mxfp4: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = read_tensors(mxfp4)
    name = "model.layers.0.mlp.experts.down_proj"
    ours = mxfp4_value(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).flatten(-2)
    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(ours.transpose(1, 2), theirs) or torch.equal(ours, theirs)


def test_mxfp4_refuses_other_factors_and_names_the_way_out(mxfp4: Path, cli: Cli, tmp_path: Path) -> None:
    result = cli("rescale", mxfp4, "--top-k", 4, "--where", "scales", "-o", tmp_path / "out")
    assert result.code == 2
    assert "powers of two" in result.err
    assert "--scale none or --scale 1" in result.err
    assert not (tmp_path / "out").exists()
    assert cli("rescale", mxfp4, "--top-k", 4, "--scale", "none", "-o", tmp_path / "out").code == 0
    again = cli("rescale", mxfp4, "--top-k", 4, "-o", tmp_path / "again")
    assert again.code == 0
    assert "quantised again, each number to the nearest step" in again.out
    before, after = read_tensors(mxfp4), read_tensors(tmp_path / "again")
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert all("experts.down_proj" in name for name in changed)  # a scale stays where the new numbers fit it
    assert any(name.endswith("down_proj_blocks") for name in changed)


@pytest.mark.parametrize(("factor", "noted"), [(0.5, False), (0.7, True)])
def test_scales_that_are_powers_of_two(fp8: Path, cli: Cli, tmp_path: Path, factor: float, noted: bool) -> None:
    """DeepSeek-V3.1 stores float32 scales that are powers of two, and says so."""
    config = read_config(fp8)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (fp8 / "config.json").write_text(json.dumps(config))
    done = cli("rescale", fp8, "--top-k", 4, "--scale", factor, "--where", "scales", "-o", tmp_path / "out")
    assert done.code == 0
    assert "F32 rounded once, by at most 2^-24" in done.out
    assert ("ue8m0" in done.out) == noted


# Every form


@pytest.fixture(scope="session")
def forms(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a tiny model whose experts are in one quantised form."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            make_form(plain_model(models), made[name], name)
        return made[name]

    return get


def plain_model(models: Any) -> Path:
    path: Path = models("qwen3_moe", moe_intermediate_size=32, num_hidden_layers=2, num_experts=4)
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_counts_its_weights(models: Any, forms: Any, name: str) -> None:
    plain, quantised = counts(plain_model(models)), counts(forms(name))
    assert (quantised.total, quantised.active) == (plain.total, plain.active)
    assert quantised.components == plain.components
    assert quantised.unrecognised == []
    assert quantised.quantisation == FORMS[name].method


@pytest.mark.parametrize(
    "shapes",
    [
        {"qweight": ("I32", [12, 24]), "scales": ("F16", [4, 24]), "g_idx": ("I32", [128])},  # GPTQ, 3 bits
        {"qweight": ("I32", [32, 24]), "scales": ("F16", [4, 24]), "g_idx": ("I32", [128])},  # GPTQ, 8 bits
        {"qweight": ("I32", [128, 3]), "scales": ("F16", [4, 24]), "qzeros": ("I32", [4, 3])},  # AWQ, 4 bits
        {"weight": ("U8", [24, 64]), "weight_scale": ("U8", [24, 4])},  # MXFP4 of Quark and ModelOpt
        {"weight_packed": ("U8", [24, 64]), "weight_scale": ("U8", [24, 4])},  # MXFP4 of compressed-tensors
        {"weight": ("F8_E4M3", [24, 128]), "qscale_weight": ("F32", []), "qscale_act": ("F32", [])},  # Mistral's FP8
    ],
)
def test_counts_do_not_depend_on_the_bits_that_the_config_names(tmp_path: Path, shapes: Any) -> None:
    named = {f"model.layers.0.self_attn.q_proj.{suffix}": found for suffix, found in shapes.items()}
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    header_checkpoint(tmp_path / "m", config, named, sparse=True)
    assert counts(tmp_path / "m").total == 24 * 128


@pytest.mark.parametrize(("columns", "scales"), [(16, 4), (32, 4), (16, 1)])
def test_layers_of_different_bits(tmp_path: Path, columns: int, scales: int) -> None:
    """Attention in 8 bits, experts in 4: which of them a tensor has is told by its scales, or it is not dequantised."""
    groups = {n: {"weights": {"num_bits": bits, "group_size": 32}} for n, bits in (("a", 8), ("b", 4))}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    base = "model.layers.0.self_attn.q_proj.weight"
    named: dict[str, Any] = {f"{base}_packed": ("I32", [24, columns]), f"{base}_scale": ("BF16", [24, scales])}
    header_checkpoint(tmp_path / "m", {"model_type": "mixtral", **config}, named, sparse=True)
    plan = plan_of(open_checkpoint(tmp_path / "m"))
    if scales == 1:
        with pytest.raises(RefusedError, match="bits that its shape does not tell"):
            apply(plan, "convert", dequantize=True)
        return
    assert counts(tmp_path / "m").total == 24 * 128
    assert apply(plan, "convert", dequantize=True).tensors[base].shape == (24, 128)


def test_fused_experts_in_fp8(models: Any, tmp_path: Path) -> None:
    """As transformers 5 writes them: [E, out, in], and scales [E, out / block, in / block] under `_scale_inv`."""
    source = models("qwen3_moe", fused=True)
    tensors, values = {}, {}
    for name, tensor in read_tensors(source).items():
        tensors[name] = tensor
        if ".experts." in name:
            pairs = [fp8_blocks(matrix) for matrix in tensor]
            tensors[name], tensors[f"{name}_scale_inv"] = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            values[name] = torch.stack([fp8_value(*pair) for pair in pairs])
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    rewrite(source, tmp_path / "m", tensors, {"quantization_config": quantisation})
    assert counts(tmp_path / "m").total == counts(source).total
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "rescale", top_k=3, scale=0.7)
    plan = apply(plan, "drop-experts", experts=[0, 5])
    write_plan(apply(plan, "convert", dequantize=True, dtype="f32"), tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    for name, value in values.items():
        expected = value[[1, 2, 3, 4, 6, 7]] * (0.7 if "down_proj" in name else 1.0)
        assert torch.allclose(written[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.5, 0.7])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_takes_a_factor_or_says_why_not(forms: Any, tmp_path: Path, name: str, factor: float) -> None:
    form, path = FORMS[name], forms(name)
    if form.takes == "none" or (form.takes == "two" and factor == 0.7):
        how = "auto" if form.takes == "none" else "scales"
        with pytest.raises(RefusedError) as caught:
            apply(plan_of(open_checkpoint(path)), "rescale", top_k=3, scale=factor, where=how)
        assert "--scale none" in (caught.value.hint or "")
        if form.takes == "two":  # exponents cannot; the weights can, to the nearest step
            plan = apply(plan_of(open_checkpoint(path)), "rescale", top_k=3, scale=factor)
            assert plan.steps[0].report["where"] == "weights"
            assert sum(plan.steps[0].report["requantised"].values()) == 4
        return
    plan = apply(plan_of(open_checkpoint(path)), "rescale", top_k=3, scale=factor)
    assert plan.steps[0].report["where"] == "scales"
    write_plan(plan, tmp_path / "out")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    changed = {n for n in before if not same_bits(before[n], after[n])}
    assert changed == {f"model.layers.1.mlp.experts.{e}.down_proj{form.scale}" for e in range(4)}
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(before[min(changed)].dtype, 0.0)
    old, new = values_of(path, name), values_of(tmp_path / "out", name)
    for weight, value in old.items():
        if weight.endswith("down_proj.weight"):
            tolerance = 0.0 if factor == 0.5 else 1.01 * rounding + 1e-6
            assert torch.allclose(new[weight], value * factor, rtol=tolerance, atol=0), weight
        else:
            assert torch.equal(new[weight], value)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_valid_and_none_of_its_parts_can_be_lost(forms: Any, tmp_path: Path, name: str) -> None:
    path = forms(name)
    assert not validate_checkpoint(path, level="values").findings
    tensors = read_tensors(path)
    parts = [n for n in tensors if ".experts.0.down_proj" in n]
    assert len(parts) > 1
    for lost in parts:
        rewrite(path, tmp_path / lost, {n: t for n, t in tensors.items() if n != lost}, read_config(path))
        found = validate_checkpoint(tmp_path / lost, level="config").findings
        assert {"C13", "C04"} & {f.code for f in found if f.severity == "error"}, lost


@pytest.mark.parametrize("name", FORMS)
def test_every_form_loses_experts_by_byte_ranges(forms: Any, tmp_path: Path, name: str) -> None:
    plan = apply(plan_of(open_checkpoint(forms(name))), "drop-experts", experts=[1])
    assert all(isinstance(piece, Copy) for expr in plan.tensors.values() for piece in expr.pieces())
    write_plan(plan, tmp_path / "out")
    old, new = values_of(forms(name), name), values_of(tmp_path / "out", name)
    assert len(new) == 3 * 3
    for place, expert in enumerate([0, 2, 3]):
        for part in ("gate", "up", "down"):
            names = (f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in (place, expert))
            assert torch.equal(new[next(names)], old[next(names)])


# MLX: words of 32 bits along the inputs, a scale and an offset for each group


def mlx(base: str, out: int, into: int, bits: int, group: int = 32) -> dict[str, torch.Tensor]:
    scales = torch.ones(out, into // group, dtype=torch.bfloat16)
    words = torch.zeros(out, into * bits // 32, dtype=torch.uint32)
    return {f"{base}.weight": words, f"{base}.scales": scales, f"{base}.biases": scales.clone()}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("own", [False, True])
def test_mlx_counts_logical_weights(models: Any, tmp_path: Path, ok: Cli, bits: int, own: bool) -> None:
    """Single modules may have bits and groups of their own; what counts is the number of scales."""
    source = models("qwen3_moe", hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {"group_size": 64, "bits": 8} if own else {"group_size": 32, "bits": bits}
    for name, tensor in read_tensors(source).items():
        base = name.removesuffix(".weight")
        if base.endswith("_proj"):
            tensors |= mlx(base, *tensor.shape, bits)
            settings |= {base: {"group_size": 32, "bits": bits}} if own else {}
        else:
            tensors[name] = tensor
    rewrite(source, tmp_path / "m", tensors, {"quantization": settings, "quantization_config": settings})
    found = counts(tmp_path / "m")
    assert (found.total, found.components) == (counts(source).total, counts(source).components)
    assert found.quantisation == "mlx"
    assert "stored as mlx" in ok("count-params", tmp_path / "m").out
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "rescale", top_k=1, scale=0.5)
    changed = plan.tensors.keys() - set(plan.untouched())
    assert {name.rpartition(".")[2] for name in changed} == {"scales", "biases"}
    assert all("down_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("expert", "shown"),
    [
        ("model.layers.0.mlp.experts.w13_weight", "w13_weight"),  # vLLM
        ("model.layers.0.mlp.experts.experts.0.up_proj.weight", "experts.experts.0"),  # llm-compressor
        ("model.layers.0.mlp.up_proj.weight", "no tensors under the names that it has"),
    ],
)
def test_a_known_family_whose_experts_have_other_names(
    models: Any, cli: Cli, ok: Cli, tmp_path: Path, expert: str, shown: str
) -> None:
    tensors = {n: t for n, t in read_tensors(models("qwen3_moe")).items() if ".experts." not in n}
    rewrite(models("qwen3_moe"), tmp_path / "m", {**tensors, expert: torch.zeros(8, 32)}, {})
    result = cli("drop-experts", tmp_path / "m", "--experts", 0, "-o", tmp_path / "out")
    said = " ".join(result.err.split())
    assert result.code == 2
    assert "qwen3_moe is a family in the table, and its experts have" in said
    assert shown in said
    assert "moesurgery families qwen3_moe" in said
    assert shown in " ".join(ok("count-params", tmp_path / "m").out.split())
    rewrite(models("qwen3_moe"), tmp_path / "other", tensors, {"model_type": "qwen9_moe", "architectures": ["Q"]})
    result = cli("drop-experts", tmp_path / "other", "--experts", 0, "-o", tmp_path / "out")
    assert "the family of model_type 'qwen9_moe' is not in the table" in " ".join(result.err.split())
