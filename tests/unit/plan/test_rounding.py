"""Scales by weighted errors against a search over all codes, and the record of rounding against plain loops."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Constant
from moesurgery.fitting.collector import collect
from moesurgery.fitting.imatrix_sums import ImatrixSums
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.packed_codes import PackedCodes
from moesurgery.plan.quantised_form import MAGNITUDES, Form, OldScales, quantise
from moesurgery.plan.quantised_tensors import Encoding, QuantisedPart
from moesurgery.plan.rounding import RecordingReader, RoundingRecord, rounding_lines, together
from moesurgery.stats.imatrix_file import save_imatrix
from tests.conftest import Result
from tests.tiny import load, read_tensors, same_bits
from tests.unit.fitting.test_layer_fit import TEXT, experts_of

Cli = Callable[..., Result]
FACTORS = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05)
SEARCHED = [
    Form("e4m3", 8, 4, 16, "F32"),
    Form("e2m1", 4, 1, 32, "U8"),
    Form("e2m1", 4, 1, 16, "F8_E4M3", overall="over"),
    Form("int", 4, 1, 32, "BF16"),
    Form("int", 4, 1, 16, "F16", zeros=True),
]


def numbers(form: Form, zero: float) -> torch.Tensor:
    """All numbers that there are, in scales."""
    if form.numbers == "int":
        return torch.arange(1 << form.bits) - zero
    if form.numbers == "e2m1":
        return torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)


def read_scale(form: Form, scale: torch.Tensor, overall: torch.Tensor | None) -> float:
    value = 2.0 ** (int(scale) - 127) if scale.dtype == torch.uint8 else float(scale.float())
    return value if overall is None else float(torch.tensor(value) / overall)


@pytest.mark.parametrize("form", SEARCHED, ids=str)
def test_a_block_takes_the_scale_of_the_least_weighted_error(form: Form) -> None:
    generator = torch.Generator().manual_seed(3)
    values, weights = torch.randn(8, 64, generator=generator), torch.rand(64, generator=generator) ** 4
    overall = torch.tensor([448 * 6 / float(values.abs().max())]) if form.overall else None
    plain, found = (quantise(values.clone(), form, None, overall, w) for w in (None, weights))
    better = 0
    for row in range(0, 8, form.tall):
        for column in range(0, 64, form.wide):
            at = row // form.tall, column // form.wide
            zero = float(form.middle) if plain.zero is None else float(plain.zero[at])
            block, w = values[row : row + form.tall, column : column + form.wide], weights[column : column + form.wide]
            errors = []
            for factor in (1, 2, 0.5) if form.scale_dtype == "U8" else FACTORS:
                old = plain.scale[at]
                tried = (
                    old + int(math.log2(factor)) if old.dtype == torch.uint8 else (old.float() * factor).to(old.dtype)
                )
                steps = numbers(form, zero) * read_scale(form, tried, overall)
                errors.append(float((((block[..., None] - steps) ** 2).amin(-1) * w).sum()))
            codes = found.codes[row : row + form.tall, column : column + form.wide].view(torch.uint8).long()
            steps = numbers(form, zero)[codes]
            read = steps * read_scale(form, found.scale[at], overall)
            error = float(((block - read) ** 2 * w).sum())
            assert error == pytest.approx(min(errors), rel=1e-4)
            assert error <= errors[0] * (1 + 1e-6)
            better += error < errors[0] * (1 - 1e-3)
    assert better


@pytest.mark.parametrize("form", SEARCHED, ids=str)
def test_weights_leave_what_they_cannot_better(form: Form) -> None:
    """Inputs that were never seen decide nothing, and numbers on the steps of their scales keep their bits."""
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    overall = torch.tensor([700.0]) if form.overall else None
    plain = quantise(values.clone(), form, None, overall)
    unseen = quantise(values.clone(), form, None, overall, torch.zeros(64))
    assert all(same_bits(a, b) for a, b in zip(plain, unseen, strict=True) if a is not None and b is not None)
    zero: Any = float(form.middle) if plain.zero is None else plain.zero.float().repeat_interleave(form.wide, 1)
    scales = torch.tensor([[read_scale(form, s, overall) for s in row] for row in plain.scale])
    read = form.numbers_of(plain.codes, zero) * scales.repeat_interleave(form.tall, 0).repeat_interleave(form.wide, 1)
    again = quantise(read, form, OldScales(plain.scale, plain.zero), overall, torch.rand(64))
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True) if a is not None and b is not None)


def test_of_a_large_matrix_every_eighth_row_is_measured() -> None:
    values = torch.randn(1024, 96, generator=torch.Generator().manual_seed(5))
    values[1::2] **= 3  # of larger error
    form = Form("int", 4, 1, 32, "BF16")
    of = Constant(values.numpy().tobytes(), "F32", (1024, 96))
    record = RoundingRecord()
    QuantisedPart(Encoding("w", of, form), "codes").evaluate(0, of.numel, RecordingReader(record))
    found = quantise(values.clone(), form)
    read = (found.codes.float() - 8) * found.scale.float().repeat_interleave(32, 1)
    error = [float((q - x).norm() / x.norm()) for q, x in ((read, values), (read[::8], values[::8]))]
    assert error[0] != pytest.approx(error[1], rel=1e-3)
    (entry,) = record.summary().values()
    assert entry == {"matrices": 1, "mean": pytest.approx(error[1], rel=5e-3), "largest": entry["mean"], "tensor": "w"}


@pytest.mark.parametrize("form", SEARCHED, ids=str)
def test_scales_are_the_same_with_codes_and_alone(form: Form) -> None:
    values = torch.randn(1024, 512, generator=torch.Generator().manual_seed(6))
    overall = Constant(np.array([700.0], "<f4").tobytes(), "F32", ()) if form.overall else None
    encoding = Encoding("w", Constant(values.numpy().tobytes(), "F32", (1024, 512)), form, overall=overall)
    reader = RecordingReader(RoundingRecord())
    scales = QuantisedPart(encoding, "scale")
    alone = scales.evaluate(0, scales.numel, reader)
    for asked in (1024, 512, 768):  # all that were made, a part of them, and none that fit
        again = QuantisedPart(pickle.loads(pickle.dumps(encoding)), "codes")
        again.evaluate(0, again.numel, reader)
        stop = asked // form.tall * scales.shape[1]
        with_codes = QuantisedPart(again.encoding, "scale").evaluate(0, stop, reader)
        assert same_bits(with_codes, alone[:stop])


def int4_values(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    words = tensors[f"{module}.weight_packed"]
    codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2).float() - 8
    return codes * tensors[f"{module}.weight_scale"].float().repeat_interleave(32, 1)


def test_what_is_rounded_is_said_with_its_error(models: Any, tmp_path: Path, ok: Cli) -> None:
    path = models("qwen3_moe", hidden_size=64, moe_intermediate_size=32, dtype="bfloat16")
    command = ["convert", path, "--quantize", "int4", "--max-shard-size", "60KB", "--jobs", 1]
    said = ok(*command, "-o", tmp_path / "q").out
    answer = ok(*command[:-1], 3, "-o", tmp_path / "again", "--json").json
    before, after = read_tensors(path), read_tensors(tmp_path / "q")
    assert all(same_bits(after[name], tensor) for name, tensor in read_tensors(tmp_path / "again").items())
    errors = {}
    for name in after:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            x = before[f"{module}.weight"].double()
            errors[f"{module}.weight"] = float((int4_values(after, module) - x).norm() / x.norm())
    (entry,) = answer["rounding"].values()
    assert entry["matrices"] == len(errors) > 20
    assert entry["largest"] == pytest.approx(max(errors.values()), rel=5e-3)
    assert entry["mean"] == pytest.approx(np.mean(list(errors.values())), rel=1e-2)
    assert errors[entry["tensor"]] == pytest.approx(entry["largest"], rel=5e-3)
    (line,) = rounding_lines(answer["rounding"])
    assert line in said
    assert line in (tmp_path / "q" / "README.md").read_text()
    shards = [
        e["rounding"]
        for e in json.loads((tmp_path / "q" / "moesurgery.json").read_text())["outputs"]
        if "rounding" in e
    ]
    assert len(shards) > 1
    assert together(shards) == answer["rounding"]
    for number in (1, 2):
        ok(*command, "-o", tmp_path / "parts", "--part", f"{number}/2")
    assert ok("finish", tmp_path / "parts", "--json").json["rounding"] == answer["rounding"]
    edited = ok(
        "rescale", tmp_path / "q", "--top-k", 3, "--scale", 1.1, "--where", "weights", "-o", tmp_path / "e", "--json"
    )
    (again,) = edited.json["rounding"].values()
    assert 0 < again["mean"] < entry["mean"] * 1.2
    assert again["matrices"] == entry["matrices"] // 3  # down-projections
    assert "rounding" not in ok("convert", path, "-o", tmp_path / "copy", "--json").json


# Squares of inputs


@pytest.fixture(scope="module")
def collected(models: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, statistics of its neurons, and its imatrix."""
    folder = tmp_path_factory.mktemp("squares")
    path = models("mixtral", hidden_size=64, intermediate_size=64)
    plan, seen = plan_of(open_checkpoint(path)), ImatrixSums()
    stats = collect(Engine(plan), Tokens(TEXT), [3], neurons=True, imatrix=seen).save(folder / "stats")
    save_imatrix(folder / "i.gguf", seen.arrays(), [], 1, TEXT.shape[1])
    return path, stats, folder / "i.gguf"


