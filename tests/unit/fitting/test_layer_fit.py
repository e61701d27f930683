"""Repair by least squares: against torch's solver on what transformers computes, and in the model that is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, OutputError, RefusedError
from moesurgery.fitting import gauss_newton
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.fitting.ridge import RIDGE_PATH, RidgeSolution, solve
from moesurgery.fitting.router_fit import LinearisedRouting, linearised_routing
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.tokens import Tokens, padded
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import FittedBlock, RepairWriter
from tests.conftest import Result
from tests.quantise import make_fp8
from tests.tiny import load, read_tensors, same_bits

Cli = Callable[..., Result]
KINDS = ("scalar", "expert", "down", "all")
TEXT = torch.randint(3, 60, (8, 96), generator=torch.Generator().manual_seed(3))


def edit(path: Path) -> tuple[Plan, Plan]:
    """A model, and the same with two experts dropped from each layer and each group."""
    plan = plan_of(open_checkpoint(path))
    return plan, apply(plan, "drop-experts", experts=[1, 6])


def repaired(path: Path, tokens: Tokens | None = None, **options: Any) -> list[FittedBlock]:
    found: list[FittedBlock] = []
    plan, edited = edit(path)
    fit_layers(Engine(plan), Engine(edited, keep=0), tokens or Tokens(TEXT), RepairOptions(**options), found.append)
    return found


def load_edited(path: Path) -> torch.nn.Module:
    """The edited model, written and loaded."""
    out = path.with_name(f"{path.name}-edited")
    if not out.exists():
        write_plan(edit(path)[1], out)
    return load(out)


def save(fitted: list[FittedBlock], folder: Path, kind: str = "down") -> str:
    writer = RepairWriter(folder)
    for entry in fitted:
        writer.add(entry)
    writer.close({"kind": kind, "tokens": TEXT.numel()})
    return str(folder)


def experts_of(model: torch.nn.Module, text: torch.Tensor = TEXT) -> dict[str, tuple[Any, ...]]:
    """For each layer of a transformers model its `experts` module, inputs (hidden, index, weights) and output."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            where = ".".join(name.split(".")[:3])
            module.register_forward_hook(
                lambda m, args, kwargs, out, w=where: found.__setitem__(w, (m, *args, *kwargs.values(), out)),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(text)
    return found


def layers_of(model: torch.nn.Module, text: torch.Tensor = TEXT) -> dict[str, torch.Tensor]:
    """What each layer of a transformers model returns."""
    found = {}
    for name, module in model.named_modules():
        if name.count(".") == 2 and name.split(".")[1] == "layers":
            module.register_forward_hook(
                lambda m, args, out, n=name: found.__setitem__(
                    n, (out[0] if isinstance(out, tuple) else out).double().clone()
                )
            )
    with torch.no_grad():
        model(text)
    return found


def parts_of(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """g_e f_e [T, E, H], by calling the module with one expert at a time."""
    experts = module.down_proj.shape[0]
    with torch.no_grad():
        return torch.stack(
            [
                type(module).forward(module, hidden, torch.full_like(index[:, :1], e), torch.ones_like(weights[:, :1]))
                * ((index == e) * weights).sum(1, keepdim=True)
                for e in range(experts)
            ],
            dim=1,
        )


def test_the_first_layer_by_torchs_solver(models: Any, tmp_path: Path) -> None:
    """There both models still have one stream, so factors and weights follow from what transformers computes."""
    path = models("mixtral")
    write_plan(edit(path)[1], tmp_path / "edited")
    where = "model.layers.0"
    y = experts_of(load(path))[where][-1]
    module, hidden, index, weights, _ = experts_of(load(tmp_path / "edited"))[where]
    parts = parts_of(module, hidden, index, weights)
    single = torch.linalg.lstsq(parts.sum(1).reshape(-1, 1), y.reshape(-1, 1)).solution.item()
    assert repaired(path, kind="scalar", ridge=0)[0].factors == pytest.approx([single] * 6, rel=1e-4)
    each = torch.linalg.lstsq(parts.transpose(1, 2).reshape(-1, 6), y.reshape(-1, 1)).solution[:, 0]
    assert repaired(path, kind="expert", ridge=1e-9)[0].factors == pytest.approx(each.tolist(), rel=1e-3)
    found = repaired(path, kind="down", ridge=1e-9, minimum=1)[0]
    residual = (y - parts.sum(1)).double()
    for e in range(6):
        down = module.down_proj[e].detach()
        gates = ((index == e) * weights).sum(1, keepdim=True)
        gate, up = (hidden @ module.gate_up_proj[e].detach().T).chunk(2, -1)
        h = (torch.nn.functional.silu(gate) * up * gates).double()
        chosen = gates[:, 0] > 0
        change = torch.linalg.lstsq(h[chosen], residual[chosen]).solution.T
        assert (found.matrices[e]["down"] - (down + change)).abs().max() < 1e-3 * down.abs().max()
        residual -= h @ change.T
    assert found.error_after == pytest.approx(float(residual.pow(2).sum() / y.double().pow(2).sum()), rel=1e-3)


def test_each_kind_contains_the_one_before(models: Any) -> None:
    for model_type in ("mixtral", "olmoe"):
        path = models(model_type)
        sweeps = {"all": 4}  # conjugate gradients come near their solution step by step, the others at once
        first = {kind: repaired(path, kind=kind, ridge=1e-9, sweeps=sweeps.get(kind, 1))[0] for kind in KINDS}
        errors = [first["scalar"].error_before, *(first[kind].error_after for kind in KINDS)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-2] < 0.9 * errors[-3]
        twice = repaired(path, kind="down", ridge=1e-9, sweeps=2)[0]
        assert twice.error_after < errors[-2]


def test_a_model_that_was_not_edited_stays(models: Any) -> None:
    path = models("mixtral")
    plan = plan_of(open_checkpoint(path))
    for kind in KINDS:
        found: list[FittedBlock] = []
        fit_layers(Engine(plan), Engine(plan), Tokens(TEXT), RepairOptions(kind), found.append)  # type: ignore[arg-type]
        for entry in found:
            assert entry.error_before < 1e-10
            assert entry.factors is None or entry.factors == pytest.approx([1.0] * 8, abs=1e-5)
            for expert, fitted in entry.matrices.items():
                before = read_tensors(path)[f"{entry.where}.block_sparse_moe.experts.{expert}.w2.weight"]
                assert torch.allclose(fitted["down"], before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model_type", "fused"), [("mixtral", False), ("qwen2_moe", True), ("gpt_oss", False), ("deepseek_v3", False)]
)
def test_the_written_model_has_the_errors_that_were_told(
    models: Any, tmp_path: Path, model_type: str, fused: bool, kind: str
) -> None:
    """Layer after layer on the repaired stream: all told errors are those between the two models' own outputs."""
    path = models(model_type, fused=fused)
    fitted = repaired(path, kind=kind, minimum=1, ridge=0.1)
    plan = apply(edit(path)[1], "refit", repair=save(fitted, tmp_path / "repair", kind))
    write_plan(plan, tmp_path / "out")
    original, after = layers_of(load(path)), layers_of(load(tmp_path / "out"))
    added = experts_of(load(path))
    assert [f.where for f in fitted] == list(added)
    for entry in fitted:
        y = added[entry.where][-1].double()
        error = float((original[entry.where] - after[entry.where]).pow(2).sum() / y.pow(2).sum())
        assert error == pytest.approx(entry.error_after, rel=2e-2)
        assert entry.error_after < entry.error_before
    edited, written = (tmp_path / "edited", tmp_path / "out")
    write_plan(edit(path)[1], edited)
    before, after_tensors = read_tensors(edited), read_tensors(written)
    changed = {name for name in before if not same_bits(before[name], after_tensors[name])}
    assert changed
    assert all("experts" in name and "shared" not in name for name in changed)
    assert kind == "all" or all("down" in name or ".w2." in name for name in changed)


@pytest.mark.parametrize(
    ("model_type", "changes", "streamed"),
    [("granitemoe", {"residual_multiplier": 0.4}, True), ("flex_olmo", {}, False)],
)
def test_what_is_missing_where_the_output_is_not_simply_added(
    models: Any, model_type: str, changes: dict[str, float], streamed: bool
) -> None:
    """Multiplied before it is added, the layer's output is still what counts; normalised first, only the block's is."""
    path = models(model_type, **changes)
    found = repaired(path, kind="scalar", ridge=1e9)[1]  # nothing is repaired, so errors are those of the edit
    models_of = [load(path), load_edited(path)]
    y, edited = (experts_of(model)["model.layers.1"][-1].double() for model in models_of)
    before, after = (layers_of(model)["model.layers.1"] for model in models_of)
    missing = (before - after).flatten(0, 1) / 0.4 if streamed else y - edited
    error = float(missing.pow(2).sum() / y.pow(2).sum())
    assert found.error_before == pytest.approx(error, rel=1e-3)
    assert float((y - edited).pow(2).sum() / y.pow(2).sum()) != pytest.approx(error, rel=0.05) or not streamed


def test_bfloat16_is_rounded_once(models: Any, tmp_path: Path) -> None:
    path = models("mixtral", dtype="bfloat16")
    fitted = repaired(path, kind="all", minimum=1, ridge=0.1)
    write_plan(apply(edit(path)[1], "refit", repair=save(fitted, tmp_path / "repair")), tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    for entry in fitted:
        for expert, fitted_of in entry.matrices.items():
            for name, role in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                stored = tensors[f"{entry.where}.block_sparse_moe.experts.{expert}.{name}.weight"]
                assert same_bits(stored, fitted_of[role].contiguous())


def test_experts_with_few_tokens_are_left_alone(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    fitted = repaired(path, Tokens(TEXT[:2]), kind="down", ridge=0.1)
    skipped = {(f.where, e) for f in fitted for e in f.skipped}
    assert skipped == {(f.where, e) for f in fitted for e, count in enumerate(f.tokens) if count < 2 * 48}
    assert skipped
    assert not skipped & {(f.where, e) for f in fitted for e in f.matrices}
    step = apply(edit(path)[1], "refit", repair=save(fitted, tmp_path / "repair")).steps[-1]
    assert f"{len(skipped)} experts saw too few tokens" in step.notes[0]


def test_padding_never_counts(models: Any) -> None:
    path = models("mixtral")
    rows = [TEXT[0].tolist(), TEXT[1, :40].tolist()]
    found = repaired(path, padded(rows), kind="down", minimum=0.1)
    for entry in found:
        assert sum(entry.tokens) == 2 * (96 + 40)
    other = padded(rows)
    other.ids[1, 40:] = 7
    again = repaired(path, other, kind="down", minimum=0.1)
    for entry, same in zip(found, again, strict=True):
        assert entry.error_after == pytest.approx(same.error_after, rel=1e-6)


# The ridge


def sums(h: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums h h^T [2, I, I] and r h^T [2, O, I] of two halves of samples [2, N, …]."""
    return h.transpose(1, 2) @ h, r.transpose(1, 2) @ h


def test_the_ridge_is_the_one_that_serves_the_other_half_best() -> None:
    """Against a loop over the path that fits each half by torch's solver and judges it on the samples of the other."""
    generator = torch.Generator().manual_seed(0)
    chosen = set()
    for noise in (0.01, 3.0, 30.0):
        h = torch.randn(2, 40, 12, generator=generator, dtype=torch.float64)
        r = h @ torch.randn(12, 3, generator=generator, dtype=torch.float64)
        r = r + noise * torch.randn(r.shape, generator=generator, dtype=torch.float64)
        gram, cross = sums(h, r)
        scale = float(gram.sum(0).diagonal().mean())
        errors = {}
        for ridge in RIDGE_PATH:
            fits = [torch.linalg.solve(gram[a] + ridge * scale * torch.eye(12), cross[a].T) for a in (0, 1)]
            errors[ridge] = sum(float((r[1 - a] - h[1 - a] @ fits[a]).pow(2).sum()) for a in (0, 1))
        best = min(errors, key=errors.__getitem__)
        found = solve(gram, cross, None)
        assert found.ridge == best
        assert found.held_out == pytest.approx(errors[best] - float(r.pow(2).sum()))
        both = torch.linalg.solve(gram.sum(0) + best * scale * torch.eye(12), cross.sum(0).T).T
        assert found.change is not None
        assert torch.allclose(found.change, both)
        chosen.add(best)
    assert len(chosen) > 1


def test_sums_that_rounding_left_short_of_positive_definite() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)  # fewer tokens than neurons
    gram, cross = sums(h, torch.randn(2, 3, 300, generator=generator, dtype=torch.float64))
    gram[0].diagonal()[5:] -= 1e-4
    system = gram.sum(0)
    scale = float(system.diagonal().mean())
    system.diagonal().add_(1e-9 * scale)
    assert torch.linalg.eigvalsh(system)[0] < 0
    found = solve(gram, cross, 1e-9).change
    assert found is not None
    assert torch.allclose(found @ system, cross.sum(0))


def test_nothing_is_changed_that_would_not_carry_over() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 20, 12, generator=generator, dtype=torch.float64)
    gram, cross = sums(h, torch.randn(2, 20, 3, generator=generator, dtype=torch.float64))
    assert solve(gram, cross, None) == RidgeSolution(None, None, 0.0)
    assert solve(gram, cross, 0.1).change is not None
    gram[1], cross[1] = 0, 0  # one window alone: nothing to judge by
    assert solve(gram, cross, None).change is None
    assert solve(torch.zeros_like(gram), cross, 0.1).change is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_error_is_never_above_none(models: Any, kind: str) -> None:
    for entry in repaired(models("mixtral"), kind=kind, minimum=1):
        assert entry.error_held_out is not None
        assert entry.error_after <= entry.error_held_out <= entry.error_before
        path = gauss_newton.GAUSS_NEWTON_PATH if kind == "all" else RIDGE_PATH
        assert all(ridge is None or ridge in path for ridge in entry.ridges)


# What is refused


@pytest.mark.parametrize("kind", ["scalar", "down"])
def test_repairs_of_quantised_weights(models: Any, tmp_path: Path, kind: Any) -> None:
    """Scales take factors; fitted matrices are stored in the form that they came in."""
    make_fp8(models("deepseek_v3"), tmp_path / "fp8")
    fitted = repaired(tmp_path / "fp8", kind=kind, minimum=1, ridge=0.01)
    before = edit(tmp_path / "fp8")[1]
    plan = apply(before, "refit", repair=save(fitted, tmp_path / "repair", kind))
    assert plan.tensors.keys() == before.tensors.keys()
    names = [n for n, e in plan.tensors.items() if e != before.tensors[n]]
    assert names
    endings = ("scale_inv",) if kind == "scalar" else ("down_proj.weight", "down_proj.weight_scale_inv")
    assert all(name.endswith(endings) for name in names)
    assert {plan.tensors[n].dtype for n in names} <= {"F8_E4M3", "F32"}


def test_repairs_of_another_edit(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    folder = save(repaired(path, kind="scalar"), tmp_path / "repair", "scalar")
    with pytest.raises(RefusedError, match="has 8 experts, the repair 6"):
        apply(plan_of(open_checkpoint(path)), "refit", repair=folder)
    with pytest.raises(RefusedError, match="in the model only"):
        apply(plan_of(open_checkpoint(models("mixtral", num_hidden_layers=3))), "refit", repair=folder)
    with pytest.raises(CheckpointError, match=r"refit\.json"):
        apply(plan_of(open_checkpoint(path)), "refit", repair=str(tmp_path))
    with pytest.raises(OutputError, match="exists"):
        RepairWriter(tmp_path / "repair")


# The command


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    from tests.conftest import DEMO

    options: list[object] = ["--text", DEMO.parent / "calibration-code.txt", "--window", 128, "--tokens", 6144]
    return [*options, "--heldout", DEMO.parent / "heldout-code.txt", "--limit", 8]


def test_drop_and_refit_in_one_command(demo: Path, tmp_path: Path, ok: Cli, texts: list[object]) -> None:
    arguments = ["drop-experts", demo, "--experts", "0,5", "--refit", "expert", *texts, "-o", tmp_path / "out"]
    document = ok(*arguments, "--json").json
    ok("validate", tmp_path / "out", "--level", "forward")
    nats = document["heldout"]["nats"]
    assert nats["original"] < nats["drop-experts, refit expert"] < nats["drop-experts"]
    measured = ok("perplexity", tmp_path / "out", texts[7], "--window", 128, "--limit", 8, "--json").json
    assert measured["domains"][0]["nats"] == pytest.approx(nats["drop-experts, refit expert"], abs=1e-4)
    assert [step["operation"] for step in document["steps"]] == ["drop-experts", "refit"]
    report = document["steps"][1]["report"]
    assert all(layer["error_after"] < layer["error_before"] for layer in report["layers"])


def test_refit_wants_text(demo: Path, cli: Cli) -> None:
    result = cli("drop-experts", demo, "--experts", 3, "--refit", "down")
    assert result.code == 2
    assert "give --text FILE" in result.err
    assert "expected auto or a number" in cli("drop-experts", demo, "--experts", 3, "--ridge", "-1").err
    assert "expected one of" in cli("drop-experts", demo, "--experts", 3, "--refit", "everything").err


# The router


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_what_a_change_of_router_rows_does_is_what_the_models_code_computes(models: Any, model_type: str) -> None:
    """Against a difference quotient: the block is run with its router's rows moved a little, up and down."""
    plan = plan_of(open_checkpoint(models(model_type)))
    engine = Engine(plan)
    block = engine.blocks[-1]
    streams = engine.start(Tokens(TEXT[:1, :24]), Hooks())
    streams.to_layer(next(i for i, unit in enumerate(engine.layers) if unit.path == block.unit))

    def call_now() -> ExpertsCall:
        calls: list[ExpertsCall] = []
        streams.peek(
            Hooks(experts=lambda call: calls.append(call) if call.block is block else None, router_logits=True)
        )
        return calls[0]

    with engine.weights.loaded(engine.layers[streams.passed], pin=True):
        weight = engine.meta_model.tensor(block.router or "").detach()
        call = call_now()
        missing = torch.randn(
            call.hidden.reshape(-1, call.hidden.shape[-1]).shape, generator=torch.Generator().manual_seed(0)
        )
        problem, _ = linearised_routing(plan.anatomy.settings, weight.float(), [call], [missing])
        step = 2e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        outputs = []
        for sign in (1, -1):
            weight.add_(sign * step)
            moved = call_now()
            weight.sub_(sign * step)
            assert torch.equal(moved.index.sort(-1).values, call.index.sort(-1).values)
            outputs.append(moved.run().reshape(missing.shape).double())
    streams.close()
    changed = (outputs[0] - outputs[1]) / 2
    logits = problem.logits(step)
    assert float((problem.pull * logits).sum()) == pytest.approx(float((changed * missing).sum()), rel=2e-2)
    assert float((problem.applied(logits) * logits).sum()) == pytest.approx(float(changed.pow(2).sum()), rel=2e-2)


def test_the_solution_is_that_of_the_normal_equations() -> None:
    """Against torch's solver on the Jacobian of a made-up block, written out in full."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, chosen, width, hidden = 200, 5, 2, 3, 7
    read = torch.randn(tokens, width, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :chosen]
    outputs = torch.randn(tokens, chosen, hidden, generator=generator)  # what a unit change of each logit adds
    missing = torch.randn(tokens, hidden, generator=generator)
    normal, pull = outputs @ outputs.transpose(1, 2), (outputs @ missing[..., None])[..., 0]
    problem = LinearisedRouting(read, index, normal, pull, torch.zeros(tokens, 0), experts)
    jacobian = torch.zeros(tokens, hidden, experts, width)
    for t in range(tokens):
        for i in range(chosen):
            jacobian[t, :, index[t, i]] += outputs[t, i][:, None] * read[t]
    flat = jacobian.reshape(tokens * hidden, -1).double()
    scale = float(flat.pow(2).sum()) / experts / width
    assert problem.scale == pytest.approx(scale, rel=1e-5)
    system = flat.T @ flat + 0.1 * scale * torch.eye(experts * width)
    expected = torch.linalg.solve(system, flat.T @ missing.double().flatten())
    found = problem.solve(0.1 * scale, steps=40)
    assert torch.allclose(found.double().flatten(), expected, atol=1e-5)
    error = float((missing.double().flatten() - flat @ expected).pow(2).sum() - missing.double().pow(2).sum())
    assert problem.error(found) == pytest.approx(error, rel=1e-4)


def test_the_router_of_a_model_that_was_not_edited_stays(models: Any) -> None:
    for model_type in ("mixtral", "deepseek_v3"):
        plan = plan_of(open_checkpoint(models(model_type)))
        found: list[FittedBlock] = []
        fit_layers(Engine(plan), Engine(plan), Tokens(TEXT), RepairOptions("router"), found.append)
        assert found
        assert all(entry.router is None for entry in found)


def test_a_fitted_router_lessens_what_is_missing(models: Any, tmp_path: Path) -> None:
    """What is written is what was fitted, its errors are those of the two written models, and nothing else changes."""
    path = models("mixtral")
    fitted = repaired(path, kind="router", ridge=0.03)
    plan = apply(edit(path)[1], "refit", repair=save(fitted, tmp_path / "repair", "router"))
    write_plan(plan, tmp_path / "out")
    write_plan(edit(path)[1], tmp_path / "edited")
    before, after = read_tensors(tmp_path / "edited"), read_tensors(tmp_path / "out")
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {f"{f.where}.block_sparse_moe.gate.weight" for f in fitted if f.router is not None}
    assert changed
    original, repaired_layers, added = layers_of(load(path)), layers_of(load(tmp_path / "out")), experts_of(load(path))
    for entry in fitted:
        y = added[entry.where][-1].double()
        error = float((original[entry.where] - repaired_layers[entry.where]).pow(2).sum() / y.pow(2).sum())
        assert error == pytest.approx(entry.error_after, rel=2e-2)
        assert entry.error_after <= entry.error_before
