"""Llama 4 and JetMoE call no experts module with a routing: what is read of them against what their modules compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from moesurgery.fitting.ablation import ablate
from moesurgery.fitting.collector import collect
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.repair_file import FittedBlock, RepairWriter
from tests.tiny import PROMPT, load, logits

ADAPTED = ("llama4_text", "llama4", "jetmoe")
BLOCKS = {"llama4_text": ".feed_forward", "llama4": ".feed_forward", "jetmoe": ".mlp"}
LINEAR = torch.nn.functional.linear
TEXT = torch.randint(3, 60, (6, 64), generator=torch.Generator().manual_seed(3))

Said = dict[tuple[int, int], tuple[float, torch.Tensor]]  # (token, expert) -> weight, output without it


def engine_of(path: Path) -> Engine:
    return Engine(plan_of(open_checkpoint(path)), keep=0)


def blocks_of(model: torch.nn.Module, model_type: str) -> dict[str, Any]:
    end = BLOCKS[model_type]
    return {n.removesuffix(end): m for n, m in model.named_modules() if n.endswith(end) and hasattr(m, "router")}


def of_llama4(block: Any, said: Said) -> None:
    """The batched experts get [E, T, H], inputs times scores; those of score 0 were not chosen."""
    chosen: list[torch.Tensor] = []
    block.router.register_forward_hook(lambda m, args, out: chosen.append(out[0]))

    def see(module: Any, args: Any, out: torch.Tensor) -> None:
        scores = chosen.pop()
        parts = out.view(scores.shape[1], len(scores), -1)
        said.update({(t, e): (1.0, parts[e, t].clone()) for t, e in torch.nonzero(scores).tolist()})

    block.experts.register_forward_hook(see)


def of_jetmoe(block: Any, said: Said) -> None:
    """The output projection gets tokens sorted by expert; the router says which and with what weights."""
    told: list[Any] = []
    block.router.register_forward_hook(lambda m, args, out: told.append(out))

    def see(module: Any, args: Any, out: torch.Tensor) -> None:
        _, tokens, gates, sizes, _ = told.pop()
        experts = [e for e, size in enumerate(sizes) for _ in range(size)]
        for row, (t, e, g) in enumerate(zip(tokens.tolist(), experts, gates.tolist(), strict=True)):
            said[t, e] = (g, out[row].clone())

    block.output_linear.register_forward_hook(see)


def contributions(path: Path, model_type: str, **changes: Any) -> dict[str, Said]:
    model = load(path, **changes)
    found: dict[str, Said] = {}
    for where, block in blocks_of(model, model_type).items():
        (of_jetmoe if model_type == "jetmoe" else of_llama4)(block, found.setdefault(where, {}))
    logits(model)
    return found


@pytest.mark.parametrize("model_type", ADAPTED)
def test_routing_and_every_sum(models: Any, model_type: str) -> None:
    path = models(model_type)
    engine = engine_of(path)
    calls: dict[str, list[ExpertsCall]] = {}
    engine.run(Tokens(PROMPT), Hooks(experts=lambda call: calls.setdefault(call.block.where, []).append(call)))
    stats = collect(engine, Tokens(PROMPT))
    expected = contributions(path, model_type)
    assert list(stats.blocks) == list(expected) == list(calls)
    for where, said in expected.items():
        (call,) = calls[where]
        routed = {
            (t, int(e)): float(g)
            for t, (row, gates) in enumerate(zip(call.index, call.weights, strict=True))
            for e, g in zip(row, gates, strict=True)
        }
        assert routed.keys() == said.keys()
        assert all(abs(routed[key] - said[key][0]) < 1e-6 for key in said)
        sums = stats.blocks[where].sums
        names = ("count", "gate", "gate2", "norm", "gate_norm", "peak")
        loops: dict[str, np.ndarray] = {name: np.zeros((2, 8)) for name in names} | {"gram": np.zeros((2, 8, 8))}
        for (t, e), (g, f) in said.items():
            half, norm = t // 24 % 2, float(f.double().norm())
            for name, value in zip(names, (1, g, g * g, norm, g * norm), strict=False):
                loops[name][half, e] += value
            loops["peak"][half, e] = max(loops["peak"][half, e], float(f.abs().max()))
            for o in range(8):
                if (t, o) in said:
                    h, other = said[t, o]
                    loops["gram"][half, e, o] += g * h * float(f.double() @ other.double())
        for name, values in loops.items():
            assert np.abs(sums[name] - values).max() < 2e-5 * max(1, np.abs(values).max()), name
        assert (sums["probability"].sum(-1) - 24).max() < 1e-4
    assert bool(stats.unread) == (model_type == "jetmoe")


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_sums_for_another_top_k(models: Any, model_type: str) -> None:
    """In the first MoE layer of Llama 4 inputs are the same at any top-k: only there whole models can be compared."""
    path = models(model_type)
    stats = collect(engine_of(path), Tokens(PROMPT), (3,))
    if model_type == "jetmoe":  # its attention has the same top-k, so the block is run by itself
        model = load(path)
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for where, block in blocks_of(model, model_type).items():

            def see(module: Any, args: Any, out: torch.Tensor, where: str = where) -> None:
                before, module.router.top_k = module.router.top_k, 3
                found[where] = (out - module.bias, type(module).forward(module, *args) - module.bias)
                module.router.top_k = before

            block.register_forward_hook(see)
        logits(model)
        pairs = {w: (y.flatten(0, 1).double(), other.flatten(0, 1).double()) for w, (y, other) in found.items()}
    else:
        where = next(iter(stats.blocks))
        of = [contributions(path, model_type, **c)[where] for c in ({}, {"num_experts_per_tok": 3})]
        zero = torch.zeros(48, 32, dtype=torch.float64)
        first, second = (
            zero.index_add(
                0, torch.tensor([t for t, _ in said]), torch.stack([g * f.double() for g, f in said.values()])
            )
            for said in of
        )
        pairs = {where: (first, second)}
    for where, (y, other) in pairs.items():
        block = stats.blocks[where]
        assert block.total("gram@3").sum() == pytest.approx(float((other * other).sum()), rel=1e-4)
        assert block.total("cross@3").sum() == pytest.approx(float((other * y).sum()), rel=1e-4)


def loss(model: torch.nn.Module) -> float:
    found = logits(model, TEXT[:, :24])[:, :-1]
    return float(torch.nn.functional.cross_entropy(found.reshape(-1, found.shape[-1]), TEXT[:, 1:24].reshape(-1)))


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_the_probe(models: Any, model_type: str) -> None:
    """Masked: the router's logit is minus infinity; silenced: what the expert adds is zero."""
    path = models(model_type)
    engine = engine_of(path)
    tokens = Tokens(TEXT[:, :24].contiguous())
    wanted = {block.where: [2] for block in engine.routed}
    found = ablate(engine, tokens, wanted, ["mask", "zero"])
    assert found.base == pytest.approx(loss(load(path)), abs=1e-5)
    for where in wanted:
        masked, silent = load(path), load(path)
        block = blocks_of(masked, model_type)[where]
        linear = block.router.layer if model_type == "jetmoe" else block.router

        def without(x: torch.Tensor, w: torch.Tensor, b: Any = None, router: Any = linear.weight) -> torch.Tensor:
            out = LINEAR(x, w, b)
            if w is router:
                out[:, 2] = -torch.inf
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", without)
            assert found.single["mask"][where][2] == pytest.approx(loss(masked), abs=1e-5)
        block = blocks_of(silent, model_type)[where]
        down = block.output_linear.weight if model_type == "jetmoe" else block.experts.down_proj
        down.data[2] = 0
        assert found.single["zero"][where][2] == pytest.approx(loss(silent), abs=1e-5)
    assert any(found.single["zero"][where][2] != pytest.approx(found.base, abs=1e-5) for where in wanted)


