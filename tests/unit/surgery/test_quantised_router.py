"""Routers that are quantised like other linears: they follow the experts in every form, or the edit is refused.

What a form stands for is told by loops over its elements (`tests.quantise`), not by the code under test.
"""

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
from tests.quantise import FORMS, Parts, bits_at, by_element, near_one, rewrite, words
from tests.tiny import read_config, read_tensors, same_bits, save_tiny
from tests.unit.families.test_quantised import counts

Cli = Callable[..., Result]
EXPERTS, HIDDEN = 16, 32
ROUTERS = {
    "qwen3_moe": "model.layers.{}.mlp.gate",
    "mixtral": "model.layers.{}.block_sparse_moe.gate",
    "gpt_oss": "model.layers.{}.mlp.router",
}
# Forms in which one output cannot be told from another, and why.
STUCK = {
    "fp8-e8m0": r"\[2, 4\] has entries for blocks of outputs",
    "bnb-nf4": "its bitsandbytes form does not tell which part is whose",
    "bnb-nf4-double": "its bitsandbytes form does not tell which part is whose",
}


def zero_points(out: int, into: int, g: torch.Generator) -> Parts:
    """Asymmetric integers of compressed-tensors: zero points of eight outputs to a word, along the first axis."""
    return {
        ".weight_packed": words(g, out, into // 8),
        ".weight_scale": near_one(g, out, into // 8, dtype=torch.bfloat16),
        ".weight_zero_point": words(g, into // 8, -(-out // 8)).T.contiguous(),
        ".weight_shape": torch.tensor([out, into]),
    }


def zero_points_value(parts: Parts, out: int, into: int) -> torch.Tensor:
    packed, scale, zeros = (parts[f".weight_{name}"] for name in ("packed", "scale", "zero_point"))

    def element(o: int, i: int) -> float:
        zero = bits_at(int(zeros[o // 8, i // 8]), 4, o % 8)
        return (bits_at(int(packed[o, i // 8]), 4, i % 8) - zero) * float(scale[o, i // 8])

    return by_element(element)(out, into)


MAKE = {name: form.make for name, form in FORMS.items()} | {"int4-asymmetric": zero_points}
VALUE = {name: form.value for name, form in FORMS.items()} | {"int4-asymmetric": zero_points_value}
METHOD = {name: form.method for name, form in FORMS.items()} | {"int4-asymmetric": "compressed-tensors"}


def settings(name: str) -> dict[str, Any]:
    more = FORMS[name].config if name in FORMS else FORMS["int4"].config
    return {"quantization_config": {"quant_method": METHOD[name], **more}}


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a tiny model of 16 experts whose routers are in one quantised form."""
    made: dict[tuple[str, str, int], Path] = {}

    def get(name: str, model_type: str = "qwen3_moe", experts: int = EXPERTS) -> Path:
        if (name, model_type, experts) not in made:
            folder = tmp_path_factory.mktemp(name)
            key = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
            save_tiny(model_type, folder / "plain", **{key: experts})
            generator, tensors = torch.Generator().manual_seed(5), {}
            router = ROUTERS[model_type].format("").split(".")[-1]
            for tensor_name, tensor in read_tensors(folder / "plain").items():
                if tensor_name.endswith(f".{router}.weight"):
                    parts = MAKE[name](experts, HIDDEN, generator)
                    tensors |= {tensor_name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
                else:
                    tensors[tensor_name] = tensor
            rewrite(folder / "plain", folder / "m", tensors, settings(name))
            made[name, model_type, experts] = folder / "m"
        return made[name, model_type, experts]

    return get


def router(path: Path, name: str, model_type: str, outputs: int, layer: int = 1) -> torch.Tensor:
    """Return what the router of one layer stands for, [outputs, H]."""
    base = ROUTERS[model_type].format(layer)
    parts = {n.removeprefix(base): t for n, t in read_tensors(path).items() if n.startswith(base + ".")}
    parts.pop(".bias", None)
    if ".weight_shape" in parts:
        assert parts[".weight_shape"].tolist() == [outputs, HIDDEN]
    return VALUE[name](parts, outputs, HIDDEN)


@pytest.mark.parametrize("model_type", ROUTERS)
@pytest.mark.parametrize("name", MAKE)
def test_the_router_follows_or_the_edit_is_refused(
    quantised: Callable[..., Path], tmp_path: Path, name: str, model_type: str
) -> None:
    path = quantised(name, model_type)
    kept = [0, 3, 4, 7, 8, 10, 13, 15]
    plan = plan_of(open_checkpoint(path))
    if name in STUCK:
        with pytest.raises(
            RefusedError, match=f"the router is quantised, and could not follow: {STUCK[name]}"
        ) as caught:
            apply(plan, "drop-experts", keep=kept)
        assert "convert --dequantize" in str(caught.value.hint)
        return
    write_plan(apply(plan, "drop-experts", keep=kept), tmp_path / "out")
    before, after = router(path, name, model_type, EXPERTS), router(tmp_path / "out", name, model_type, 8)
    assert torch.equal(after, before[kept])
    bias = ROUTERS[model_type].format(1) + ".bias"
    if bias in read_tensors(path):
        assert same_bits(read_tensors(tmp_path / "out")[bias], read_tensors(path)[bias][kept])


@pytest.mark.parametrize("name", MAKE)
def test_a_number_of_experts_that_does_not_fill_words(
    quantised: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Outputs that are packed along the last axis come in whole words; elsewhere any number may stay."""
    kept = [1, 2, 5, 6, 11]
    plan = plan_of(open_checkpoint(quantised(name)))
    if name in ("gptq", "awq"):
        with pytest.raises(RefusedError, match=r"packs the router's outputs 8 to a word, and 5 experts") as caught:
            apply(plan, "drop-experts", keep=kept)
        assert "leave a multiple of 8 experts" in str(caught.value.hint)
    elif name not in STUCK:
        write_plan(apply(plan, "drop-experts", keep=kept), tmp_path / "out")
        before = router(quantised(name), name, "qwen3_moe", EXPERTS)
        assert torch.equal(router(tmp_path / "out", name, "qwen3_moe", 5), before[kept])


def test_blocks_of_outputs_are_refused(quantised: Callable[..., Path]) -> None:
    """FP8 in blocks of 16 rows: with 16 experts all rows are in one block, with 32 they are not."""
    plan = plan_of(open_checkpoint(quantised("fp8-block", experts=32)))
    with pytest.raises(
        RefusedError, match=r"weight_scale_inv: the router is quantised.*\[2, 2\] has entries for blocks"
    ):
        apply(plan, "drop-experts", experts=[0])


@pytest.mark.parametrize("name", MAKE)
def test_other_operations(quantised: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = quantised(name)
    plan = plan_of(open_checkpoint(path))
    with pytest.raises(RefusedError, match="quantised") as caught:
        apply(plan, "merge-experts", groups=[[0, 1]], router="mean")
    assert "convert --dequantize" in str(caught.value.hint)
    with pytest.raises(RefusedError, match="is part of a quantised router, which takes no rows of another"):
        apply(plan, "add-expert", source=str(path), experts=[0])
    write_plan(apply(plan, "convert", layout="fused"), tmp_path / "fused")
    base = ROUTERS["qwen3_moe"].format(1)
    before, fused = read_tensors(path), read_tensors(tmp_path / "fused")
    assert all(same_bits(fused[n], t) for n, t in before.items() if n.startswith(base))


def test_a_dense_model_keeps_nothing_of_a_quantised_router(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "plain", mlp_only_layers=[])
    for name in MAKE:
        generator, tensors = torch.Generator().manual_seed(5), read_tensors(tmp_path / "plain")
        for base in [n.removesuffix(".weight") for n in tensors if n.endswith(".mlp.gate.weight")]:
            del tensors[f"{base}.weight"]
            tensors |= {base + suffix: part for suffix, part in MAKE[name](8, HIDDEN, generator).items()}
        rewrite(tmp_path / "plain", tmp_path / name, tensors, settings(name))
        plan = apply(plan_of(open_checkpoint(tmp_path / name)), "to-dense", expert=0)
        assert not [n for n in plan.tensors if ".mlp.gate." in n], name


@pytest.mark.parametrize("name", MAKE)
def test_it_counts_as_a_router(quantised: Callable[..., Path], tmp_path: Path, ok: Cli, name: str) -> None:
    path = quantised(name)
    found, plain = (counts(p) for p in (path, path.parent / "plain"))
    assert found.components == plain.components
    shown = json.loads(ok("inspect", path, "--json").out)
    assert not shown.get("unrecognised")
    assert not [f for f in validate_checkpoint(path, level="config").findings if f.severity == "error"]


@pytest.mark.parametrize("name", ["gptq", "awq", "int4", "fp8-channel", "nvfp4-modelopt"])
def test_validate_finds_a_router_that_did_not_follow(quantised: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """As older versions wrote it: eight experts, and a router for sixteen."""
    tensors = {n: t for n, t in read_tensors(quantised(name)).items() if not _beyond(n)}
    rewrite(quantised(name), tmp_path / "m", tensors, {**read_config(quantised(name)), "num_experts": 8})
    found = validate_checkpoint(tmp_path / "m", level="config").findings
    assert "has 16 outputs for the 8 experts of its layer" in [f.message for f in found if f.code == "C05"]


def _beyond(name: str) -> bool:
    return ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= 8


@pytest.mark.parametrize("name", ["int4", "fp8-channel", "fp8-block", "nvfp4-modelopt"])
def test_rules_that_read_the_router_read_what_it_stands_for(quantised: Callable[..., Path], name: str) -> None:
    """The shortest rows go, by the values and not by the stored numbers."""
    path = quantised(name)
    plan = apply(plan_of(open_checkpoint(path)), "drop-experts", count=8, by="router-norm")
    rows = router(path, name, "qwen3_moe", EXPERTS)
    order = (rows - rows.mean(0)).norm(dim=1).argsort()
    layer = next(found for found in plan.steps[0].report["layers"] if found["layer"] == "model.layers.1")
    assert layer["dropped"] == sorted(order[:8].tolist())


def test_a_router_that_is_not_known_is_refused(tmp_path: Path, ok: Cli) -> None:
    """HQQ and its like: other names. Neither left behind nor taken for a dense FFN."""
    save_tiny("qwen3_moe", tmp_path / "plain")
    tensors = read_tensors(tmp_path / "plain")
    for base in [n.removesuffix(".weight") for n in tensors if n.endswith(".mlp.gate.weight")]:
        del tensors[f"{base}.weight"]
        tensors |= {f"{base}.W_q": torch.zeros(4, 32, dtype=torch.uint8), f"{base}.meta": torch.zeros(3)}
    rewrite(tmp_path / "plain", tmp_path / "m", tensors, {"quantization_config": {"quant_method": "hqq"}})
    for operation, how in (("drop-experts", {"experts": [0]}), ("to-dense", {"expert": 0})):
        with pytest.raises(
            RefusedError, match=r"has no router under a name that is known \(model.layers.1.mlp.gate.weight\)"
        ):
            apply(plan_of(open_checkpoint(tmp_path / "m")), operation, **how)
    tensors |= {n.replace("W_q", "weight"): torch.zeros(8, 32) for n in tensors if n.endswith("W_q")}
    rewrite(tmp_path / "plain", tmp_path / "both", tensors, {})
    with pytest.raises(RefusedError, match="stands with the experts or their router"):
        apply(plan_of(open_checkpoint(tmp_path / "both")), "drop-experts", experts=[0])
    components = counts(tmp_path / "m").components
    assert components["router"] > 0
    assert components.get("dense_ffn", 0) == counts(tmp_path / "plain").components.get("dense_ffn", 0)