def encodings(expr: Expr) -> Encoding | None:
    if isinstance(expr, QuantisedPart):
        return expr.encoding
    return next((found for part in expr.inputs if (found := encodings(part)) is not None), None)


def squares_of(plan: Any) -> dict[str, torch.Tensor]:
    """What each quantised weight's errors are weighed by, up to a factor."""
    found = {}
    for name, expr in plan.tensors.items():
        encoding = encodings(expr)
        if encoding is not None and encoding.weights is not None:
            values = encoding.weights.evaluate(0, encoding.weights.numel, RecordingReader(RoundingRecord()))
            found[name.rpartition(".")[0]] = values / values.mean()
    return found


def test_squares_are_those_of_the_inputs(collected: tuple[Path, Path, Path]) -> None:
    path, stats, imatrix = collected
    plan = plan_of(open_checkpoint(path))
    by_stats, by_imatrix = (
        squares_of(apply(plan, "convert", quantize="int4", stats=str(file))) for file in (stats, imatrix)
    )
    assert len(by_imatrix) == 3 * len(by_stats) == 3 * 8 * len(plan.anatomy.blocks)
    for where, (module, hidden, index, weights, _) in experts_of(load(path)).items():
        for expert in range(8):
            token, slot = (index.reshape(-1, index.shape[-1]) == expert).nonzero(as_tuple=True)
            x = hidden.reshape(-1, hidden.shape[-1])[token]
            gate, up = module.gate_up_proj[expert].chunk(2)
            h = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).detach()
            gated = h * weights.reshape(-1, weights.shape[-1])[token, slot].detach()[:, None]
            block = next(b for b in plan.anatomy.blocks if b.where == where)
            names = {m.role: m.name.removesuffix(".weight") for m in block.members if m.expert == expert and m.part}
            for found, role, inputs in (
                (by_stats, "down", gated),
                (by_imatrix, "down", h),
                (by_imatrix, "up", x),
                (by_imatrix, "gate", x),
            ):
                wanted = inputs.detach().square().sum(0)
                assert torch.allclose(found[names[role]], wanted / wanted.mean(), rtol=1e-3, atol=1e-5)


