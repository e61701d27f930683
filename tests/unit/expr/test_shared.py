"""Solutions: one computation for several expressions, whatever the threads; and rows in the order one gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.expr import shared
from moesurgery.expr.shared import Reordered, SharedComputation, SharedResult
from moesurgery.expr.tensors import transpose
from tests.unit.expr.test_expr import stored
from tests.unit.expr.test_tensors import in_chunks

calls: list[int] = []


def sorted_rows(values: torch.Tensor, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
    calls.append(1)
    found = values[:, 0].sort(descending=descending)
    return found.values, found.indices


@pytest.fixture(autouse=True)
def fresh() -> None:
    calls.clear()
    shared._kept.clear()


def test_results_share_one_computation(tmp_path: Path) -> None:
    a = torch.randn(7, 4)
    t = stored(tmp_path, a=a)
    solution = SharedComputation(sorted_rows, (t["a"],), (("descending", True),))
    values, order = SharedResult(solution, 0, "BF16", (7,)), SharedResult(solution, 1, "I64", (7,))
    assert torch.equal(in_chunks(values, 2), a[:, 0].sort(descending=True).values.bfloat16())
    expected = a[:, 0].argsort(descending=True)
    assert torch.equal(in_chunks(order, 2), expected)
    assert torch.equal(in_chunks(Reordered(t["a"], order), 8), a[expected])
    turned = transpose(t["a"])
    columns = SharedResult(SharedComputation(sorted_rows, (turned,), (("descending", False),)), 1, "I64", (4,))
    assert torch.equal(in_chunks(Reordered(turned, columns), 7), a.t()[a.t()[:, 0].argsort()])
    assert len(calls) == 2
    assert " at 0x" not in repr(values)  # the digest of a plan is made of it


def test_threads_wait_for_the_first(tmp_path: Path) -> None:
    t = stored(tmp_path, a=torch.randn(50, 4))
    parts = [
        SharedResult(SharedComputation(sorted_rows, (t["a"],), (("descending", True),)), n % 2, "F32", (50,))
        for n in range(16)
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: part.evaluate(0, 50, FileReader()), parts))
    assert all(torch.equal(found[n], found[n % 2]) for n in range(16))
    assert len(calls) == 1


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    t = stored(tmp_path, **{f"a{n}": torch.randn(5, 2) for n in range(20)})
    for name in t:
        SharedResult(SharedComputation(sorted_rows, (t[name],), (("descending", True),)), 0, "F32", (5,)).evaluate(
            0, 5, FileReader()
        )
    assert len(shared._kept) == shared.KEPT
    assert len(calls) == 20
