"""Aligning experts and neurons of models that were trained apart, by copies permuted with torch alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Result
from tests.quantise import fp8_value, make_fp8, rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Cli = Callable[..., Result]
Merge = Callable[..., dict[str, torch.Tensor]]
EXPERTS = 8


@pytest.fixture
def merge(ok: Cli, tmp_path: Path) -> Merge:
    def run(text: str) -> dict[str, torch.Tensor]:
        (tmp_path / "r.yaml").write_text(text)
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force")
        return read_tensors(tmp_path / "out")

    return run


def permuted(source: Path, target: Path, seed: int, *, neurons: bool = False, noise: float = 0.0) -> Path:
    """Write a copy with the experts of every layer in another order, and their neurons if wanted."""
    generator = torch.Generator().manual_seed(seed)
    tensors = read_tensors(source)
    orders: dict[str, torch.Tensor] = {}

    groups = read_config(source).get("n_group", 1)  # the router scores groups: only whole ones may change places

    def order(key: str, count: int) -> torch.Tensor:
        if key not in orders and key.endswith("."):
            size = count // groups
            blocks = [g * size + torch.randperm(size, generator=generator) for g in range(groups)]
            orders[key] = torch.cat([blocks[g] for g in torch.randperm(groups, generator=generator)])
        return orders.setdefault(key, torch.randperm(count, generator=generator))

    found = {}
    for name, value in sorted(tensors.items()):
        layer = re.match(r"model\.(?:language_model\.)?layers\.\d+\.", name)
        value = value + noise * torch.randn(value.shape, generator=generator) if noise else value
        inside = re.fullmatch(r"(.*experts\.)(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight", name)
        if layer and inside:
            experts = order(layer[0], EXPERTS)
            new = int((experts == int(inside[2])).nonzero())
            if neurons:
                down = inside[3] in ("w2", "down_proj")
                rows = order(f"{layer[0]}{inside[2]}", value.shape[1 if down else 0])
                value = value[:, rows] if down else value[rows]
            found[f"{inside[1]}{new}.{inside[3]}.weight"] = value
        elif layer and ".experts." in name and "shared" not in name:  # stacked, interleaved, [E, in, out]: gpt-oss
            if neurons and not name.endswith("down_proj_bias"):
                axis = -2 if name.endswith("down_proj") else -1
                width = value.shape[axis] // (1 if name.endswith("down_proj") else 2)
                parts = []
                for e in range(EXPERTS):
                    rows = order(f"{layer[0]}{e}", width)
                    rows = rows if axis == -2 else torch.stack([2 * rows, 2 * rows + 1], -1).flatten()
                    parts.append(value[e].index_select(0 if name.endswith("bias") else value.dim() + axis - 1, rows))
                value = torch.stack(parts)
            found[name] = value[order(layer[0], EXPERTS)]
        elif layer and EXPERTS in value.shape and re.search(r"\.(gate|router|moe_statics)\.", name):
            found[name] = value.index_select(value.shape.index(EXPERTS), order(layer[0], EXPERTS))
        else:
            found[name] = value
    rewrite(source, target, found, {})
    return target


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_two_permuted_copies_give_the_original_back(
    family: str, neurons: bool, models: Any, merge: Merge, tmp_path: Path
) -> None:
    original = models(family)
    first = permuted(original, tmp_path / "first", 1, neurons=neurons)
    second = permuted(original, tmp_path / "second", 2, neurons=neurons)
    assert not all(same_bits(value, read_tensors(second)[name]) for name, value in read_tensors(first).items())
    text = f"models: [{{model: {first}}}, {{model: {second}}}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
    found = merge(text + f"align: {'[experts, neurons]' if neurons else 'experts'}\n")
    for name, value in read_tensors(first).items():
        assert same_bits(found[name], value), name
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(original)), rtol=1e-4, atol=1e-4)
    plain = merge(text)
    assert not all(same_bits(plain[name], value) for name, value in read_tensors(first).items())


@pytest.mark.parametrize("family", ["ernie4_5_moe", "gemma4"])
def test_all_that_follows_the_experts_and_nothing_else(family: str, models: Any, merge: Merge, tmp_path: Path) -> None:
    """A selection bias along axis 1 goes with them; a `router.scale` of the hidden size does not."""
    original = models(family)
    other = permuted(original, tmp_path / "other", 1)
    torch.testing.assert_close(logits(load(other)), logits(load(original)), rtol=1e-4, atol=1e-4)
    found = merge(
        f"models: [{{model: {original}}}, {{model: {other}}}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
        "align: experts\n"
    )
    for name, value in read_tensors(original).items():
        assert same_bits(found[name], value), name


@pytest.mark.parametrize(
    ("family", "code", "message"),
    [
        ("doge", 2, "the router of doge has no row for each expert"),
        (
            "ernie4_5_vl_moe",
            2,
            "the experts of ernie4_5_vl_moe share numbers and a selection bias",
        ),
        ("nllb-moe", 0, "align: the experts of model.encoder.layers.1 keep their order"),
        ("jetmoe", 0, "align: the experts of model.layers.0.self_attention, model.layers.1"),
    ],
)
def test_experts_that_keep_their_places_are_named(
    family: str, code: int, message: str, models: Any, cli: Cli, tmp_path: Path
) -> None:
    base, twin = (shutil.copytree(models(family), tmp_path / name) for name in (family, "twin"))
    (tmp_path / "r.yaml").write_text(
        f"models: [{base}, {twin}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\nalign: experts\n"
    )
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == code
    assert f"r.yaml:4: {message}" in result.err


def test_the_base_gives_the_order_and_noise_does_not_confuse_it(models: Any, merge: Merge, tmp_path: Path) -> None:
    original = models("mixtral")
    others = [permuted(original, tmp_path / str(i), i, neurons=True, noise=0.01) for i in (3, 4)]
    found = merge(
        f"models: [{{model: {others[0]}}}, {{model: {others[1]}}}]\nbase_model: {original}\n"
        "merge_method: task_arithmetic\nparameters: {weight: 0.5}\nalign: [experts, neurons]\n"
    )
    for name, value in read_tensors(original).items():
        assert float((found[name] - value).abs().max()) < 0.05, name


def test_layouts_mix_under_alignment(models: Any, merge: Merge, tmp_path: Path) -> None:
    hub, stacked = models("mixtral"), models("mixtral", fused=True)
    other = permuted(hub, tmp_path / "other", 5, neurons=True)
    found = merge(
        f"models: [{{model: {stacked}}}, {{model: {other}}}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
        "align: [experts, neurons]\n"
    )
    for name, value in read_tensors(stacked).items():
        assert same_bits(found[name], value), name


def test_projections_are_matched_with_their_like_however_files_order_them(
    models: Any, merge: Merge, tmp_path: Path
) -> None:
    """Square projections, routers of zeros, one up-projection for all: only gate and down tell the experts apart."""
    places = []
    for fused in (True, False):
        source = models("mixtral", fused=fused, intermediate_size=32)
        held = {n: t * 0 if t.shape == (EXPERTS, 32) else t for n, t in read_tensors(source).items()}
        for name, value in held.items():
            if name.endswith("gate_up_proj"):
                value[:, 32:] = value[0, 32:]
            elif name.endswith("w3.weight"):
                held[name] = held[re.sub(r"experts\.\d+", "experts.0", name)].clone()
        rewrite(source, tmp_path / f"{fused}", held, {})
        places.append(tmp_path / f"{fused}")
    other = permuted(places[1], tmp_path / "other", 6, neurons=True)
    found = merge(
        f"models: [{{model: {places[0]}}}, {{model: {other}}}]\nmerge_method: linear\n"
        "parameters: {weight: 0.5}\nalign: [experts, neurons]\n"
    )
    for name, value in read_tensors(places[0]).items():
        assert same_bits(found[name], value), name


def test_quantised_models_merge_as_the_numbers_they_stand_for(models: Any, merge: Merge, tmp_path: Path) -> None:
    plain = models("deepseek_v3")
    make_fp8(plain, tmp_path / "fp8")
    found = merge(
        f"models: [{{model: {tmp_path / 'fp8'}}}, {{model: {plain}}}]\nmerge_method: linear\n"
        "parameters: {weight: 0.5}\ndtype: float32\n"
    )
    source, coded = read_tensors(plain), read_tensors(tmp_path / "fp8")
    assert found.keys() == source.keys()
    for name, value in source.items():
        scales = coded.get(f"{name}_scale_inv")
        other = coded[name] if scales is None else fp8_value(coded[name], scales)
        torch.testing.assert_close(found[name], (value + other) / 2, rtol=1e-6, atol=1e-7)
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


def test_stacking_leaves_quantised_weights_as_they_are(models: Any, merge: Merge, cli: Cli, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3"), tmp_path / "fp8")
    text = f"slices: [{{sources: [{{model: {tmp_path / 'fp8'}, layer_range: [0, 2]%s}}]}}]\nmerge_method: passthrough\n"
    found = merge(text % "")
    for name, value in read_tensors(tmp_path / "fp8").items():
        assert same_bits(found[name], value)
    assert "quantization_config" in read_config(tmp_path / "out")
    (tmp_path / "r.yaml").write_text(text % ", parameters: {scale: 2}")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "no")
    assert result.code == 2
    assert "give `dtype: bfloat16`" in result.err