def test_edits_weigh_by_the_statistics_that_they_have(collected: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, stats, _ = collected
    write_plan(apply(plan_of(open_checkpoint(path)), "convert", quantize="int4"), tmp_path / "q")
    plan = plan_of(open_checkpoint(tmp_path / "q"))
    by_name = squares_of(apply(plan_of(open_checkpoint(path)), "convert", quantize="int4", stats=str(stats)))
    edited = apply(plan, "rescale", top_k=3, scale=1.3, where="weights", stats=str(stats))
    found = squares_of(edited)
    assert found.keys() == by_name.keys()
    assert all(torch.equal(found[name], by_name[name]) for name in found)
    assert "by the squares of their inputs" in edited.steps[-1].notes[-1]
    merged = squares_of(apply(plan, "merge-experts", groups=[[2, 5]], stats=str(stats)))
    assert len(merged) == len(plan.anatomy.blocks)
    write_plan(edited, tmp_path / "weighed")
    write_plan(apply(plan, "rescale", top_k=3, scale=1.3, where="weights"), tmp_path / "plain")
    before = read_tensors(tmp_path / "q")
    for module, squares in by_name.items():
        wanted = 1.3 * int4_values(before, module)
        errors = [
            float(((int4_values(read_tensors(tmp_path / out), module) - wanted) ** 2 * squares).sum())
            for out in ("weighed", "plain")
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6), module


def test_statistics_without_neurons_and_of_another_width(
    collected: tuple[Path, Path, Path], models: Any, tmp_path: Path, cli: Cli
) -> None:
    path, stats, imatrix = collected
    plain = collect(Engine(plan_of(open_checkpoint(path))), Tokens(TEXT)).save(tmp_path / "plain")
    refused = cli("convert", path, "--quantize", "int4", "--stats", plain)
    assert "collect --neurons" in refused.err
    other = models("mixtral", hidden_size=64, intermediate_size=32)
    assert "has 32 inputs" in cli("convert", other, "--quantize", "int4", "--stats", imatrix).err
    assert "--stats is for --quantize" in cli("convert", path, "--stats", stats).err


def test_packed_codes_are_joined_lowest_first() -> None:
    codes = torch.randint(0, 16, (6, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    of = Constant(codes.numpy().tobytes(), "U8", (6, 16))
    words = PackedCodes(of, 4, "I32").evaluate(0, 12, RecordingReader(RoundingRecord()))
    wanted = [sum(int(c) << (4 * i) for i, c in enumerate(row)) for row in codes.view(-1, 8)]
    assert [int(w) & 0xFFFFFFFF for w in words] == wanted
    nibbles = PackedCodes(of, 4, "U8").evaluate(0, 48, RecordingReader(RoundingRecord()))
    assert [int(b) for b in nibbles] == [int(a) | int(b) << 4 for a, b in codes.view(-1, 2)]
