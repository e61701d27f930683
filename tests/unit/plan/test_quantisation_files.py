"""Files and lists that describe quantisation follow the weights: renamed with them, gone with them, else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.quantise import FORMS, make_form, make_fp8
from tests.tiny import load, read_config, read_tensors, save_tiny

Cli = Callable[..., Result]
GATE = "model.layers.{}.mlp.gate"
EXPERT = "model.layers.1.mlp.experts.{}.up_proj"
# Each tool's file for a model of its form, as far as the tool writes it.
DESCRIBED: dict[str, tuple[str, dict[str, Any]]] = {
    "nvfp4-modelopt": (
        "hf_quant_config.json",
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}},
    ),
    "int4": ("quantization_config.json", {"quant_method": "compressed-tensors", "bits": 4}),
    "fp8-channel": ("quantize_config.json", {"quant_method": "fp8", "bits": 8}),
    "fp8-block": ("quant_config.json", {"w_bit": 8, "version": "fp8"}),
}


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Path]:
    """Return a model in a quantised form with the file that describes it."""

    def get(name: str, **changes: Any) -> Path:
        file, content = DESCRIBED[name]
        save_tiny("qwen3_moe", tmp_path / "plain", moe_intermediate_size=32, num_experts=4, num_hidden_layers=2)
        make_form(tmp_path / "plain", tmp_path / "m", name)
        (tmp_path / "m" / file).write_text(json.dumps({**content, **changes}))
        return tmp_path / "m"

    return get


@pytest.mark.parametrize("name", DESCRIBED)
def test_they_go_when_the_weights_are_plain(described: Callable[..., Path], tmp_path: Path, ok: Cli, name: str) -> None:
    path, file = described(name), DESCRIBED[name][0]
    assert not [f for f in validate_checkpoint(path, level="config").findings if f.code == "C15"]
    ok("convert", path, "--dequantize", "-o", tmp_path / "converted", "--validate")
    both = ", ".join(f"{{model: {model}, parameters: {{weight: 1}}}}" for model in (path, tmp_path / "plain"))
    recipe = f"models: [{both}]\n"
    (tmp_path / "r.yaml").write_text(recipe + "merge_method: linear\ndtype: float32\n")
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "merged")
    (tmp_path / "copy.yaml").write_text(f"models: [{{model: {path}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    ok("merge", tmp_path / "copy.yaml", "-o", tmp_path / "passed")
    for out in ("converted", "merged", "passed"):
        assert not (tmp_path / out / file).exists(), out
        assert "quantization_config" not in read_config(tmp_path / out)
        load(tmp_path / out)
    assert ok("validate", tmp_path / "converted", "--against", path).code == 0
    (tmp_path / "converted" / file).write_text((path / file).read_text())
    found = [f for f in validate_checkpoint(tmp_path / "converted", level="config").findings if f.code == "C15"]
    assert [f.file for f in found] == [file]
    assert "no weight is quantised: vLLM and SGLang obey it" in found[0].message


@pytest.mark.parametrize("name", DESCRIBED)
def test_they_stay_byte_for_byte_where_nothing_that_they_say_changes(
    described: Callable[..., Path], tmp_path: Path, ok: Cli, name: str
) -> None:
    path, file = described(name), DESCRIBED[name][0]
    ok("drop-experts", path, "--experts", "3", "-o", tmp_path / "out")
    ok("convert", path, "-o", tmp_path / "copy")
    for out in ("out", "copy"):
        assert (tmp_path / out / file).read_bytes() == (path / file).read_bytes()


def listing(path: Path, file: str) -> list[str]:
    found: list[str] = json.loads((path / file).read_text())["quantization"]["exclude_modules"]
    return found


def with_lists(path: Path, names: list[str]) -> Path:
    """Put a list of modules into config.json and into ModelOpt's file."""
    config = read_config(path)
    config["quantization_config"]["modules_to_not_convert"] = names
    (path / "config.json").write_text(json.dumps(config))
    content = {
        "quantization": {"quant_algo": "FP8", "exclude_modules": names, "quantized_layers": dict.fromkeys(names, 8)}
    }
    (path / "hf_quant_config.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    save_tiny(
        "qwen3_moe",
        tmp_path / "plain",
        moe_intermediate_size=32,
        num_experts=4,
        num_hidden_layers=2,
        mlp_only_layers=[],
    )
    make_fp8(tmp_path / "plain", tmp_path / "fp8")
    return tmp_path / "fp8"


