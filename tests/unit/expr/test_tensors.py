"""Expressions that need values in memory: equal to torch on the whole, whatever the chunks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import scale
from moesurgery.expr.nodes import Expr, reshape
from moesurgery.expr.random import Normal, random_key
from moesurgery.expr.tensors import Applied, Full, Gather, Linear, Transposed, concat_last, mean, slice_last, transpose
from tests.unit.expr.test_expr import stored


def in_chunks(expr: Expr, about: int) -> torch.Tensor:
    """Evaluate in parts of whole granules, as the writer does, and check that parts equal the whole."""
    reader = FileReader()
    whole = expr.evaluate(0, expr.numel, reader).clone()
    step = max(1, about // expr.chunk_multiple) * expr.chunk_multiple
    parts = []
    for start in range(0, expr.numel, step):
        reader.begin_chunk()
        parts.append(expr.evaluate(start, min(expr.numel, start + step), reader).clone())
    assert torch.equal(torch.cat(parts), whole)
    again = pickle.loads(pickle.dumps(expr)).evaluate(0, expr.numel, FileReader())
    assert torch.equal(again, whole)
    return whole.view(expr.shape)


def test_weighted_sums_accumulate_in_float32_and_round_once(tmp_path: Path) -> None:
    a, b, c = (torch.randn(500).bfloat16() for _ in range(3))
    t = stored(tmp_path, a=a, b=b, c=c)
    expr = Linear(((t["a"], 0.3), (t["b"], 0.7), (t["c"], -1.1)), "BF16")
    exact = a.double() * 0.3 + b.double() * 0.7 + c.double() * -1.1
    found = in_chunks(expr, 64).double()
    ulp = torch.exp2(exact.abs().log2().floor() - 7)
    # Rounding at each addition would err by more; float32 itself errs by up to 1e-6 where the terms cancel.
    assert bool(((found - exact).abs() <= 0.501 * ulp + 1e-6).all())
    assert torch.equal(in_chunks(mean([t["a"], t["a"]]), 7), a)
    with pytest.raises(RefusedError, match="cannot be averaged"):
        Linear(((t["a"], 1.0), (reshape(t["b"], (50, 10)), 1.0)), "F32")


def test_columns_and_their_joins(tmp_path: Path) -> None:
    a, b = torch.randn(6, 4, 10), torch.randn(6, 4, 3)
    t = stored(tmp_path, a=a, b=b)
    assert torch.equal(in_chunks(slice_last(t["a"], 2, 7), 11), a[..., 2:7])
    assert slice_last(t["a"], 0, 10) is t["a"]
    joined = concat_last([t["b"], slice_last(t["a"], 8, 10), scale(t["b"], 2.0)])
    assert torch.equal(in_chunks(joined, 30), torch.cat([b, a[..., 8:], b * 2], dim=-1))
    with pytest.raises(ValueError, match="columns"):
        slice_last(t["a"], 3, 11)


def test_interleaving_is_reshaping_and_columns(tmp_path: Path) -> None:
    rows = torch.randn(12, 5)  # gate and up rows alternate
    cols = torch.randn(5, 12)  # gate and up columns alternate
    t = stored(tmp_path, rows=rows, cols=cols)
    assert torch.equal(in_chunks(slice_last(reshape(t["rows"], (6, 10)), 0, 5), 9), rows[::2])
    assert torch.equal(in_chunks(slice_last(reshape(t["cols"], (30, 2)), 1, 2), 9).view(5, 6), cols[:, 1::2])
    gate, up = slice_last(reshape(t["cols"], (30, 2)), 0, 1), slice_last(reshape(t["cols"], (30, 2)), 1, 2)
    assert torch.equal(in_chunks(reshape(concat_last([gate, up]), (5, 12)), 8), cols)


def test_transposes(tmp_path: Path) -> None:
    a = torch.randn(3, 4, 5)
    t = stored(tmp_path, a=a)
    assert torch.equal(in_chunks(transpose(t["a"]), 20), a.transpose(1, 2))
    assert transpose(transpose(t["a"])) is t["a"]
    half = slice_last(Transposed(t["a"]), 1, 3)
    assert torch.equal(in_chunks(half, 1), a.transpose(1, 2)[..., 1:3])


def test_picked_rows(tmp_path: Path) -> None:
    a = torch.randn(7, 4, 2)
    t = stored(tmp_path, a=a)
    order = (6, 0, 1, 2, 5, 5, 3)
    assert torch.equal(in_chunks(Gather(t["a"], order), 16), a[list(order)])
    turned = Gather(transpose(t["a"]), order)
    assert torch.equal(in_chunks(turned, 16), a.transpose(1, 2)[list(order)])


def test_filled(tmp_path: Path) -> None:
    assert torch.equal(in_chunks(Full(0.5, "BF16", (3, 4)), 5), torch.full((3, 4), 0.5).bfloat16())


def test_normal_numbers_depend_on_key_and_position_alone() -> None:
    expr = Normal(0.02, random_key(1, "a"), "F32", (3, 65536))
    values = in_chunks(expr, 65536)
    assert abs(values.mean().item()) < 2e-4
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(values[0], values[1])
    other = Normal(0.02, random_key(2, "a"), "F32", (3, 65536)).evaluate(0, 100, FileReader())
    assert not torch.equal(values.view(-1)[:100], other)
    shorter = Normal(0.02, random_key(1, "a"), "F32", (100,)).evaluate(0, 100, FileReader())
    assert torch.equal(values.view(-1)[:100], shorter)


def test_applied_functions_see_whole_tensors(tmp_path: Path) -> None:
    a = torch.randn(6, 4)
    t = stored(tmp_path, a=a)
    expr = Applied(torch.kron, (t["a"], t["a"]), "BF16", (36, 16))
    assert torch.equal(in_chunks(expr, 3), torch.kron(a, a).bfloat16())
    assert expr.chunk_multiple == 36 * 16
    assert " at 0x" not in repr(expr)  # the digest of a plan is made of it
