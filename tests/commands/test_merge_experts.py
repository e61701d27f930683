"""Merging experts: what it keeps exactly, what it computes, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.moe.clustering import clusters
from moesurgery.moe.neuron_matching import matched_rows
from tests.conftest import Result
from tests.quantise import fp8_value, make_fp8, rewrite
from tests.tiny import TINY, load, logits, read_config, read_tensors, same_bits
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
EXPERTS = 8
ROUTER = re.compile(r"\.(gate|router|router\.layer)\.(weight|bias)$|correction_bias$|expert_bias$")


def merged(model: Path, out: Path, **parameters: Any) -> dict[str, Any]:
    plan = apply(plan_of(open_checkpoint(model)), "merge-experts", **parameters)
    write_plan(plan, out)
    return dict(plan.steps[-1].report)


def with_experts(path: Path, target: Path, order: list[int], **config: Any) -> None:
    """Write a checkpoint whose experts in each layer are those of `path` in `order`, routers alike."""
    before = read_tensors(path)
    after: dict[str, torch.Tensor] = {}
    for name, tensor in before.items():
        number = re.search(r"experts\.(\d+)\.", name)
        if number:
            for new in (n for n, old in enumerate(order) if old == int(number[1])):
                after[name.replace(f"experts.{number[1]}.", f"experts.{new}.")] = tensor.clone()
        elif ROUTER.search(name) or (tensor.dim() > 1 and tensor.shape[0] == EXPERTS and "layers" in name):
            after[name] = tensor[order] if tensor.shape[0] == EXPERTS else tensor[:, order]
        else:
            after[name] = tensor
    rewrite(path, target, after, config)


# Exactness


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("align", ["none", "weights"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe", "qwen2_moe", "deepseek_v3"])
def test_copies_merged_back_give_the_original(
    models: Any, tmp_path: Path, model_type: str, align: str, fused: bool
) -> None:
    """All experts twice and twice the top-k, merged back by their router rows: the same logits all along."""
    changes: dict[str, Any] = {"norm_topk_prob": True} if model_type == "qwen2_moe" else {}
    if model_type == "deepseek_v3":
        changes = {"n_group": 1, "topk_group": 1}
    path = models(model_type, fused=fused, **changes)
    key = (
        "n_routed_experts"
        if model_type == "deepseek_v3"
        else "num_experts"
        if "qwen" in model_type
        else "num_local_experts"
    )
    twice = [3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 4, 7, 6, 5]
    with_experts(path, tmp_path / "twice", twice, num_experts_per_tok=4, **{key: 16})
    expected = logits(load(path))
    assert (logits(load(tmp_path / "twice")) - expected).abs().max() < 2e-6
    plan = apply(plan_of(open_checkpoint(tmp_path / "twice")), "merge-experts", to=8, align=align)
    assert all(
        sorted(twice[e] for e in g) in [[e, e] for e in range(8)] for g in plan.steps[0].report["layers"][0]["groups"]
    )
    write_plan(apply(plan, "rescale", top_k=2, scale="none"), tmp_path / "back")
    assert (logits(load(tmp_path / "back")) - expected).abs().max() < 2e-6


def permuted_neurons(name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Expert 1 becomes expert 0 with its neurons in another order, written out for each form of storage."""
    tensor = tensor.clone()
    first, second = tensor[0], tensor[1]
    if name.endswith(("gate_up_proj", "gate_up_proj_bias", "input_linear.weight")):
        if first.shape[-1] == 2 * len(order) and "gpt_oss" in name:  # interleaved along the last axis
            second.view(*second.shape[:-1], len(order), 2).copy_(
                first.view(*first.shape[:-1], len(order), 2)[..., order, :]
            )
        else:  # gate rows, then up rows
            second.copy_(torch.cat([first[: len(order)][order], first[len(order) :][order]]))
    elif name.endswith("down_proj_bias"):
        second.copy_(first)
    elif "gpt_oss" in name:  # down is [I, H]
        second.copy_(first[order])
    else:  # down is [H, I]
        second.copy_(first[:, order])
    return tensor


WIDTH = {"mixtral": 48, "gpt_oss": 32, "granitemoe": 48, "qwen3_moe": 24}


def with_permuted_copy(path: Path, target: Path, model_type: str) -> None:
    """Write a checkpoint whose expert 1 is expert 0 with its neurons in another order, in every layer."""
    before = read_tensors(path)
    order = torch.randperm(WIDTH[model_type], generator=torch.Generator().manual_seed(5))
    for name, tensor in list(before.items()):
        if match := re.search(r"experts\.1\.(.*)", name):
            source = before[name.replace("experts.1.", "experts.0.")]
            down = match[1] in ("w2.weight", "down_proj.weight")
            before[name] = source[:, order].clone() if down else source[order].clone()
        elif re.search(r"experts\.(gate_up|down)_proj|(input|output)_linear", name) and tensor.shape[0] == EXPERTS:
            before[name] = permuted_neurons(f"{model_type} {name}", tensor, order)
    rewrite(path, target, before, {})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", WIDTH)
