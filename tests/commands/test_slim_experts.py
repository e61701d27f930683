"""Keeping some neurons of every expert: what the slimmed model computes, in every family and stored form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.nodes import Copy
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import neuron_count
from moesurgery.plan.plan import Plan
from tests.conftest import Result
from tests.families import LAYOUTS
from tests.quantise import FORMS, make_form, make_mxfp4, mxfp4_value, values_of
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Cli = Callable[..., Result]
NVFP4 = ("nvfp4", "nvfp4-modelopt")


def slim(model: Path, out: Path, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), "slim-experts", **parameters), out)
    return out


def of_transformers(model_type: str) -> dict[str, Any]:
    """Sizes by which the hidden size and the number of neurons differ."""
    return {"intermediate_size": 48} if model_type in ("gpt_oss", "openai_privacy_filter") else {}


def with_dead_neurons(source: Path, target: Path, kept: int) -> int:
    """Write a copy whose experts, and what the class builds from their width, have down-projections that are zero for
    all but `kept` of each `width` neurons, others in every expert. Return the width."""
    target.mkdir()
    plan = plan_of(open_checkpoint(source))
    family = plan.anatomy.settings.family
    routed = [block for block in plan.anatomy.blocks if block.of is None]
    following = dict(shared_experts(plan.anatomy, plan.tensors)) if family.shared_width == "" else {}
    if family.dense_width in family.width_keys:
        following |= dense_ffns(plan.anatomy, plan.tensors)
    width = 0
    generator = torch.Generator().manual_seed(5)
    dead: dict[str, tuple[int, int, int]] = {}  # name -> (experts, axis of neurons, neurons)
    for block in [*routed, *following.values()]:
        for member in block.named("down"):
            if member.stem.bias:
                continue
            assert member.part is not None
            shape = plan.tensors[member.name].shape
            experts = block.experts if member.expert is None else 1
            axis = -1 if member.part.order == "oi" else -2
            neurons = shape[0] // experts if member.part.rows else shape[axis]
            dead[member.name] = (experts, axis, neurons)
            width = width if block in following.values() else neurons
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name in tensors.keys() & dead.keys():
            experts, axis, neurons = dead[name]
            tensor = tensors[name].reshape(experts, -1, tensors[name].shape[-1])
            for matrix in tensor:
                gone = torch.randperm(neurons, generator=generator)[neurons // width * kept :]
                (matrix if axis == -1 else matrix.T)[:, gone] = 0
            tensors[name] = tensor.reshape(tensors[name].shape)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return width


@pytest.mark.parametrize(("model_type", "fused"), LAYOUTS)
def test_dead_neurons_do_nothing(models: Any, tmp_path: Path, model_type: str, fused: bool) -> None:
    """Every family, in every layout: transformers loads the slimmed model, and it computes the same."""
    path = models(model_type, fused=fused, **of_transformers(model_type))
    plan = plan_of(open_checkpoint(path))
    if reason := plan.anatomy.family.refuses.get("slim-experts"):
        with pytest.raises(RefusedError, match=re.escape(reason)):
            apply(plan, "slim-experts", width=8)
        return
    width = with_dead_neurons(path, tmp_path / "dead", 16)
    assert width in (24, 48)
    out = slim(tmp_path / "dead", tmp_path / "out", width=16)
    expected = logits(load(tmp_path / "dead"))
    assert (logits(load(out)) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    slimmed = plan_of(open_checkpoint(out))
    assert slimmed.anatomy.experts == plan.anatomy.experts
    assert all(neuron_count(b, slimmed.tensors) == 16 for b in slimmed.anatomy.blocks if b.of is None)


@pytest.mark.parametrize(("model_type", "fused"), [("mixtral", False), ("gpt_oss", True), ("deepseek_v3", True)])
def test_all_neurons_are_a_copy(models: Any, tmp_path: Path, ok: Cli, model_type: str, fused: bool) -> None:
    path = models(model_type, fused=fused)
    width = {"mixtral": 48, "gpt_oss": 32, "deepseek_v3": 24}[model_type]
    ok("slim-experts", path, "--width", width, "-o", tmp_path / "out")
    assert {f.name: f.read_bytes() for f in path.glob("*.safetensors")} == {
        f.name: f.read_bytes() for f in (tmp_path / "out").glob("*.safetensors")
    }
    assert read_config(tmp_path / "out") == read_config(path)


def test_gate_and_up_are_byte_ranges(models: Any) -> None:
    for fused in (False, True):
        plan = apply(plan_of(open_checkpoint(models("mixtral", fused=fused))), "slim-experts", width=20)
        for block in plan.anatomy.blocks:
            for member in block.members:
                if member.role in ("gate", "up", "gate_up"):
                    assert all(isinstance(piece, Copy) for piece in plan.tensors[member.name].pieces())


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.dequantised])
def test_quantised_forms_keep_their_values(models: Any, tmp_path: Path, form: str) -> None:
    """Whole blocks of neurons are taken, and every value that stays is what it was."""
    make_form(models("qwen3_moe", moe_intermediate_size=64), tmp_path / "model", form)
    plan = plan_of(open_checkpoint(tmp_path / "model"))
    if form in ("gptq", "awq"):
        with pytest.raises(RefusedError, match="packs single neurons"):
            apply(plan, "slim-experts", width=32)
        return
    size = 1 if form in ("fp8-channel", "fp8-tensor", "int8") else 16 if form in ("fp8-block", *NVFP4) else 8
    if size > 1:
        with pytest.raises(RefusedError, match="share a scale or a word"):
            apply(plan, "slim-experts", width=33)
    slim(tmp_path / "model", tmp_path / "out", width=32)
    assert read_config(tmp_path / "out")["moe_intermediate_size"] == 32
    before, after = values_of(tmp_path / "model", form), values_of(tmp_path / "out", form)
    assert before.keys() == after.keys()
    for base in (name.removesuffix("gate_proj.weight") for name in before if name.endswith("gate_proj.weight")):
        old, new = ({r: v[f"{base}{r}_proj.weight"] for r in ("gate", "up", "down")} for v in (before, after))
        rows = [int((old["gate"] == row).all(1).nonzero()[0]) for row in new["gate"]]
        assert rows == sorted(set(rows))
        assert all(row // size * size + i in rows for row in rows for i in range(size))
        assert torch.equal(new["up"], old["up"][rows])
        assert torch.equal(new["down"], old["down"][:, rows])


@pytest.mark.parametrize("form", ["gptq", "awq", "bnb-nf4"])
def test_forms_that_pack_single_neurons_are_refused(models: Any, tmp_path: Path, form: str) -> None:
    make_form(models("qwen3_moe", moe_intermediate_size=64), tmp_path / "model", form)
    with pytest.raises(RefusedError, match="neurons") as refused:
        apply(plan_of(open_checkpoint(tmp_path / "model")), "slim-experts", width=32)
    assert refused.value.hint


def test_mxfp4_of_gpt_oss(models: Any, tmp_path: Path) -> None:
    make_mxfp4(models("gpt_oss", intermediate_size=96), tmp_path / "model")
    before = read_tensors(tmp_path / "model")
    after = read_tensors(slim(tmp_path / "model", tmp_path / "out", width=64))
    name = "model.layers.1.mlp.experts."
    for expert in range(8):
        old, new = (
            {
                r: mxfp4_value(t[f"{name}{r}_blocks"][expert], t[f"{name}{r}_scales"][expert]).flatten(1)
                for r in ("gate_up_proj", "down_proj")
            }
            for t in (before, after)
        )
        rows = [int((old["gate_up_proj"] == row).all(1).nonzero()[0]) for row in new["gate_up_proj"]]
        assert [row % 2 for row in rows] == [0, 1] * 64  # gate and up alternate
        kept = [row // 2 for row in rows[::2]]
        assert torch.equal(new["down_proj"], old["down_proj"][:, kept])
        bias = f"{name}gate_up_proj_bias"
        assert torch.equal(after[bias][expert], before[bias][expert][rows])
    assert same_bits(after[f"{name}down_proj_bias"], before[f"{name}down_proj_bias"])


def test_composed_with_drop_in_either_order(models: Any, tmp_path: Path) -> None:
    path = models("qwen3_moe")

    def steps(*names: str) -> Plan:
        plan = plan_of(open_checkpoint(path))
        for name in names:
            plan = apply(plan, name, **({"experts": [1, 6]} if name == "drop-experts" else {"width": 16}))
        return plan

    write_plan(steps("drop-experts", "slim-experts"), tmp_path / "one")
    write_plan(steps("slim-experts", "drop-experts"), tmp_path / "other")
    write_plan(steps("drop-experts"), tmp_path / "dropped")
    slim(tmp_path / "dropped", tmp_path / "in-turn", width=16)
    one, other, in_turn = (read_tensors(tmp_path / name) for name in ("one", "other", "in-turn"))
    assert one.keys() == other.keys() == in_turn.keys()
    assert all(same_bits(one[n], other[n]) and same_bits(one[n], in_turn[n]) for n in one)
    assert read_config(tmp_path / "one") == read_config(tmp_path / "in-turn")


def test_shared_experts_and_dense_ffns_of_their_own_width(models: Any, tmp_path: Path) -> None:
    shared = slim(models("qwen2_moe"), tmp_path / "shared", shared=40)
    assert read_config(shared)["shared_expert_intermediate_size"] == 40
    assert read_config(shared)["moe_intermediate_size"] == 24
    load(shared)
    both = slim(models("glm4_moe"), tmp_path / "dense", dense=32, width=16)
    assert (read_config(both)["intermediate_size"], read_config(both)["moe_intermediate_size"]) == (32, 16)
    load(both)


@pytest.mark.parametrize(
    ("model_type", "parameters", "message"),
    [
        ("mixtral", {}, "needs one of width, shared, dense and plan_file"),
        ("mixtral", {"width": 49}, "there are 48 neurons, fewer than 49"),
        ("mixtral", {"width": 16, "by": "obs"}, "needs to see the model run"),
        ("mixtral", {"shared": 8}, "have the width of the routed ones"),
        ("mixtral", {"dense": 8}, "no dense FFNs"),
        ("qwen3_moe", {"shared": 8}, "have the width of the routed ones"),
        ("deepseek_v3", {"width": 16, "shared": 24}, "as wide as a routed one"),
        ("doge", {"width": 8}, "an expert is one neuron"),
    ],
)
def test_refused(models: Any, model_type: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises((RefusedError, RecipeError), match=message) as refused:
        apply(plan_of(open_checkpoint(models(model_type))), "slim-experts", **parameters)
    assert refused.value.hint or model_type == "doge"


def test_validate_and_diff_understand_it(models: Any, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    path = models("qwen3_moe")
    ok("slim-experts", path, "--width", 16, "-o", tmp_path / "out")
    found = cli("validate", tmp_path / "out", "--level", "values", "--against", path, "--json")
    assert found.code == 0, found.out
    assert json.loads(found.out)["findings"] == []
    assert "moe_intermediate_size: 24 -> 16" in cli("diff", path, tmp_path / "out").out
