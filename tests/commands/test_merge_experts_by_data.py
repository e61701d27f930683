"""Merging experts by what they do: groups, neuron orders, router rows, against loops over transformers' own numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RecipeError, RefusedError
from moesurgery.fitting.collector import collect
from moesurgery.fitting.group_fit import RIDGE, fit_groups
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens, padded
from moesurgery.moe.clustering import around_centroids
from moesurgery.stats.criteria import scores
from moesurgery.stats.group_fit_file import save_group_fits
from moesurgery.stats.repair_file import FittedBlock
from moesurgery.stats.statistics_file import Stats
from moesurgery.surgery import group_experts
from tests.commands.test_drop_experts import with_prediction_layer
from tests.commands.test_merge_experts import EXPERTS, with_experts, with_permuted_copy
from tests.conftest import Result
from tests.quantise import make_form, rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits
from tests.unit.fitting.test_collector import Seen, assert_close
from tests.unit.fitting.test_layer_fit import TEXT
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
SEEN = TEXT[:2]


def stats_of(path: Path, out: Path, *, every_expert: bool = True) -> tuple[Stats, str]:
    stats = collect(Engine(plan_of(open_checkpoint(path))), Tokens(SEEN), every_expert=every_expert)
    return stats, str(stats.save(out))


def fit_of(path: Path, out: Path, tokens: Tokens | None = None, **parameters: Any) -> str:
    """What `--text` makes for a merge: the side file with neuron orders and router rows."""
    plan = plan_of(open_checkpoint(path))
    merge = group_experts.merger(plan, **parameters, fitted=True)
    fits = fit_groups(Engine(plan), tokens or Tokens(TEXT), merge)
    save_group_fits(out, fits, merge, {"tokens": TEXT.numel()})
    return str(out)


def merged(path: Path, out: Path, **parameters: Any) -> dict[str, Any]:
    """Fit, merge and write; return what the step reports."""
    fit = fit_of(path, out.with_name(f"{out.name}.fit.safetensors"), **parameters)
    plan = apply(plan_of(open_checkpoint(path)), "merge-experts", fit=fit, **parameters)
    write_plan(plan, out)
    return dict(plan.steps[-1].report)


# Groups


class Routing:
    """One block on all tokens, from transformers' own modules: router scores, who is chosen, what everyone says."""

    def __init__(self, seen: Seen, where: str, sigmoid: bool) -> None:
        hidden, self.index, _ = seen.calls[where]
        module = seen.modules[where]
        self.z = (hidden @ seen.model.get_submodule(f"{where}.mlp.gate").weight.T).double().detach()
        ones = torch.ones(len(hidden), 1)
        with torch.no_grad():
            said = [module(hidden, torch.full((len(hidden), 1), e), ones).double() for e in range(EXPERTS)]
        self.said = torch.stack(said)  # [E, T, H]
        p = self.z.sigmoid() if sigmoid else self.z.softmax(-1)
        self.p = p / p.sum(-1, keepdim=True)

    def usage(self) -> list[int]:
        return [int((self.index == e).sum()) for e in range(EXPERTS)]

    def gated(self) -> torch.Tensor:
        return torch.stack([(self.p[:, e, None] * self.said[e]).sum(0) for e in range(EXPERTS)])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def msmoe(block: Routing, experts: range, count: int) -> set[frozenset[int]]:
    order = sorted(experts, key=lambda e: -block.usage()[e])
    groups = {centre: {centre} for centre in order[:count]}
    for e in order[count:]:
        nearest = max(groups, key=lambda centre: cosine(block.z[:, centre], block.z[:, e]))
        groups[nearest].add(e)
    return {frozenset(group) for group in groups.values()}


def hc(block: Routing, experts: range, count: int) -> set[frozenset[int]]:
    means = block.said.mean(dim=1)
    groups = [frozenset({e}) for e in experts]
    while len(groups) > count:

        def apart(pair: tuple[frozenset[int], frozenset[int]]) -> float:
            return float(np.mean([float((means[i] - means[j]).norm()) for i in pair[0] for j in pair[1]]))

        first, second = min(combinations(groups, 2), key=apart)
        groups = [g for g in groups if g not in (first, second)] + [first | second]
    return set(groups)