def test_an_expert_merged_with_a_permuted_copy_returns_itself(
    models: Any, tmp_path: Path, model_type: str, fused: bool
) -> None:
    with_permuted_copy(models(model_type, fused=fused), tmp_path / "model", model_type)
    report = merged(tmp_path / "model", tmp_path / "out", groups=[[0, 1]], align="weights")
    assert report["experts"] == 7
    merged(tmp_path / "model", tmp_path / "plain", groups=[[0, 1]])
    keep = [0, 2, 3, 4, 5, 6, 7]
    write_plan(apply(plan_of(open_checkpoint(tmp_path / "model")), "drop-experts", keep=keep), tmp_path / "expected")
    after, expected, plain = (read_tensors(tmp_path / n) for n in ("out", "expected", "plain"))
    assert all(same_bits(after[n], expected[n]) for n in expected)
    assert not all(same_bits(plain[n], expected[n]) for n in expected)  # without matching it is another expert


def test_merging_nothing_is_byte_identical(models: Any, tmp_path: Path) -> None:
    for n, parameters in enumerate(({"groups": [[3]]}, {"to": 8, "router": "mean", "align": "weights"})):
        for model_type in ("mixtral", "gpt_oss"):
            out = tmp_path / f"{n}{model_type}"
            merged(models(model_type), out, **parameters)
            for file in (*models(model_type).glob("*.safetensors"), models(model_type) / "config.json"):
                assert (out / file.name).read_bytes() == file.read_bytes()


# What is computed


@pytest.mark.parametrize("fused", [False, True])
def test_shares_and_router_rows_by_hand(models: Any, tmp_path: Path, fused: bool) -> None:
    path = models("mixtral", fused=fused, dtype="bfloat16")
    weights = [1.0, 0, 0, 0, 3.0, 1.0, 1.0, 0.5]
    merged(path, tmp_path / "out", groups=[[0, 4], [7, 5, 6]], weights=weights, router="mean")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    new = [[0, 4], [1], [2], [3], [7, 5, 6]]
    for name, tensor in after.items():
        if (fused and ".experts." in name) or re.search(r"gate\.weight$", name):
            old, found = before[name], tensor
        elif ".experts.4." in name:
            old = torch.stack([before[name.replace(".experts.4.", f".experts.{e}.")] for e in range(8)])
            found = torch.stack([after[name.replace(".experts.4.", f".experts.{e}.")] for e in range(5)])
        else:
            assert ".experts." in name or same_bits(tensor, before[name])
            continue
        for n, group in enumerate(new):
            share = [weights[e] / sum(weights[e] for e in group) if len(group) > 1 else 1.0 for e in group]
            exact = sum(s * old[e].double() for s, e in zip(share, group, strict=True))
            assert (found[n].double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize(("weights", "row"), [("equal", 6), ([1, 1, 1, 2, 1, 1, 1, 1], 3), ("router-norm", None)])
def test_the_dominant_members_row_stays(models: Any, tmp_path: Path, weights: Any, row: int | None) -> None:
    path = models("gpt_oss")
    merged(path, tmp_path / "out", groups=[[6, 3]], weights=weights)
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    for name in before:
        if re.search(r"router\.(weight|bias)$", name):
            rows = before[name.replace("bias", "weight")]
            norms = (rows - rows.mean(0)).norm(dim=1)
            chosen = row if row is not None else max((6, 3), key=lambda e, n=norms: float(n[e]))
            assert same_bits(after[name], before[name][[0, 1, 2, chosen, 4, 5, 7]])


@pytest.mark.parametrize("model_type", TINY)
def test_the_result_loads_and_shrinks(models: Any, tmp_path: Path, model_type: str) -> None:
    """For every family of the table: it merges, loads and computes, or it refuses by name."""
    path = models(model_type)
    plan = plan_of(open_checkpoint(path))
    if reason := plan.anatomy.family.refuses.get("merge-experts"):
        with pytest.raises(RefusedError, match=re.escape(reason)):
            apply(plan, "merge-experts", to=4)
        return
    reduced = apply(plan, "merge-experts", to=4, align="weights")
    assert reduced.nbytes < plan.nbytes
    write_plan(reduced, tmp_path / "out")
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


def test_matching_equals_brute_force() -> None:
    from itertools import permutations

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 10, generator=generator) for _ in range(2))
    (order,) = matched_rows(a, b)
    best = min(permutations(range(6)), key=lambda p: float((a - b[list(p)]).square().sum()))
    assert order.tolist() == list(best)


def test_matching_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 8), torch.randn(50, 8)
    whole = matched_rows(a, b)[0]
    monkeypatch.setattr("moesurgery.moe.neuron_matching._BLOCK", 7)
    assert torch.equal(matched_rows(a, b)[0], whole)
    with pytest.raises(RefusedError, match="NaN"):
        matched_rows(a, b / 0)