NAMES = ["lm_head", GATE.format(1), EXPERT.format(1), EXPERT.format(3), "model.layers.1.mlp.experts.2*", "re:.*gate$"]


def test_names_follow_experts_that_get_other_numbers(fp8: Path, tmp_path: Path) -> None:
    names = [*NAMES, "language_model.model.layers.1.mlp.experts.3", "model.layers.1.mlp.experts.3.up_proj.weight"]
    path = with_lists(fp8, names)
    write_plan(apply(plan_of(open_checkpoint(path)), "drop-experts", experts=[1]), tmp_path / "out")
    expected = [
        *("lm_head", GATE.format(1), EXPERT.format(2), "model.layers.1.mlp.experts.1*", "re:.*gate$"),
        *("language_model.model.layers.1.mlp.experts.2", "model.layers.1.mlp.experts.2.up_proj.weight"),
    ]
    assert read_config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == expected
    assert listing(tmp_path / "out", "hf_quant_config.json") == expected
    content = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert list(content["quantization"]["quantized_layers"]) == expected


@pytest.mark.parametrize(
    "expression",
    [
        r"re:.*experts\.3\..*",
        r"re:.*experts\.(1|3)\.up_proj",
        "model.layers.*.mlp.experts.3*",
        r"re:.*experts\.[0-2]\..*",
    ],
)
def test_expressions_for_experts_by_number_are_refused(fp8: Path, expression: str) -> None:
    path = with_lists(fp8, ["lm_head", expression])
    with pytest.raises(RefusedError, match=r"config.json: quantization_config names .*by number") as caught:
        apply(plan_of(open_checkpoint(path)), "drop-experts", experts=[1])
    assert "name the modules one by one" in str(caught.value.hint)
    config = read_config(path)
    config["quantization_config"].pop("modules_to_not_convert")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=r"hf_quant_config.json names .*by number"):
        apply(plan_of(open_checkpoint(path)), "drop-experts", experts=[1])
    apply(plan_of(open_checkpoint(path)), "rescale", top_k=1, scale="none")


def test_expressions_for_all_experts_stay(fp8: Path) -> None:
    names = [r"re:.*experts\.\d+\..*", r"re:.*experts\.[0-9]+\.up_proj", "*.experts.*"]
    plan = apply(plan_of(open_checkpoint(with_lists(fp8, names))), "drop-experts", experts=[1])
    assert plan.config["quantization_config"]["modules_to_not_convert"] == names
    assert "hf_quant_config.json" not in plan.files


def test_a_dense_model_has_the_names_of_its_own(fp8: Path, tmp_path: Path) -> None:
    path = with_lists(fp8, ["lm_head", GATE.format(1), EXPERT.format(1), EXPERT.format(3), "model.layers.1.self_attn"])
    write_plan(apply(plan_of(open_checkpoint(path)), "to-dense", expert=3), tmp_path / "out")
    expected = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn"]
    assert read_config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == expected
    assert listing(tmp_path / "out", "hf_quant_config.json") == expected


def test_names_follow_another_layout(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "m")
    names = [
        "model.layers.0.block_sparse_moe.gate",
        *(f"model.layers.0.block_sparse_moe.experts.{e}.w1" for e in range(8)),
    ]
    settings = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head", *names]}
    config = {**read_config(tmp_path / "m"), "quantization_config": settings}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "convert", layout="fused")
    gate = next(n for n in plan.tensors if n.startswith("model.layers.0") and "experts" not in n and "mlp" in n)
    fused = next(n for n in plan.tensors if n.startswith("model.layers.0") and "experts" in n)
    expected = ["lm_head", gate.removesuffix(".weight"), fused.rpartition(".")[0]]
    assert plan.config["quantization_config"]["llm_int8_skip_modules"] == expected


def test_layers_that_move_are_refused_by_file(fp8: Path, tmp_path: Path, cli: Cli) -> None:
    content = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["model.layers.1.self_attn*"]}}
    (fp8 / "hf_quant_config.json").write_text(json.dumps(content))
    plan = plan_of(open_checkpoint(fp8))
    with pytest.raises(
        RefusedError, match=r"hf_quant_config.json names layers.1: it cannot follow a new order of layers"
    ):
        apply(plan, "tie-blocks", blocks=[0, 1, 1], materialize=True, distances="none")
    apply(plan, "tie-blocks", blocks=[0, 1], materialize=True, distances="none")
    slices = "\n".join(f"- sources: [{{model: {fp8}, layer_range: [{b}, {b + 1}]}}]" for b in (0, 1, 1))
    (tmp_path / "r.yaml").write_text(f"slices:\n{slices}\nmerge_method: passthrough\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == 2
    assert "r.yaml:1: hf_quant_config.json names layers.1" in result.err
    (tmp_path / "r.yaml").write_text(f"slices:\n{slices}\nmerge_method: passthrough\ndtype: bfloat16\n")
    assert cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "plain-out").code == 0
    assert not (tmp_path / "plain-out" / "hf_quant_config.json").exists()