def ream(block: Routing, experts: range, count: int, reap: np.ndarray, largest: int) -> set[frozenset[int]]:
    """As ream/ream.py has it: `pseudo_group` on mean gated outputs and gate logits."""
    unit = torch.nn.functional.normalize(block.z.T, dim=-1)
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    near = 1 - distance / distance.max()
    gated = block.gated()
    alike = [[((cosine(gated[i], gated[j]) + 1) / 2 + float(near[i, j])) / 2 for j in range(8)] for i in range(8)]
    centres = sorted(experts, key=lambda e: -reap[e])[:count]
    left = [e for e in experts if e not in centres]
    groups = []
    for centre in centres:
        taken = sorted(left, key=lambda e: -alike[centre][e])[: largest - 1]
        left = [e for e in left if e not in taken]
        groups.append(frozenset({centre, *taken}))
    return set(groups)


@pytest.mark.parametrize(
    ("model_type", "fused"), [("mixtral", False), ("qwen2_moe", True), ("olmoe", False), ("deepseek_v3", True)]
)
def test_groups_by_brute_force(
    models: Any, tmp_path: Path, model_type: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax renormalised and raw, sigmoid with bias and router groups, from the model's own routing."""
    path = models(model_type, fused=fused)
    stats, file = stats_of(path, tmp_path / "s")
    seen = Seen(path, SEEN)
    plan = plan_of(open_checkpoint(path))
    parts = [range(4), range(4, 8)] if model_type == "deepseek_v3" else [range(8)]
    for largest, to in ((16, 6), (16, 4), (2, 4)):
        monkeypatch.setattr(group_experts, "LARGEST", largest)
        found = {
            kind: group_experts.merger(plan, to=to, group=kind, stats=file, protect_super=False).groups  # type: ignore[arg-type]
            for kind in ("msmoe", "hc", "reap-centroid")
        }
        for where in seen.calls:
            block = Routing(seen, where, sigmoid=model_type == "deepseek_v3")
            reap = scores(stats.blocks[where], "reap")
            each = to // len(parts)
            expected = {
                "msmoe": set().union(*(msmoe(block, part, each) for part in parts)),
                "hc": set().union(*(hc(block, part, each) for part in parts)),
                "reap-centroid": set().union(*(ream(block, part, each, reap, largest) for part in parts)),
            }
            for kind, groups in expected.items():
                assert {frozenset(g) for g in found[kind][where]} == groups, (kind, where)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_sums_of_every_expert(models: Any, tmp_path: Path, model_type: str) -> None:
    path = models(model_type)
    stats, _ = stats_of(path, tmp_path / "s")
    seen = Seen(path, SEEN)
    for where, block in stats.blocks.items():
        expected = Routing(seen, where, sigmoid=model_type == "deepseek_v3")
        assert_close(block.total("output_all"), expected.said.sum(1).numpy(), "output_all")
        assert_close(block.total("gated_all"), expected.gated().numpy(), "gated_all")
    assert stats.every_expert
    rows = [SEEN[0].tolist(), SEEN[1, :40].tolist()]
    engine = Engine(plan_of(open_checkpoint(path)))
    short = collect(engine, padded(rows), every_expert=True)
    apart = [collect(engine, Tokens(torch.tensor([row])), every_expert=True) for row in rows]
    for where, block in short.blocks.items():  # padding never counts
        for name in ("output_all", "gated_all"):
            assert_close(block.total(name), sum(s.blocks[where].total(name) for s in apart), name)


def test_centroids_take_what_is_left() -> None:
    likeness = np.array([[1, 0.9, 0.8, 0.7], [0.9, 1, 0.1, 0.2], [0.8, 0.1, 1, 0.3], [0.7, 0.2, 0.3, 1]])
    assert around_centroids([5, 4, 1, 2], likeness, 2) == [[0, 3, 2], [1]]
    assert around_centroids([5, 4, 1, 2], likeness, 2, largest=2) == [[0, 2], [1, 3]]
    assert around_centroids([5, 4, 1, 2], likeness, 2, alone=[0]) == [[0], [1, 3, 2]]
    assert around_centroids([5, 4, 1, 2], likeness, 2, parts=2) == [[0, 1], [3, 2]]


@pytest.mark.parametrize("group", ["msmoe", "reap-centroid", "hc", "router-rows"])
def test_super_experts_stay_alone(models: Any, tmp_path: Path, group: str) -> None:
    path = models("mixtral")
    stats, _ = stats_of(path, tmp_path / "s")
    plan = plan_of(open_checkpoint(path))
    peaks = stats.blocks["model.layers.0"].sums["peak"]
    free = group_experts.merger(plan, to=4, group=group, stats=str(stats.save(tmp_path / "s")), protect_super=False)  # type: ignore[arg-type]
    guarded = next(g for g in free.groups["model.layers.0"] if len(g) > 1)[-1]
    peaks[:, guarded] = 1e4
    parameters = {"to": 4, "group": group, "stats": str(stats.save(tmp_path / "s"))}
    step = apply(plan, "merge-experts", **parameters).steps[0]
    assert [guarded] in step.report["layers"][0]["groups"]
    assert len(step.report["layers"][0]["groups"]) == 4
    assert any(f"model.layers.0: {guarded}" in note for note in step.notes)
    loose = apply(plan, "merge-experts", protect_super=False, **parameters).steps[0]
    assert [guarded] not in loose.report["layers"][0]["groups"]


@pytest.mark.parametrize(("weights", "by"), [("usage", "frequency"), ("reap", "reap"), (None, "frequency")])
def test_shares_follow_the_statistics(models: Any, tmp_path: Path, weights: Any, by: Any) -> None:
    path = models("olmoe")
    stats, file = stats_of(path, tmp_path / "s", every_expert=False)
    chosen = {} if weights is None else {"weights": weights}
    plan = apply(plan_of(open_checkpoint(path)), "merge-experts", groups=[[2, 5, 6]], stats=file, **chosen)
    for layer in plan.steps[0].report["layers"]:
        numbers = scores(stats.blocks[layer["layer"]], by)[[2, 5, 6]]
        assert layer["shares"][layer["groups"].index([2, 5, 6])] == pytest.approx(list(numbers / numbers.sum()))


@pytest.mark.parametrize("by", ["frequency", "soft-frequency", "ean", "reap", "reap-sum"])
def test_which_experts_others_join(models: Any, tmp_path: Path, by: str) -> None:
    path = models("mixtral")
    stats, file = stats_of(path, tmp_path / "s")
    plan = plan_of(open_checkpoint(path))
    for group in ("msmoe", "reap-centroid"):
        parameters = {"to": 3, "group": group, "by": by, "stats": file, "protect_super": False}
        for layer in apply(plan, "merge-experts", **parameters).steps[0].report["layers"]:
            highest = np.argsort(-scores(stats.blocks[layer["layer"]], by))[:3]  # type: ignore[arg-type]
            assert {g[0] for g in layer["groups"]} == set(highest.tolist())


# Neurons


@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("mixtral", False), ("mixtral", True), ("gpt_oss", False), ("granitemoe", False), ("qwen3_moe", True)],
)
def test_a_permuted_copy_gives_the_expert_back(models: Any, tmp_path: Path, model_type: str, fused: bool) -> None:
    with_permuted_copy(models(model_type, fused=fused), tmp_path / "model", model_type)
    merged(tmp_path / "model", tmp_path / "out", groups=[[0, 1]], align="activations")
    keep = [0, 2, 3, 4, 5, 6, 7]
    write_plan(apply(plan_of(open_checkpoint(tmp_path / "model")), "drop-experts", keep=keep), tmp_path / "expected")
    after, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")
    assert all(same_bits(after[n], expected[n]) for n in expected)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_orders_are_the_best_assignment(models: Any, tmp_path: Path, model_type: str) -> None:
    """Cosines of activations over the tokens of either expert and of weights, from transformers' modules."""
    path = models(model_type)
    plan = plan_of(open_checkpoint(path))
    fits = fit_groups(Engine(plan), Tokens(SEEN), group_experts.merger(plan, groups=[[4, 1]], align="activations"))
    seen = Seen(path, SEEN)
    for fit in fits:
        hidden, index, _ = seen.calls[fit.where]
        module = seen.modules[fit.where]
        x = hidden[((index == 4) | (index == 1)).any(1)].double()
        weights, activations = [], []
        for e in (4, 1):
            gate_up, down = module.gate_up_proj[e].double().detach(), module.down_proj[e].double().detach()
            gate, up = gate_up.chunk(2)
            weights.append(torch.nn.functional.normalize(torch.cat([gate, up, down.T], 1), dim=1))
            h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            activations.append(torch.nn.functional.normalize(h, dim=0))
        alike = (weights[0] @ weights[1].T + activations[0].T @ activations[1]).numpy()
        rows, columns = linear_sum_assignment(alike, maximize=True)
        order = fit.orders.pop(1)
        assert not fit.orders
        assert sorted(order) == list(rows)
        assert alike[rows, order].sum() == pytest.approx(alike[rows, columns].sum(), rel=1e-6)