def test_clusters_of_router_rows() -> None:
    points = torch.tensor([[0.0, 0], [9, 9], [0, 1], [5, 0], [9, 8], [0.5, 0.5], [5, 1], [20, 20]])
    assert clusters(points.numpy(), 4) == [[0, 2, 5], [1, 4], [3, 6], [7]]
    assert clusters(points.numpy(), 4, parts=2) == [[0, 2, 3], [1], [4, 5, 6], [7]]
    same = torch.zeros(8, 3).numpy()  # ties on every level: still exactly as many as asked
    assert sorted(e for c in clusters(same, 3) for e in c) == list(range(8))
    assert len(clusters(same, 3)) == 3


def test_clusters_stay_inside_router_groups(models: Any) -> None:
    report = apply(plan_of(open_checkpoint(models("deepseek_v3"))), "merge-experts", to=4).steps[0].report
    for layer in report["layers"]:
        assert len(layer["groups"]) == 4
        assert all(len({e // 4 for e in group}) == 1 for group in layer["groups"])


def test_threads_and_processes_give_the_same_bytes(models: Any, tmp_path: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from moesurgery import WriteOptions

    plan = apply(plan_of(open_checkpoint(models("mixtral"))), "merge-experts", to=3, align="weights", router="mean")
    write_plan(plan, tmp_path / "a", WriteOptions(jobs=1))
    write_plan(plan, tmp_path / "b", WriteOptions(jobs=8))
    write_plan(plan, tmp_path / "c", make_executor=lambda: ProcessPoolExecutor(2, get_context("spawn")))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")


# Refusals


@pytest.mark.parametrize(
    ("model_type", "parameters", "message", "hint"),
    [
        ("mixtral", {"to": 9}, "fewer than 9", None),
        ("mixtral", {"to": 1}, "routed to 2", "rescale: {top_k: 1}"),
        ("mixtral", {"groups": [[0, 8]]}, "no expert 8", None),
        ("mixtral", {"groups": [[0, 1], [1, 2]]}, "named twice", None),
        ("mixtral", {"groups": {0: [[0, 1]]}}, "7 experts are left in model.layers.0, 8", None),
        ("mixtral", {"groups": [[0, 1]], "weights": [1.0]}, "8 experts", "one number"),
        ("mixtral", {"groups": [[0, 1]], "weights": [0.0] * 8}, "all zero", None),
        ("deepseek_v3", {"groups": [[0, 7]]}, "routed in groups of 4", "one group"),
        ("deepseek_v3", {"groups": [[0, 1]]}, "7 experts do not divide", None),
        ("deepseek_v3", {"groups": [[0, 1, 2]]}, "2, 4 experts would be left", None),
        ("deepseek_v3", {"to": 5}, "do not divide", None),
    ],
)
def test_refusals(models: Any, model_type: str, parameters: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        apply(plan_of(open_checkpoint(models(model_type))), "merge-experts", **parameters)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize("parameters", [{}, {"groups": [[0, 1]], "to": 4}])
def test_one_choice_and_only_one(models: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="one of groups, to and plan_file"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "merge-experts", **parameters)


def test_the_mean_of_quantised_experts_is_quantised_as_they_were(models: Any, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3"), tmp_path / "fp8")
    plan = plan_of(open_checkpoint(tmp_path / "fp8"))
    write_plan(apply(plan, "merge-experts", groups=[[0, 1], [4, 5]]), tmp_path / "out")
    kept = {1: 2, 2: 3, 4: 6, 5: 7}
    before, after = read_tensors(tmp_path / "fp8"), read_tensors(tmp_path / "out")
    for name, scales in after.items():
        if ".experts." in name and name.endswith("_scale_inv"):
            main = name.removesuffix("_scale_inv")
            expert = int(name.split(".experts.")[1].split(".")[0])
            if expert in kept:  # moved, byte for byte
                old = main.replace(f".experts.{expert}.", f".experts.{kept[expert]}.")
                assert same_bits(after[main], before[old])
                assert same_bits(scales, before[f"{old}_scale_inv"])
                continue
            one, other = (main.replace(f".experts.{expert}.", f".experts.{e}.") for e in ((4, 5) if expert else (0, 1)))
            mean = sum(fp8_value(before[n], before[f"{n}_scale_inv"]) for n in (one, other)) / 2
            assert float((fp8_value(after[main], scales) - mean).norm() / mean.norm()) < 0.04


# The command


def test_the_command(demo: Path, ok: Cli, tmp_path: Path) -> None:
    arguments = ["--groups", "[[0, 1], [4, 7, 5]]", "--align", "weights"]
    out = ok("merge-experts", demo, *arguments, "-o", tmp_path / "a").out
    assert "8 experts merged into 5 in each of 6 layers" in out
    assert "0+1  4+7+5" in out
    assert "dropping usually costs less" in out
    assert read_config(tmp_path / "a")["num_local_experts"] == 5
    (tmp_path / "r.yaml").write_text(ok("merge-experts", demo, *arguments, "--print-recipe").out)
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
