"""Lazy expressions: what they select, how they round, and that they survive pickling."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import Cast, Exponent, Scale, cast, scale
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Copy, Expr, Slice, Stored, concat, reshape, stack
from moesurgery.expr.tensors import take, transpose
from moesurgery.write.recompute import Recomputer

FACTORS = (0.8164965809277261, 1.2247448713915890, 0.5, 3.0, -1.1, 1e-3, 1e30, 1.0000001)


def stored(tmp_path: Path, **tensors: torch.Tensor) -> dict[str, Stored]:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    source = LocalSource(tmp_path)
    header = read_header(path.name, path.stat().st_size, lambda start, n: source.read(path.name, start, n))
    return {info.name: Stored(source, info) for info in header.tensors}


def value(expr: Expr, dtype: torch.dtype) -> torch.Tensor:
    """Evaluate as the writer does."""
    recomputer = Recomputer()
    data = b"".join(part for _, part in recomputer.pieces("x", expr))
    recomputer.close()
    return torch.frombuffer(bytearray(data), dtype=dtype).view(expr.shape)


def all_bf16() -> torch.Tensor:
    return torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_factor_rounds_once_for_every_pattern(tmp_path: Path, dtype: str, factor: float) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    values = all_bf16()
    if dtype == "F16":
        values = values.view(torch.float16)
    elif dtype != "BF16":
        values = values.to(kinds[dtype])
    expected = (values.to(torch.float64 if dtype == "F64" else torch.float32) * factor).to(values.dtype)
    expr = scale(stored(tmp_path, a=values)["a"], factor)
    # By numpy and by torch, beside what writes tensors: that refuses what overflows.
    by_numpy = torch.frombuffer(bytearray(expr.raw(0, len(values), FileReader())), dtype=values.dtype)
    for found in (by_numpy, expr.evaluate(0, len(values), FileReader())):
        number = ~expected.isnan()
        assert torch.equal(found[number].view(torch.uint8), expected[number].view(torch.uint8))
        assert bool(found[~number].isnan().all())


def test_a_factor_of_one_is_a_copy(tmp_path: Path) -> None:
    expr = stored(tmp_path, a=all_bf16())["a"]
    assert scale(expr, 1.0) is expr


def test_selections_are_byte_ranges(tmp_path: Path) -> None:
    values = torch.randn(6, 4, 3).bfloat16()
    of = stored(tmp_path, a=values)["a"]
    cases = {
        "rows": (Slice(of, 2, 5), values[2:5]),
        "rows of rows": (Slice(Slice(of, 1, 6), 1, 3), values[2:4]),
        "concat": (concat([Slice(of, 4, 6), Slice(of, 0, 1)]), torch.cat([values[4:6], values[0:1]])),
        "stack": (stack([reshape(Slice(of, i, i + 1), (4, 3)) for i in (5, 0)]), torch.stack([values[5], values[0]])),
        "take": (take(of, [0, 1, 3, 4, 2]), values[[0, 1, 3, 4, 2]]),
        "nothing": (Slice(of, 3, 3), values[3:3]),
        "rows of a concat": (Slice(concat([of, of]), 5, 8), torch.cat([values, values])[5:8]),
    }
    for name, (expr, expected) in cases.items():
        assert all(isinstance(p, Copy) for p in expr.pieces()), name
        assert expr.shape == tuple(expected.shape), name
        if expected.numel():
            assert torch.equal(value(expr, torch.bfloat16), expected), name
            assert torch.equal(expr.evaluate(0, expr.numel, FileReader()).view(expr.shape), expected), name


def test_take_of_everything_is_the_tensor_and_neighbours_are_one_range(tmp_path: Path) -> None:
    of = stored(tmp_path, a=torch.randn(6, 4))["a"]
    assert take(of, [0, 1, 2, 3, 4, 5]) is of
    assert len(list(take(of, [1, 2, 3, 5]).pieces())) == 2


def test_compositions(tmp_path: Path) -> None:
    values = torch.randn(6, 5)
    of = stored(tmp_path, a=values)["a"]
    assert torch.equal(value(Slice(scale(of, 2.0), 1, 3), torch.float32), values[1:3] * 2)
    assert torch.equal(
        value(scale(concat([Slice(of, 3, 4), of]), 3.0), torch.float32), torch.cat([values[3:4], values]) * 3
    )
    mixed = concat([Slice(of, 0, 2), Scale(Slice(of, 2, 6), 0.5)])
    assert torch.equal(value(mixed, torch.float32), torch.cat([values[:2], values[2:] * 0.5]))
    assert torch.equal(value(Slice(cast(of, "BF16"), 2, 4), torch.bfloat16), values[2:4].bfloat16())


def test_a_part_need_not_begin_where_a_granule_does(tmp_path: Path) -> None:
    """A transpose is evaluated matrix by matrix; rows of it, and what is joined to it, may begin anywhere."""
    values, other = torch.randn(3, 4, 6), torch.randn(5, 4)
    of = stored(tmp_path, a=values, b=other)
    rows = reshape(transpose(of["a"]), (18, 4))
    expected = values.transpose(1, 2).reshape(18, 4)
    for first, last in ((0, 6), (1, 2), (5, 7), (4, 18)):
        part, right = Slice(rows, first, last), expected[first:last]
        assert torch.equal(value(part, torch.float32), right)
        assert torch.equal(value(cast(scale(part, 2.0), "BF16"), torch.bfloat16), (right * 2).bfloat16())
        joined = scale(concat([of["b"], part, of["b"]]), 0.5)
        assert torch.equal(value(joined, torch.float32), torch.cat([other, right, other]) * 0.5)
        assert np.array_equal(values_of(scale(part, 2.0)), right.numpy() * 2)


def test_each_step_rounds_as_if_it_had_been_written(tmp_path: Path) -> None:
    values = torch.randn(1000).bfloat16()
    expr = cast(scale(scale(stored(tmp_path, a=values)["a"], 1.1), 1.3), "F32")
    expected = ((values.float() * 1.1).bfloat16().float() * 1.3).bfloat16().float()
    assert torch.equal(value(expr, torch.float32), expected)


def test_chunks_give_the_same_as_the_whole(tmp_path: Path) -> None:
    values = torch.randn(1000).bfloat16()
    expr = Cast(Scale(stored(tmp_path, a=values)["a"], 1.3), "F32")
    reader = FileReader()
    parts = []
    for start in range(0, 1000, 77):
        reader.begin_chunk()
        parts.append(expr.evaluate(start, min(1000, start + 77), reader).clone())
    assert torch.equal(torch.cat(parts), value(expr, torch.float32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_move_by_powers_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    data = torch.tensor([0, 1, 100, 126, 255], dtype=torch.uint8).view(dtype)
    expr = stored(tmp_path, a=data)["a"]
    found = value(Exponent(expr, 1), torch.uint8)
    assert found.tolist() == [0, 2, 101, 127, 255]  # 0 carries all-zero blocks, 255 is NaN: both stay
    with pytest.raises(RefusedError, match="out of the E8M0 range"):
        value(Exponent(expr, -2), torch.uint8)
    with pytest.raises(RefusedError):
        value(Exponent(expr, 130), torch.uint8)


@pytest.mark.parametrize("what", ["scale", "cast"])
def test_no_arithmetic_without_plain_numbers(tmp_path: Path, what: str) -> None:
    expr = stored(tmp_path, a=torch.zeros(4, dtype=torch.float8_e4m3fn))["a"]
    with pytest.raises(ValueError, match="cannot"):
        scale(expr, 2.0) if what == "scale" else cast(expr, "BF16")


def test_expressions_are_picklable(tmp_path: Path) -> None:
    values = torch.randn(6, 5)
    of = stored(tmp_path, a=values)["a"]
    expr = concat([scale(Slice(of, 0, 2), 2.0), of])
    again = pickle.loads(pickle.dumps(expr))
    assert repr(again) == repr(expr)
    assert torch.equal(value(again, torch.float32), value(expr, torch.float32))


def test_values_while_planning_need_no_torch(tmp_path: Path) -> None:
    values = torch.randn(6, 5).bfloat16()
    of = stored(tmp_path, a=values)["a"]
    assert np.array_equal(values_of(of, (1, 3)), values[1:3].float().numpy())
    assert np.array_equal(values_of(scale(of, 1.7)), (values.float() * 1.7).bfloat16().float().numpy())


@pytest.mark.parametrize("values", [[65504.0, -65519.0, float("inf"), float("nan")], [1.0, 65520.0], [-1e30]])
def test_half_precision_holds_every_finite_number_or_is_refused(tmp_path: Path, values: list[float]) -> None:
    tensor = torch.tensor(values)
    expr = cast(stored(tmp_path, x=tensor)["x"], "F16")
    fits = bool((tensor.half().isinf() == tensor.isinf()).all())
    for give in (lambda: expr.evaluate(0, expr.numel, FileReader()), lambda: expr.array(0, expr.numel, FileReader())):
        if fits:
            assert np.array_equal(np.asarray(give(), dtype=np.float32), tensor.half().float().numpy(), equal_nan=True)
        else:
            with pytest.raises(RefusedError, match="x holds numbers that float16 cannot"):
                give()
