"""`convert --quantize`, and edits of what it wrote, end to end: other libraries read the outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from moesurgery import open_checkpoint, plan_of
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.recipe.registry import apply
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.quantise import FORMS, make_form, make_mxfp4, mxfp4_value
from tests.tiny import read_config, read_tensors, same_bits

Cli = Callable[..., Result]
# transformers 5.23 forgets the second scale of stacked experts: compressed-tensors' own code is asked in
# tests/unit/plan/test_requantise.py
READ = ("fp8", "fp8-block", "mxfp4", "int4")
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")


def source(models: Any, family: str, **changes: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    if family != "mixtral":
        sizes["moe_intermediate_size"] = 32
    path: Path = models(family, dtype="bfloat16", **sizes, **changes)
    return path


def loaded(path: Path) -> Any:
    settings = read_config(path).get("quantization_config", {})
    dense = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "config_groups" in settings else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that its own settings stay beside `dequantize`
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, output_loading_info=True, **dense
        )
    assert not any(info.values()), info
    return model


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return loaded(path)(torch.arange(24)[None] % 32).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("linears", ["experts", "all"])
def test_transformers_computes_what_the_plain_copy_computes(
    models: Any, tmp_path: Path, ok: Cli, form: str, linears: str
) -> None:
    family = FAMILIES[READ.index(form) % len(FAMILIES)]
    ok("convert", source(models, family), "--quantize", form, "--linears", linears, "-o", tmp_path / "q", "--validate")
    ok("convert", tmp_path / "q", "--dequantize", "-o", tmp_path / "plain", "--validate")
    assert torch.allclose(logits(tmp_path / "q"), logits(tmp_path / "plain"), rtol=0, atol=2e-2)


@pytest.mark.parametrize("form", [*READ, "nvfp4"])
@pytest.mark.parametrize("linears", ["experts", "all"])
def test_what_is_quantised_and_what_is_listed(models: Any, tmp_path: Path, ok: Cli, form: str, linears: str) -> None:
    path = source(models, "deepseek_v3")
    ok("convert", path, "--quantize", form, "--linears", linears, "-o", tmp_path / "q", "--validate")
    before, after = read_tensors(path), read_tensors(tmp_path / "q")
    settings = read_config(tmp_path / "q")["quantization_config"]
    listed = set(settings.get("ignore", settings.get("modules_to_not_convert")))
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        kept = name in after and after[name].dtype == tensor.dtype
        if kept:
            assert same_bits(after[name], tensor)
        if ".mlp.experts." in name:
            assert not kept
        if any(part in name for part in ("norm", "embed", "lm_head", "mlp.gate.", "bias")):
            assert kept
        if tensor.dim() == 2 and "embed" not in name:
            assert (module in listed) == kept, name
        if linears == "all" and name.endswith("o_proj.weight"):
            assert not kept
    assert "lm_head" in listed


def test_what_cannot_be_quantised(models: Any, tmp_path: Path) -> None:
    plan = plan_of(open_checkpoint(models("qwen3_moe", moe_intermediate_size=24, hidden_size=64)))
    with pytest.raises(RefusedError, match="divide into groups of 32"):
        apply(plan, "convert", quantize="int4")
    apply(plan, "convert", quantize="fp8")
    with pytest.raises(RecipeError, match="--quantize"):
        apply(plan, "convert", linears="all")
    make_form(source(models, "qwen3_moe"), tmp_path / "int4", "int4")
    with pytest.raises(RefusedError, match="quantised already") as caught:
        apply(plan_of(open_checkpoint(tmp_path / "int4")), "convert", quantize="fp8")
    assert "--dequantize" in str(caught.value.hint)
    apply(plan_of(open_checkpoint(tmp_path / "int4")), "convert", quantize="fp8", dequantize=True)


# LoRA onto quantised experts


def adapter(folder: Path, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], rank: int, version: str) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [], "peft_version": version}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def recipe(path: Path, model: str, more: str = "") -> Path:
    path.write_text(f"models:\n- model: {model}\nmerge_method: passthrough\n{more}")
    return path


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if form.dequantised])
def test_an_adapter_on_one_expert(models: Any, tmp_path: Path, ok: Cli, name: str) -> None:
    make_form(source(models, "qwen3_moe"), tmp_path / "q", name)
    generator = torch.Generator().manual_seed(2)
    module = "model.layers.1.mlp.experts.2.down_proj"
    factors = torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
    folder = adapter(tmp_path / "a", {module: factors}, 2, "0.21.0")
    ok("merge", recipe(tmp_path / "r.yaml", f"{tmp_path / 'q'}+{folder}"), "-o", tmp_path / "out", "--validate")
    before, after = read_tensors(tmp_path / "q"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(before[n], after[n]) for n in before if module not in n)
    assert any(not same_bits(before[n], after[n]) for n in before if module in n)
    assert read_config(tmp_path / "q")["quantization_config"] == read_config(tmp_path / "out")["quantization_config"]
    for path in ("q", "out"):
        ok("convert", tmp_path / path, "--dequantize", "--dtype", "f32", "-o", tmp_path / f"{path}-plain")
    old, new = (read_tensors(tmp_path / f"{path}-plain")[f"{module}.weight"] for path in ("q", "out"))
    wanted = old + factors[1] @ factors[0]
    assert float((new - wanted).norm() / wanted.norm()) < (0.15 if "4" in name or name in ("awq", "gptq") else 0.05)


@pytest.mark.parametrize("version", ["0.18.0", "0.21.0"])
def test_both_generations_of_adapters_on_stacks(models: Any, tmp_path: Path, ok: Cli, version: str) -> None:
    """Up to 0.18 the factors of experts that are stored as [E, out, in] are the other way round."""
    make_form(source(models, "qwen3_moe"), tmp_path / "q", "int8-packed")
    experts = plan_of(open_checkpoint(tmp_path / "q")).anatomy.experts
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(experts, 2, 64, generator=generator)
    b = torch.randn(experts, 64, 2, generator=generator)  # gate and up: 2 x 32 outputs
    flat = (a.reshape(-1, 64), b.permute(1, 2, 0).reshape(64, -1))
    if version == "0.18.0":
        flat = (b.transpose(1, 2).reshape(-1, 64), a.permute(2, 1, 0).reshape(64, -1))
    folder = adapter(tmp_path / "a", {"model.layers.1.mlp.experts": flat}, 2, version)
    ok("merge", recipe(tmp_path / "r.yaml", f"{tmp_path / 'q'}+{folder}"), "-o", tmp_path / "out", "--validate")
    for path in ("q", "out"):
        ok("convert", tmp_path / path, "--dequantize", "--dtype", "f32", "-o", tmp_path / f"{path}-plain")
    old, new = (read_tensors(tmp_path / f"{path}-plain") for path in ("q", "out"))
    for e in range(experts):
        change = b[e] @ a[e]
        for part, rows in (("gate_proj", slice(0, 32)), ("up_proj", slice(32, 64))):
            name = f"model.layers.1.mlp.experts.{e}.{part}.weight"
            wanted = old[name] + change[rows]
            assert float((new[name] - wanted).norm() / wanted.norm()) < 0.02, name


def test_an_adapter_on_stacked_mxfp4(models: Any, tmp_path: Path, ok: Cli) -> None:
    make_mxfp4(models("gpt_oss"), tmp_path / "q")
    before = read_tensors(tmp_path / "q")
    name = "model.layers.1.mlp.experts.down_proj"
    experts, hidden, groups, _ = before[f"{name}_blocks"].shape
    generator = torch.Generator().manual_seed(3)
    a = torch.zeros(experts, 2, groups * 32)
    a[1] = torch.randn(2, groups * 32, generator=generator)
    b = torch.randn(experts, hidden, 2, generator=generator) * 0.05
    module = "model.layers.1.mlp.experts.base_layer"
    flat = (a.reshape(-1, groups * 32), b.permute(1, 2, 0).reshape(hidden, -1))
    folder = adapter(tmp_path / "a", {module: flat}, 2, "0.21.0")
    ok("merge", recipe(tmp_path / "r.yaml", f"{tmp_path / 'q'}+{folder}"), "-o", tmp_path / "out", "--validate")
    after = read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {n for n in before if not same_bits(before[n], after[n])}
    assert changed <= {f"{name}_blocks", f"{name}_scales"}
    old, new = (mxfp4_value(t[f"{name}_blocks"], t[f"{name}_scales"]).flatten(-2) for t in (before, after))
    assert torch.equal(old[[0, 2, 3]], new[[0, 2, 3]])  # no change of these: they lie on the old scales' steps
    wanted = old[1] + b[1] @ a[1]
    assert float((new[1] - wanted).norm() / wanted.norm()) < 0.15


def test_plain_on_request(models: Any, tmp_path: Path, ok: Cli) -> None:
    make_form(source(models, "qwen3_moe"), tmp_path / "q", "int4")
    both = f"models:\n- {{model: {tmp_path / 'q'}, parameters: {{weight: 1}}}}\nmerge_method: linear\n"
    (tmp_path / "r.yaml").write_text(both)
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "same", "--validate")
    ok("merge", tmp_path / "r.yaml", "--requantize", "none", "-o", tmp_path / "plain", "--validate")
    before, same = read_tensors(tmp_path / "q"), read_tensors(tmp_path / "same")
    assert all(same_bits(before[n], same[n]) for n in before)
    assert "quantization_config" not in read_config(tmp_path / "plain")
    assert '"requantize": "none"' in (tmp_path / "plain" / "moesurgery.json").read_text()
    assert not validate_checkpoint(tmp_path / "plain", level="config").findings