# Router rows


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("mixtral", "num_local_experts"),
        ("olmoe", "num_experts"),
        ("gpt_oss", "num_local_experts"),
        ("ernie4_5_moe", "moe_num_experts"),
    ],
)
def test_copies_merged_back_by_log_sum_exp(models: Any, tmp_path: Path, model_type: str, key: str) -> None:
    """All experts twice, merged back: each pair has the probability that the expert had, whatever the router adds."""
    path = models(model_type)
    twice = [3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 4, 7, 6, 5]
    top_k = "moe_k" if model_type == "ernie4_5_moe" else "num_experts_per_tok"
    with_experts(path, tmp_path / "twice", twice, **{key: 16, top_k: 4})
    pairs = [[i for i, e in enumerate(twice) if e == expert] for expert in range(8)]
    merged(tmp_path / "twice", tmp_path / "merged", groups=pairs, router="lse", align="none")
    plan = apply(plan_of(open_checkpoint(tmp_path / "merged")), "rescale", top_k=2, scale="none")
    write_plan(plan, tmp_path / "back")
    assert (logits(load(tmp_path / "back")) - logits(load(path))).abs().max() < 2e-5
    rows = [n for n in read_tensors(path) if n.endswith(("gate.weight", "router.weight"))]
    assert not any(same_bits(read_tensors(tmp_path / "back")[n], read_tensors(path)[n]) for n in rows)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "gpt_oss"])
