"""Values as numpy arrays: the same bits as torch gives, and no torch imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moesurgery.checkpoint.arrays import decoded, encoded, rounded
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.expr.elementwise import cast, scale
from moesurgery.expr.nodes import Slice, reshape, stack
from moesurgery.expr.random import Normal, Uniform
from moesurgery.expr.tensors import Constant, Full, slice_last, transpose
from tests.unit.expr.test_expr import stored

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def torch_bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_sixteen_bit_pattern_is_read_and_written_as_torch_does(dtype: str) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(TORCH[dtype])
    values = decoded(torch_bytes(patterns), dtype)
    assert np.array_equal(values, patterns.float().numpy(), equal_nan=True)
    again = torch.frombuffer(bytearray(encoded(values.copy(), dtype)), dtype=TORCH[dtype])
    number = ~patterns.isnan()
    assert torch.equal(again[number].view(torch.int16), patterns[number].view(torch.int16))
    assert bool(again[~number].isnan().all())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_rounding_is_that_of_torch(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32)
    ties = torch.randint(-(2**15), 2**15, (20_000,), generator=generator).to(torch.int32) * 65536 + 0x8000
    values = torch.cat([bits, ties, torch.tensor([0, -(2**31)], dtype=torch.int32)]).view(torch.float32)
    values = values[~values.isnan()]
    assert bytes(encoded(values.numpy().copy(), dtype)) == torch_bytes(values.to(TORCH[dtype]))
    again = rounded(values.numpy().copy(), dtype)
    assert np.array_equal(again, values.to(TORCH[dtype]).to(torch.float64 if dtype == "F64" else torch.float32).numpy())


def test_a_nan_stays_one_whatever_its_bits() -> None:
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    written = torch.frombuffer(bytearray(encoded(patterns.numpy().copy(), "BF16")), dtype=torch.bfloat16)
    assert bool(written.isnan().all())


def test_arrays_of_expressions_are_their_values(tmp_path: Path) -> None:
    a, b = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).double()
    t = stored(tmp_path, a=a, b=b)
    expressions = {
        "stored": t["a"],
        "wide": t["b"],
        "rows": Slice(t["a"], 2, 5),
        "joined": stack([Slice(t["a"], 0, 2), Slice(t["a"], 4, 6)]),
        "scaled": scale(t["a"], 0.3),
        "cast": cast(t["b"], "BF16"),
        "turned": transpose(t["a"]),
        "seen": reshape(t["a"], (24,)),
        "filled": Full(0.3, "BF16", (6, 4)),
        "normal": Normal(0.02, 7, "BF16", (6, 4)),
        "uniform": Uniform(0.5, 7, "F32", (6, 4)),
        "values": Constant(a.float().numpy().tobytes(), "F32", (6, 4)),
    }
    for name, expr in expressions.items():
        reader = FileReader()
        expected = expr.evaluate(0, expr.numel, reader).double()
        found = expr.array(0, expr.numel, reader)
        assert found.dtype == (np.float64 if expr.dtype == "F64" else np.float32), name
        assert np.array_equal(found.astype(np.float64), expected.numpy()), name
        assert expr.numpy_only == (name != "turned")
        if expr.numpy_only:
            assert np.array_equal(expr.array(3, 7, reader), found[3:7]), name
            assert bytes(expr.raw(0, expr.numel, reader)) == torch_bytes(expr.evaluate(0, expr.numel, reader))


def test_selections_keep_every_bit_without_torch(tmp_path: Path) -> None:
    patterns = torch.randint(-(2**15), 2**15, (6, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    patterns[0] = torch.tensor([0x7F81, 0x7FFF, -1, -0x7F, 0x7FC1, 0x7F80, 0, -0x8000])  # NaNs with their own bits
    a = patterns.view(torch.bfloat16)
    t = stored(tmp_path, a=a)
    reader = FileReader()
    for expr, wanted in (
        (slice_last(t["a"], 2, 5), a[:, 2:5]),
        (slice_last(Slice(t["a"], 0, 4), 1, 8), a[:4, 1:8]),
        (slice_last(stack([Slice(t["a"], 0, 1), Slice(t["a"], 3, 4)]), 0, 3), a[[0, 3], None, :3]),
    ):
        assert expr.numpy_only
        assert bytes(expr.raw(0, expr.numel, reader)) == torch_bytes(wanted.contiguous())
    part = slice_last(t["a"], 2, 5)
    assert bytes(part.raw(3, 9, reader)) == torch_bytes(a[1:3, 2:5].contiguous())
    finite = slice_last(Slice(t["a"], 1, 6), 2, 5)
    assert np.array_equal(finite.array(0, 15, reader), a[1:6, 2:5].float().flatten().numpy(), equal_nan=True)


def test_light_expressions_import_no_torch(tmp_path: Path) -> None:
    stored(tmp_path, a=torch.randn(40).bfloat16())
    program = f"""
import sys
from pathlib import Path
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.source import LocalSource
from moesurgery.expr.elementwise import cast, scale
from moesurgery.expr.nodes import Stored, stack
from moesurgery.checkpoint.file_reader import FileReader
source = LocalSource(Path({str(tmp_path)!r}))
(file,) = source.files()
header = read_header(file, source.files()[file], lambda s, n: source.read(file, s, n))
a = Stored(source, header.tensors[0])
expr = stack([scale(cast(a, "F32"), 2.0), cast(a, "F32")])
assert expr.numpy_only and len(expr.raw(0, 80, FileReader())) == 320
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
