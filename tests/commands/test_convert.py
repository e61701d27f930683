"""`moesurgery convert`: the same model in another form, byte for byte where nothing has to be computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Copy
from moesurgery.families.table import by_model_type
from tests.families import ROWS
from tests.quantise import FORMS, make_form, make_fp8, make_mxfp4, mxfp4_value, rewrite, values_of
from tests.tiny import load, logits, read_config, read_tensors, same_bits

OTHER = {"per-expert": "fused", "fused": "per-expert"}
FUSED_ONLY = {"llama4", "llama4_text"}  # in transformers; quantised ones are published per expert


def converted(model: Path, out: Path, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), "convert", **parameters), out)
    return out


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = read_tensors(a), read_tensors(b)
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], tensor) for name, tensor in theirs.items())


# Layouts


@pytest.mark.parametrize("model_type", ROWS)
def test_layouts_there_and_back(models: Any, tmp_path: Path, model_type: str) -> None:
    """The converted model has the same logits in transformers, and converted back it has the same bytes."""
    path = models(model_type)
    plan = plan_of(open_checkpoint(path))
    (kind,) = {block.layout.kind for block in plan.anatomy.blocks if block.layout}
    (family,) = by_model_type(model_type)
    if reason := family.refuses.get("convert"):
        with pytest.raises(RefusedError, match=re.escape(reason)):
            apply(plan, "convert", layout=OTHER[kind])
        return
    if OTHER[kind] not in {layout.kind for layout in family.layouts}:
        with pytest.raises(RefusedError, match=f"{kind} only"):
            apply(plan, "convert", layout=OTHER[kind])
        return
    there = converted(path, tmp_path / "there", layout=OTHER[kind])
    assert {b.layout.kind for b in plan_of(open_checkpoint(there)).anatomy.blocks if b.layout} == {OTHER[kind]}
    if model_type not in FUSED_ONLY:
        # Weights loaded to other addresses may be multiplied in another order, so the last bit is not compared.
        torch.testing.assert_close(logits(load(there)), logits(load(path)), rtol=1e-5, atol=1e-6)
    assert same_tensors(converted(there, tmp_path / "back", layout=kind), path)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_it_is_what_transformers_saves(models: Any, tmp_path: Path, model_type: str) -> None:
    hub, fused = models(model_type), models(model_type, fused=True)
    assert same_tensors(converted(hub, tmp_path / "fused", layout="fused"), fused)
    assert same_tensors(converted(fused, tmp_path / "hub", layout="per-expert"), hub)


def test_stacking_and_unstacking_only_copies(models: Any) -> None:
    for fused, layout in ((False, "fused"), (True, "per-expert")):
        plan = apply(plan_of(open_checkpoint(models("qwen3_moe", fused=fused))), "convert", layout=layout)
        assert all(isinstance(p, Copy) for expr in plan.tensors.values() for p in expr.pieces())


def test_prediction_layers_are_converted_too(models: Any, tmp_path: Path) -> None:
    path = models("glm4_moe", num_hidden_layers=3)
    rewrite(path, tmp_path / "m", read_tensors(path), {"num_hidden_layers": 2})
    fused = converted(tmp_path / "m", tmp_path / "fused", layout="fused")
    assert "model.layers.2.mlp.experts.gate_up_proj" in read_tensors(fused)
    assert same_tensors(converted(fused, tmp_path / "back", layout="per-expert"), tmp_path / "m")


def test_the_layout_that_is_there_changes_nothing(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    done = converted(path, tmp_path / "out", layout="per-expert")
    for shard in path.glob("*.safetensors"):
        assert (done / shard.name).read_bytes() == shard.read_bytes()


def test_quantised_experts_keep_their_layout(models: Any, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3"), tmp_path / "m")
    with pytest.raises(RefusedError) as caught:
        apply(plan_of(open_checkpoint(tmp_path / "m")), "convert", layout="fused")
    assert "--dequantize" in (caught.value.hint or "")
    both = converted(tmp_path / "m", tmp_path / "both", layout="fused", dequantize=True)
    apart = converted(tmp_path / "m", tmp_path / "plain", dequantize=True)
    assert same_tensors(converted(apart, tmp_path / "fused", layout="fused"), both)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("experts.3.w2.weight", lambda t: t.half(), "do not fit together"),
        ("experts.3.w2.weight", lambda t: t[:, :10], "do not fit together"),
        ("experts.3.w1.extra", lambda t: t, "does not say what it is"),
    ],
)
def test_experts_that_differ_are_refused(models: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    tensors = read_tensors(models("mixtral"))
    whole = f"model.layers.1.block_sparse_moe.{name}"
    tensors[whole] = change(tensors.get(whole, torch.ones(2)))
    rewrite(models("mixtral"), tmp_path / "m", tensors, {})
    with pytest.raises(RefusedError, match=message):
        apply(plan_of(open_checkpoint(tmp_path / "m")), "convert", layout="fused")


# Dtypes


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_casting(models: Any, tmp_path: Path, dtype: str) -> None:
    path = models("deepseek_v3")
    kind = {"bf16": torch.bfloat16, "float16": torch.float16}[dtype]
    after = read_tensors(converted(path, tmp_path / "out", dtype=dtype))
    for name, tensor in read_tensors(path).items():
        selects = name.endswith("e_score_correction_bias")
        assert same_bits(after[name], tensor if selects else tensor.to(kind)), name
    assert read_config(tmp_path / "out")["dtype"] == str(kind).removeprefix("torch.")
    same = converted(tmp_path / "out", tmp_path / "again", dtype=dtype)
    assert same_tensors(same, tmp_path / "out")


def test_the_dtype_is_changed_wherever_the_config_names_it(models: Any, tmp_path: Path) -> None:
    path = models("qwen3_vl_moe")
    text = {**read_config(path)["text_config"], "torch_dtype": "float32"}
    rewrite(path, tmp_path / "m", read_tensors(path), {"text_config": text})
    config = read_config(converted(tmp_path / "m", tmp_path / "out", dtype="bf16"))
    assert config["dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


# Quantised weights


def test_quantisation_settings_keep_their_dtypes(models: Any, tmp_path: Path) -> None:
    """As Quark writes them: the dtype there is that of the codes, and nothing that a cast changes."""
    path = models("mixtral")
    settings = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
    rewrite(path, tmp_path / "model", read_tensors(path), {"dtype": "float32", "quantization_config": settings})
    after = apply(plan_of(open_checkpoint(tmp_path / "model")), "convert", dtype="bf16").config
    assert after["dtype"] == "bfloat16"
    assert after["quantization_config"] == settings


@pytest.mark.parametrize("name", ["fp8-block", "fp8-e8m0", "mxfp8", "fp4", "int4", "nvfp4-modelopt"])
def test_dequantised_models_run(models: Any, tmp_path: Path, name: str) -> None:
    """transformers loads the result and computes what it computes with the values of a plain loop."""
    source = models("qwen3_moe", moe_intermediate_size=32, num_hidden_layers=2, num_experts=4)
    make_form(source, tmp_path / "m", name)
    plain = read_tensors(source)  # its config says float32
    converted(tmp_path / "m", tmp_path / "out", dequantize=True, dtype="bf16" if name == "fp4" else None)
    values = values_of(tmp_path / "m", name)
    expected = {n: values.get(n, t).to(torch.bfloat16 if name == "fp4" else torch.float32) for n, t in plain.items()}
    written = read_tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    for weight, value in expected.items():
        assert torch.allclose(written[weight].float(), value.float(), rtol=1e-6, atol=0), weight
        assert written[weight].dtype == value.dtype
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_fp8_is_what_transformers_makes_of_it(models: Any, tmp_path: Path) -> None:
    """transformers dequantises FP8 while it loads: every parameter has the bits that ours has."""
    source = models("qwen3_moe", dtype="bfloat16", moe_intermediate_size=32, intermediate_size=48)
    make_fp8(source, tmp_path / "m")
    quantisation = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=quantisation)
    converted(tmp_path / "m", tmp_path / "out", dequantize=True)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = dict(theirs.named_parameters())
    assert "model.layers.1.mlp.experts.down_proj" in expected
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert same_bits(parameter.data, expected[name].data), name


def test_mxfp4_becomes_bf16(models: Any, tmp_path: Path) -> None:
    source = models("gpt_oss", dtype="bfloat16")
    make_mxfp4(source, tmp_path / "m")
    written = read_tensors(converted(tmp_path / "m", tmp_path / "out", dequantize=True))
    stored = read_tensors(tmp_path / "m")
    for name, tensor in written.items():
        if f"{name}_blocks" in stored:
            value = mxfp4_value(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            assert same_bits(tensor, value.flatten(-2).transpose(1, 2).to(torch.bfloat16))
        else:
            assert same_bits(tensor, stored[name])
    assert written.keys() == read_tensors(source).keys()


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if not form.dequantised])
def test_forms_that_are_not_known_are_refused(models: Any, tmp_path: Path, name: str) -> None:
    make_form(models("qwen3_moe", moe_intermediate_size=32), tmp_path / "m", name)
    with pytest.raises(RefusedError, match="not dequantised here"):
        apply(plan_of(open_checkpoint(tmp_path / "m")), "convert", dequantize=True)


def test_plain_weights_cannot_be_dequantised(models: Any) -> None:
    with pytest.raises(RefusedError, match="no weight is quantised"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "convert", dequantize=True)


# Shards, and models of unknown families


def test_resharding(models: Any, tmp_path: Path, ok: Any) -> None:
    path = models("mixtral")
    ok("convert", path, "--max-shard-size", "20KB", "-o", tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > len(list(path.glob("*.safetensors")))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert same_tensors(tmp_path / "out", path)


def test_an_unknown_family_is_copied_cast_and_resharded(models: Any, tmp_path: Path, ok: Any, cli: Any) -> None:
    path = models("mixtral")
    rewrite(path, tmp_path / "m", read_tensors(path), {"model_type": "zebra", "architectures": ["Zebra"]})
    ok("convert", tmp_path / "m", "--max-shard-size", "100KB", "-o", tmp_path / "copy")
    assert same_tensors(tmp_path / "copy", path)
    ok("convert", tmp_path / "m", "--dtype", "bf16", "-o", tmp_path / "cast")
    assert {t.dtype for t in read_tensors(tmp_path / "cast").values()} == {torch.bfloat16}
    refused = cli("convert", tmp_path / "m", "--layout", "fused", "-o", tmp_path / "no")
    assert refused.code == 2
    assert "zebra" in refused.err
    assert "docs/families.md" in refused.err


def test_dense_models_are_cast_too(tmp_path: Path, models: Any, ok: Any) -> None:
    path = models("mixtral")
    dense = {n: t for n, t in read_tensors(path).items() if "block_sparse" not in n}
    rewrite(path, tmp_path / "m", dense, {"model_type": "llama", "num_local_experts": None})
    ok("convert", tmp_path / "m", "--dtype", "f16", "-o", tmp_path / "out")
    assert {t.dtype for t in read_tensors(tmp_path / "out").values()} == {torch.float16}