def test_the_row_is_the_least_squares_fit(models: Any, tmp_path: Path, model_type: str) -> None:
    path = models(model_type)
    merged(path, tmp_path / "out", groups=[[3, 0], [1, 4, 6]], router="lse", align="none")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    seen = Seen(path, TEXT)
    for name in (n for n in before if n.endswith(("gate.weight", "router.weight"))):
        x = seen.calls[".".join(name.split(".")[:3])][0].double()
        rows = before[name].double()
        bias = before.get(name.replace("weight", "bias"))
        z = x @ rows.T + (0 if bias is None else bias.double())
        ridge = math.sqrt(RIDGE * float((x**2).sum() / x.shape[1])) * torch.eye(x.shape[1], dtype=torch.float64)
        design = torch.cat([x, ridge])
        if bias is not None:  # a bias is fitted without a ridge
            design = torch.cat([design, torch.cat([torch.ones(len(x), 1), torch.zeros(len(ridge), 1)])], dim=1)
        for new, group in ((0, [3, 0]), (1, [1, 4, 6])):
            wanted = torch.cat([z[:, group].logsumexp(1) - z[:, group[0]], torch.zeros(len(ridge))])
            change = torch.linalg.lstsq(design, wanted).solution
            assert (after[name][new] - rows[group[0]] - change[: len(rows[0])]).abs().max() < 1e-4
            if bias is not None:
                found = after[name.replace("weight", "bias")][new]
                assert float(found) == pytest.approx(float(bias[group[0]] + change[-1]), abs=1e-4)
        assert same_bits(after[name][2:], before[name][[2, 5, 7]])


def test_a_group_has_the_highest_selection_bias_of_its_members(models: Any, tmp_path: Path) -> None:
    path = models("ernie4_5_moe")
    merged(path, tmp_path / "out", groups=[[3, 0], [1, 4, 6]], router="lse", align="none")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    names = [n for n in before if n.endswith("correction_bias")]
    assert names
    for name in names:
        bias = before[name][0]
        assert after[name].tolist() == [[*(float(bias[g].max()) for g in ([3, 0], [1, 4, 6])), *bias[[2, 5, 7]]]]


