"""What `convert --quantize` lists as plain, under the rules by which vLLM decides what it reads as quantised.

vLLM joins projections to one module, and asks for the modules that it has. The rules, in its own source (of 2026):
compressed-tensors `should_ignore_layer` and `get_moe_method`, `is_layer_skipped` for `fp8`, `is_layer_excluded` for
ModelOpt, and the models' `packed_modules_mapping`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import pytest

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.families import components
from moesurgery.plan.plan import Plan
from tests.quantise import make_form

JOINED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe")
FORMS = ("fp8", "fp8-block", "mxfp4", "nvfp4", "int4")


class MixedError(Exception):
    """Some of the projections of a module are quantised, and others are not."""


def parts_of(module: str) -> list[str]:
    """The modules of a checkpoint that a module of vLLM is joined of."""
    last = module.rpartition(".")[2]
    return [module.removesuffix(last) + part for part in JOINED.get(last, [last])]


def all_or_none(found: Iterable[bool], module: str) -> bool:
    found = set(found)
    if len(found) > 1:
        raise MixedError(module)
    return found.pop()


def plain_for_compressed_tensors(module: str, settings: dict[str, Any]) -> bool:
    def listed(name: str) -> bool:
        return any(re.match(e[3:], name) if e.startswith("re:") else e == name for e in settings["ignore"])

    if module.endswith(".experts"):
        return all_or_none((listed(f"{module}.0.{part}_proj") for part in ("gate", "up", "down")), module)
    return all_or_none(map(listed, parts_of(module)), module)


def plain_for_fp8(module: str, settings: dict[str, Any]) -> bool:
    listed = settings.get("ignored_layers") or settings["modules_to_not_convert"]
    if module.rpartition(".")[2] not in JOINED and "experts" in module:
        return any(module in entry for entry in listed if "experts" in entry)
    return all_or_none((part in listed for part in parts_of(module)), module)


def plain_for_modelopt(module: str, excluded: list[str]) -> bool:
    if all_or_none((part in excluded for part in parts_of(module)), module):
        return True
    return any(entry in module or fnmatch(module, entry) for entry in excluded)


def modules_of_vllm(plan: Plan) -> dict[str, set[bool]]:
    """Linear modules and sets of experts as vLLM names them, and whether their weights are plain."""
    found = defaultdict(set)
    joined_as = {part: whole for whole, parts in JOINED.items() for part in parts}
    for name, expr in plan.tensors.items():
        ending = next((e for e in (".weight_packed", ".weight") if name.endswith(e)), None)
        if ending is None or len(expr.shape) != 2 or plan.anatomy.component[name] == components.EMBEDDING:
            continue
        module = name.removesuffix(ending)
        if ".experts." in module:
            module = module[: module.index(".experts.") + len(".experts")]
        else:
            before, _, last = module.rpartition(".")
            module = f"{before}.{joined_as.get(last, last)}" if before else last
        found[module].add(expr.dtype in PLAIN_FLOATS)
    return found


@pytest.mark.parametrize("linears", ["experts", "all"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_reads_as_plain_what_is_plain(models: Any, family: str, form: str, linears: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    if family != "mixtral":
        sizes["moe_intermediate_size"] = 32
    if family == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 32
    plan = apply(plan_of(open_checkpoint(models(family, **sizes))), "convert", quantize=form, linears=linears)
    settings = plan.config["quantization_config"]
    rule = plain_for_fp8 if settings["quant_method"] == "fp8" else plain_for_compressed_tensors
    modules = modules_of_vllm(plan)
    assert any(module.endswith(".experts") for module in modules)
    assert {module: rule(module, settings) for module in modules} == {
        module: all_or_none(plain, module) for module, plain in modules.items()
    }
    assert rule("lm_head", settings)  # a tied one is not stored
    if rule is plain_for_compressed_tensors:
        assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]  # by which vLLM finds experts too


def test_the_rules_tell_a_list_that_is_wrong(models: Any) -> None:
    plan = apply(
        plan_of(open_checkpoint(models("qwen3_moe", hidden_size=64, moe_intermediate_size=32))),
        "convert",
        quantize="int4",
    )
    settings = plan.config["quantization_config"]
    module = "model.layers.1.self_attn"
    settings = {**settings, "ignore": [e for e in settings["ignore"] if e != f"{module}.k_proj"]}
    with pytest.raises(MixedError):
        plain_for_compressed_tensors(f"{module}.qkv_proj", settings)
    assert not plain_for_fp8(f"{module}.o_proj", {"modules_to_not_convert": ["lm_head"]})


def test_modelopts_list_follows_a_drop(models: Any, tmp_path: Any) -> None:
    """ModelOpt lists names and patterns, and what a pattern names stays named."""
    make_form(models("qwen3_moe", hidden_size=64, moe_intermediate_size=32), tmp_path / "q", "nvfp4-modelopt")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = [
        "lm_head",
        "model.layers.0.mlp*",
        "model.layers.*.self_attn*",
        "model.layers.*.mlp.gate",
    ]
    path.write_text(json.dumps(config))
    plan = plan_of(open_checkpoint(tmp_path / "q"))
    for changed in (plan, apply(plan, "drop-experts", experts=[0]), apply(plan, "merge-experts", groups=[[0, 1]])):
        excluded = changed.config["quantization_config"]["ignore"]
        for module, plain in modules_of_vllm(changed).items():
            assert plain_for_modelopt(module, excluded) == all_or_none(plain, module)