@pytest.mark.parametrize("kind", ["scalar", "expert", "down"])
def test_a_repair_of_llama4(models: Any, tmp_path: Path, kind: str) -> None:
    path = models("llama4_text")
    plan = plan_of(open_checkpoint(path))
    edited = apply(plan, "rescale", top_k=2, scale="none")
    fitted: list[FittedBlock] = []
    writer = RepairWriter(tmp_path / "repair")
    fit_layers(Engine(plan), Engine(edited, keep=0), Tokens(TEXT), RepairOptions(kind, minimum=0.2), fitted.append)  # type: ignore[arg-type]
    for entry in fitted:
        writer.add(entry)
    writer.close({"kind": kind, "tokens": TEXT.numel()})
    write_plan(apply(edited, "refit", repair=str(tmp_path / "repair")), tmp_path / "out")
    said = []
    for model in (load(path), load(tmp_path / "out")):
        for block in blocks_of(model, "llama4_text").values():
            block.experts.register_forward_hook(
                lambda m, args, out: said.append(out.view(8, -1, out.shape[-1]).sum(0).double())
            )
        logits(model, TEXT)
    (entry,) = fitted
    error = float((said[0] - said[1]).pow(2).sum() / said[0].pow(2).sum())
    assert error == pytest.approx(entry.error_after, rel=1e-3)
    assert entry.error_after < entry.error_before


def test_what_has_no_meaning(models: Any, tmp_path: Path) -> None:
    llama, jet = (plan_of(open_checkpoint(models(t))) for t in ("llama4_text", "jetmoe"))
    stats = {}
    for name, plan in (("llama", llama), ("jet", jet)):
        stats[name] = str(collect(Engine(plan), Tokens(PROMPT), (3,)).save(tmp_path / name))
    with pytest.raises(RefusedError, match="gates say nothing"):
        apply(llama, "rescale", top_k=3, scale="gate", stats=stats["llama"])
    rules = apply(llama, "rescale", top_k=3, scale="measured", stats=stats["llama"]).steps[0].report["alternatives"]
    assert "gate" not in rules
    with pytest.raises(RefusedError, match=r"self_attention: an attention expert's output depends on the other"):
        apply(jet, "rescale", top_k=3, scale="measured", stats=stats["jet"])
    with pytest.raises(RefusedError, match="mixes the router's logits"):
        collect(engine_of(models("doge")), Tokens(PROMPT))
    dropped = apply(llama, "drop-experts", count=2, by="reap-sum", stats=stats["llama"]).steps[0].report
    scores = dropped["layers"][0]["scores"]
    assert sorted(dropped["layers"][0]["dropped"]) == sorted(sorted(range(8), key=lambda e: scores[e])[:2])