# Repair


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "deepseek_v3"])
def test_a_repair_never_makes_what_it_fits_worse(models: Any, tmp_path: Path, model_type: str) -> None:
    path = models(model_type)
    plan = plan_of(open_checkpoint(path))
    _, stats = stats_of(path, tmp_path / "s", every_expert=False)
    edited = apply(plan, "merge-experts", to=4, stats=stats)
    for kind in ("scalar", "expert", "down"):
        found: list[FittedBlock] = []
        options = RepairOptions(kind, ridge=0.01, minimum=1)  # type: ignore[arg-type]
        fit_layers(Engine(plan), Engine(edited, keep=0), Tokens(TEXT), options, found.append)
        assert all(f.error_after < f.error_before for f in found)
        if kind == "down":
            assert any(f.matrices for f in found)


# What is not run


def test_a_prediction_layer_goes_by_weights(models: Any, tmp_path: Path) -> None:
    """Of a form that is not run it is grouped by router rows, matched by weights; and the step says so."""
    tensors = with_prediction_layer(models("deepseek_v3"), tmp_path / "run")
    del tensors["model.layers.2.hnorm.weight"]
    rewrite(models("deepseek_v3"), tmp_path / "mtp", tensors, {"num_nextn_predict_layers": 1})
    _, stats = stats_of(tmp_path / "mtp", tmp_path / "s", every_expert=False)
    parameters = {"to": 4, "stats": stats, "align": "activations", "weights": "equal"}
    fit = fit_of(tmp_path / "mtp", tmp_path / "fit.safetensors", **parameters)
    plan = plan_of(open_checkpoint(tmp_path / "mtp"))
    edited = apply(plan, "merge-experts", fit=fit, **parameters)
    assert any("not run" in note for note in edited.steps[0].notes)
    by_weights = apply(plan, "merge-experts", to=4, align="weights")
    last = [n for n in edited.tensors if n.startswith("model.layers.2.mlp")]
    assert last
    assert all(edited.tensors[n] == by_weights.tensors[n] for n in last)


# Refusals


def test_routers_without_a_log_sum_exp(models: Any, tmp_path: Path) -> None:
    for model_type in ("deepseek_v3", "minimax_m2"):
        plan = plan_of(open_checkpoint(models(model_type)))
        with pytest.raises(RefusedError, match="scores experts by sigmoid") as caught:
            apply(plan, "merge-experts", to=4, router="lse")
        assert "--router dominant" in str(caught.value.hint)
    with pytest.raises(RefusedError, match="reads something else") as caught:
        fit_of(models("gemma4"), tmp_path / "fit.safetensors", groups=[[0, 1]], router="lse", align="none")
    assert "--router dominant" in str(caught.value.hint)


def test_experts_without_activations_to_be_seen(models: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no activations that can be told") as caught:
        fit_of(models("muse_spark"), tmp_path / "fit.safetensors", groups=[[0, 1]], align="activations")
    assert "--align weights" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("parameters", "error", "message", "hint"),
    [
        ({"to": 4, "group": "hc"}, RecipeError, "--group hc needs statistics", "--text"),
        ({"to": 4, "weights": "usage"}, RecipeError, "--weights usage needs statistics", "--text"),
        ({"to": 4, "align": "activations"}, RecipeError, "--align activations needs", "--align weights"),
        ({"to": 4, "router": "lse"}, RecipeError, "--router lse needs", "--router dominant"),
        ({"groups": [[0, 1]], "group": "hc"}, RecipeError, "how to make groups", "leave it out"),
        ({"to": 4, "by": "reap"}, RecipeError, "--by reap ranks experts", "--group msmoe"),
        ({"to": 4, "group": "hc", "stats": "routed"}, RefusedError, "to all tokens", "--every-expert"),
        ({"to": 4, "group": "reap-centroid", "stats": "routed"}, RefusedError, "to all tokens", "--group msmoe"),
    ],
)
def test_what_is_missing_is_said(
    models: Any, tmp_path: Path, parameters: dict[str, Any], error: type[Exception], message: str, hint: str
) -> None:
    path = models("mixtral")
    if parameters.get("stats") == "routed":
        parameters = parameters | {"stats": stats_of(path, tmp_path / "s", every_expert=False)[1]}
    with pytest.raises(error, match=message) as caught:
        apply(plan_of(open_checkpoint(path)), "merge-experts", **parameters)
    assert hint in str(caught.value.hint)  # type: ignore[attr-defined]