def test_a_file_that_is_no_json_is_refused(fp8: Path) -> None:
    (fp8 / "quantize_config.json").write_text("[]")
    with pytest.raises(
        RefusedError, match=r"quantize_config.json describes how the weights are quantised, and is not"
    ) as c:
        apply(plan_of(open_checkpoint(fp8)), "drop-experts", experts=[1])
    assert "mend or remove it" in str(c.value.hint)


def test_steps_follow_each_other(fp8: Path) -> None:
    plan = plan_of(open_checkpoint(with_lists(fp8, [EXPERT.format(3)])))
    plan = apply(apply(plan, "drop-experts", experts=[0]), "drop-experts", experts=[0])
    assert json.loads(plan.files["hf_quant_config.json"] or b"")["quantization"]["exclude_modules"] == [
        EXPERT.format(1)
    ]
    assert apply(plan, "convert", dequantize=True).files["hf_quant_config.json"] is None


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_bits_that_differ_are_found(tmp_path: Path, form: str) -> None:
    save_tiny("qwen3_moe", tmp_path / "plain", moe_intermediate_size=32, num_experts=4, num_hidden_layers=2)
    make_form(tmp_path / "plain", tmp_path / "m", form)
    bits = FORMS[form].config.get("bits", 4)
    config = read_config(tmp_path / "m")
    config["quantization_config"]["bits"] = bits
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"bits": bits, "group_size": 16}))
    assert not [f for f in validate_checkpoint(tmp_path / "m", level="config").findings if f.code == "C15"]
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 16}))
    found = validate_checkpoint(tmp_path / "m", level="config").findings
    assert f"says 3 bits, config.json {bits}" in [f.message for f in found if f.code == "C15"]


def test_a_plain_model_with_such_a_file_is_copied_as_it_is(tmp_path: Path) -> None:
    """What nobody asked to change stays; `validate` says that it is wrong."""
    save_tiny("qwen3_moe", tmp_path / "m")
    (tmp_path / "m" / "quant_config.json").write_text('{"w_bit": 4}')
    write_plan(apply(plan_of(open_checkpoint(tmp_path / "m")), "rescale", top_k=1, scale="none"), tmp_path / "out")
    assert (tmp_path / "out" / "quant_config.json").exists()
    found = validate_checkpoint(tmp_path / "out", level="config").findings
    assert "says 4 bits, but no weight is quantised" in str([f.message for f in found if f.code == "C15"])
    assert torch.is_tensor(next(iter(read_tensors(tmp_path / "out").values())))


def test_lists_of_single_experts_say_nothing_of_new_ones(fp8: Path) -> None:
    plan = plan_of(open_checkpoint(with_lists(fp8, [EXPERT.format(3)])))
    with pytest.raises(RefusedError, match=r"config.json: quantization_config names experts.3: such a list") as caught:
        apply(plan, "add-expert", source=str(fp8), experts=[0])
    assert "one expression for all" in str(caught.value.hint)
    plan = plan_of(open_checkpoint(with_lists(fp8, ["lm_head", r"re:.*experts\\.\\d+\\..*"])))
    assert apply(plan, "add-expert", source=str(fp8), experts=[0]).anatomy.experts == 5


def test_lists_of_single_ffns_do_not_become_lists_of_experts(tmp_path: Path) -> None:
    """Settings for quantising a plain model when it is loaded."""
    save_tiny("llama", tmp_path / "m", intermediate_size=48)
    config = read_config(tmp_path / "m")
    for names, refused in ((["model.layers.1.mlp.up_proj"], True), (["lm_head", "up_proj", "model.layers.1"], False)):
        settings = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": names}
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        plan = plan_of(open_checkpoint(tmp_path / "m"))
        if refused:
            with pytest.raises(RefusedError, match="names modules of FFNs one by one, which become experts") as caught:
                apply(plan, "upcycle", experts=4, proof=False)
            assert "expression that fits experts too" in str(caught.value.hint)
        else:
            assert apply(plan, "upcycle", experts=4, proof=False).config["quantization_config"] == settings