def test_no_room(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models("mixtral", num_experts_per_tok=1)
    stats, file = stats_of(path, tmp_path / "s")
    plan = plan_of(open_checkpoint(path))
    monkeypatch.setattr(group_experts, "LARGEST", 2)
    with pytest.raises(RefusedError, match="3 groups of at most 2 do not hold the 8 experts"):
        apply(plan, "merge-experts", to=3, group="reap-centroid", stats=file, protect_super=False)
    stats.blocks["model.layers.0"].sums["peak"][:, 2] = 1e4
    with pytest.raises(RefusedError, match="leaves 1 of 8 experts alone") as caught:
        apply(plan, "merge-experts", to=1, stats=str(stats.save(tmp_path / "s")))
    assert "--no-protect-super" in str(caught.value.hint)


def test_fits_of_another_merge(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    plan = plan_of(open_checkpoint(path))
    fit = fit_of(path, tmp_path / "fit.safetensors", groups=[[0, 1]], align="activations")
    for parameters, message in (
        ({"groups": [[0, 2]]}, "another merge: it has"),
        ({"groups": [[0, 1]], "weights": [1, 2, 1, 1, 1, 1, 1, 1]}, "other members are dominant"),
        ({"groups": [[0, 1]], "router": "lse"}, "made for --router dominant"),
    ):
        with pytest.raises(RefusedError, match=message):
            apply(plan, "merge-experts", fit=fit, **parameters)
    (tmp_path / "none.safetensors").write_bytes(b"no fit")
    for name in ("none.safetensors", "missing.safetensors", "s.safetensors"):
        stats_of(path, tmp_path / "s", every_expert=False)
        with pytest.raises(CheckpointError, match="fit"):
            apply(plan, "merge-experts", groups=[[0, 1]], fit=str(tmp_path / name))


# The command


@pytest.fixture
def texts(tmp_path: Path) -> list[object]:
    """Calibration text of 512 tokens and a little to measure on, as token ids."""
    for name, ids in (("text", TEXT[:6]), ("heldout", TEXT[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    calibration: list[object] = ["--text", tmp_path / "text.jsonl", "--window", 64, "--tokens", 512]
    return [*calibration, "--heldout", tmp_path / "heldout.jsonl"]


def test_text_is_enough(models: Any, tmp_path: Path, ok: Cli, texts: list[object]) -> None:
    """Statistics, fit, what it costs beside dropping, the checkpoint and a recipe that makes it again."""
    path = models("mixtral")
    options = ["--to", 6, "--group", "reap-centroid", "--router", "lse", "--refit", "scalar", *texts]
    document = ok("merge-experts", path, *options, "-o", tmp_path / "a", "--json").json
    nats = document["heldout"]["nats"]
    assert nats.keys() == {"original", "merge-experts", "drop-experts", "merge-experts, refit scalar"}
    assert [step["operation"] for step in document["steps"]] == ["merge-experts", "refit"]
    assert document["steps"][0]["report"]["fit"]["tokens"] == 512
    assert read_config(tmp_path / "a")["num_local_experts"] == 6
    measured = ok("perplexity", tmp_path / "a", tmp_path / "heldout.jsonl", "--window", 64, "--json").json
    assert measured["domains"][0]["nats"] == pytest.approx(nats["merge-experts, refit scalar"], abs=1e-4)
    (merge, repair) = json.loads((tmp_path / "a" / "moesurgery.json").read_text())["recipe"]["steps"]
    for parameters, name in (
        (merge["merge-experts"], "stats"),
        (merge["merge-experts"], "fit"),
        (repair["refit"], "repair"),
    ):
        assert "/" not in parameters[name]  # provenance tells nothing of this machine
        parameters[name] = str(tmp_path / parameters[name])
    (tmp_path / "r.yaml").write_text(json.dumps({"model": str(path), "steps": [merge, repair]}))
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_what_lies_beside_is_used_again(models: Any, tmp_path: Path, ok: Cli, cli: Cli, texts: list[object]) -> None:
    path, out = models("mixtral"), tmp_path / "a"
    options = ["--to", 6, "--router", "lse", "--refit", "none", "--no-heldout", *texts, "-o", out]
    ok("merge-experts", path, *options)
    first, fit = digest(out), (tmp_path / "a.fit.safetensors").read_bytes()
    shutil.rmtree(out)
    assert ok("merge-experts", path, *options).err.count("used again") == 2
    assert digest(out) == first
    shutil.rmtree(out)
    for other, said in (
        (["--group", "msmoe"], "a.fit.safetensors holds a fit of something else: it has [["),
        (["--window", 32], "a.stats.safetensors holds statistics of something else: window 64, now 32"),
    ):
        result = cli("merge-experts", path, *options, *other)
        assert result.code == 2
        assert said in result.err
        assert (tmp_path / "a.fit.safetensors").read_bytes() == fit


def test_what_is_refused_is_refused_before_anything_is_run(models: Any, tmp_path: Path, cli: Cli) -> None:
    make_form(models("qwen3_moe"), tmp_path / "bnb", "bnb-int8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"input_ids": SEEN[0].tolist()}))
    for model, arguments, message in (
        (tmp_path / "bnb", ["--to", 2], "not dequantised here"),
        (models("mixtral"), ["--to", 9], "fewer than 9"),
        (models("deepseek_v3"), ["--to", 4, "--router", "lse"], "scores experts by sigmoid"),
    ):
        text = ["--text", tmp_path / "text.jsonl", "--window", 16, "-o", tmp_path / "out"]
        result = cli("merge-experts", model, *arguments, *text)
        assert result.code == 2
        assert message in result.err
        assert not list(tmp_path.glob("out*"))


def test_defaults_with_text_and_what_is_told(models: Any, tmp_path: Path, ok: Cli, texts: list[object]) -> None:
    path = models("mixtral")
    out = ok("merge-experts", path, "--to", 4, *texts, "-o", tmp_path / "a").out
    assert "drop-experts" in out
    assert "collapse" in out
    assert "agree on" in out
    step, repair = json.loads((tmp_path / "a" / "moesurgery.json").read_text())["steps"]
    assert repair["report"]["kind"] == "down"
    assert {key: step["report"][key] for key in ("weights", "align", "router")} == {
        "weights": "usage",
        "align": "activations",
        "router": "dominant",
    }
    measured = step["report"]["candidates"]
    ways = {"reap-centroid by reap-sum", "reap-centroid by reap", "msmoe", "hc"}
    assert measured["nats"].keys() == {"original", *ways}
    assert measured["chosen"] == min(ways, key=measured["nats"].__getitem__)
    assert all(way in out for way in ways)
    group, _, by = measured["chosen"].partition(" by ")
    assert step["report"]["group"] == group
    assert not by or step["report"]["by"] == by
    stats = tmp_path / "a.stats.safetensors"
    again = ok("merge-experts", path, "--to", 4, "--stats", stats, "--dry-run", "--json").json
    assert again["steps"][0]["report"]["align"] == "none"  # nothing was run to match neurons by


def test_groups_are_measured_as_they_are_merged(models: Any, tmp_path: Path, ok: Cli, texts: list[object]) -> None:
    """What each way costs is what transformers finds for the same merge, written; the least is taken."""
    path = models("mixtral")
    text, heldout = dict(zip(texts[::2], texts[1::2], strict=True))["--text"], tmp_path / "heldout.jsonl"
    tokens = torch.randint(0, 60, (3, 32), generator=torch.Generator().manual_seed(4))
    heldout.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens.tolist()))
    options = ("--text", text, "--window", 32, "--tokens", 256, "--heldout", heldout, "--refit", "none")
    ok("merge-experts", path, "--to", 4, *options, "-o", tmp_path / "a")
    measured = json.loads((tmp_path / "a" / "moesurgery.json").read_text())["steps"][0]["report"]["candidates"]
    stats = tmp_path / "a.stats.safetensors"
    for way in ("msmoe", "hc"):
        ok("merge-experts", path, "--to", 4, "--group", way, "--stats", stats, "-o", tmp_path / way)
        with torch.no_grad():
            loss = load(tmp_path / way)(tokens, labels=tokens).loss
        assert measured["nats"][way] == pytest.approx(float(loss), abs=2e-4)
    assert measured["chosen"] == min(measured["nats"].keys() - {"original"}, key=measured["nats"].__getitem__)
