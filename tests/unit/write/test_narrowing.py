"""Numbers that the dtype of the output cannot hold: refused by every writer, the tensor named; never infinity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from tests.conftest import Result
from tests.tiny import read_tensors
from tests.unit.checkpoint.test_not_finite import UP, dense, edited
from tests.unit.write.test_sources import repair_of

Cli = Callable[..., Result]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BEYOND = {"float16": 70000.0, "bfloat16": 3.4e38}
LIMIT = {"float16": "float16 cannot: beyond 65504", "bfloat16": "bfloat16 cannot: beyond 3.38953e+38"}


def recipe(folder: Path, **content: Any) -> Path:
    (folder / "r.yml").write_text(yaml.safe_dump(content))
    return folder / "r.yml"


def refused(result: Result, tensor: str, dtype: str, out: Path) -> None:
    assert result.code == 2, result.out
    assert f"{tensor} holds numbers that {LIMIT[dtype]}" in " ".join(result.err.split())
    assert "hint:" in result.err
    assert "use " in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *(("linear", "bfloat16"), ("passthrough", "bfloat16")),
        *(
            (m, "float16")
            for m in ("linear", "passthrough", "slerp", "ties", "task_arithmetic", "model_stock", "della")
        ),
    ],
)
def test_merges(tmp_path: Path, cli: Cli, method: str, dtype: str) -> None:
    value = BEYOND[dtype]
    base = dense(tmp_path / "base", 0)
    a, b = dense(tmp_path / "a", 1, value), dense(tmp_path / "b", 2, value)
    models = {"passthrough": [a], "slerp": [a, b]}.get(method, [a, b])
    parameters: dict[str, Any] = {"t": 0.5} if method == "slerp" else {"weight": 1.0}
    content: dict[str, Any] = {"merge_method": method, "models": [{"model": str(m)} for m in models], "dtype": dtype}
    if method not in ("passthrough", "model_stock"):
        content["parameters"] = parameters
    if method not in ("passthrough", "linear"):
        content["base_model"] = str(a if method == "slerp" else base)
    result = cli("merge", recipe(tmp_path, **content), "-o", tmp_path / "out")
    refused(result, UP, dtype, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_beside_numbers_that_are_not_finite_already(tmp_path: Path, cli: Cli, dtype: str) -> None:
    """Infinity and NaN of the source stay what they are; what would become infinite is refused all the same."""
    a, b = dense(tmp_path / "a", 1), dense(tmp_path / "b", 2)
    for folder, more in ((a, []), (b, [BEYOND[dtype]])):
        tensors = load_file(folder / "model.safetensors")
        odd = [float("inf"), float("nan"), *more]
        tensors[UP].view(-1)[: len(odd)] = torch.tensor(odd)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, folder in (("fits", a), ("beyond", b)):
        path = recipe(
            tmp_path, merge_method="linear", dtype=dtype, models=[{"model": str(folder), "parameters": {"weight": 1}}]
        )
        result = cli("merge", path, "-o", tmp_path / name)
        if name == "beyond":
            refused(result, UP, dtype, tmp_path / name)
            continue
        assert result.code == 0, result.err
        found, before = (load_file(f / "model.safetensors")[UP].view(-1) for f in (tmp_path / name, folder))
        assert found.dtype == DTYPES[dtype]
        assert torch.equal(found.isfinite(), before.isfinite())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", [None, "fused"])
def test_convert(models: Any, tmp_path: Path, cli: Cli, dtype: str, layout: str | None) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    bad = edited(models("mixtral"), tmp_path / "bad", lambda t: t[name].view(-1)[7:8].fill_(BEYOND[dtype]) and None)
    result = cli("convert", bad, "--dtype", dtype, *(["--layout", layout] if layout else []), "-o", tmp_path / "out")
    refused(result, name if layout is None else "model.layers.1.mlp.experts.down_proj", dtype, tmp_path / "out")


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_factor_of_rescale(models: Any, tmp_path: Path, cli: Cli, dtype: str, factor: float) -> None:
    """Written in place by numpy: neighbours are multiplied together, and the right one is named."""
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    kind = getattr(torch, dtype)
    largest = torch.finfo(kind).max

    def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for n in tensors:
                tensors[n] = tensors[n].to(kind)
            tensors[name].view(-1)[-2] = value

        return change

    fits = edited(models("mixtral"), tmp_path / "fits", spoil(-largest / 4))
    assert cli("rescale", fits, "--top-k", 3, "--scale", factor, "-o", tmp_path / "a").code == 0
    bad = edited(models("mixtral"), tmp_path / "bad", spoil(-largest))
    result = cli("rescale", bad, "--top-k", 3, "--scale", factor, "-o", tmp_path / "b")
    assert result.code == 2
    assert f"{name} holds numbers that {dtype} cannot: beyond {largest:.6g}" in " ".join(result.err.split())
    assert "or a smaller factor" in " ".join(result.err.split())
    assert not (tmp_path / "b").exists()


def test_added_experts(models: Any, tmp_path: Path, cli: Cli) -> None:
    theirs = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    half = models("mixtral", dtype="float16")
    bad = edited(models("mixtral"), tmp_path / "bad", lambda t: t[theirs].view(-1)[:1].fill_(-1e5) and None)
    result = cli("add-expert", half, "--source", bad, "--experts", "1,2", "-o", tmp_path / "out")
    refused(result, "model.layers.0.block_sparse_moe.experts.9.w1.weight", "float16", tmp_path / "out")
    assert cli("add-expert", half, "--source", bad, "--experts", "1,3", "-o", tmp_path / "fits").code == 0


def test_upcycles(models: Any, tmp_path: Path, cli: Cli) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = edited(models("llama"), tmp_path / "bad", lambda t: t[name].view(-1)[:1].fill_(7e4) and None)
    result = cli("upcycle", bad, "--experts", 4, "--dtype", "float16", "-o", tmp_path / "out")
    assert result.code == 2
    assert "holds numbers that float16 cannot: beyond 65504" in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


def test_means_of_tied_blocks_and_merged_experts(models: Any, tmp_path: Path) -> None:
    """A mean is of the size of its parts; shares that are not a mean are what goes beyond."""
    half = models("mixtral", dtype="float16")
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight" for i in (0, 1) for e in (0, 1)]

    def large(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name].view(-1)[0] = 65504.0

    plan = plan_of(open_checkpoint(edited(half, tmp_path / "large", large)))
    for number, edit in enumerate(
        (
            apply(plan, "tie-blocks", init="average", materialize=True),
            apply(plan, "merge-experts", groups=[[0, 1]], weights="equal"),
        )
    ):
        write_plan(edit, tmp_path / f"out{number}")
        assert all(bool(t.isfinite().all()) for t in read_tensors(tmp_path / f"out{number}").values())


def test_adapters(tmp_path: Path, cli: Cli) -> None:
    model, adapter = dense(tmp_path / "m", 1), tmp_path / "adapter"
    tensors = {name: t.half() for name, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    factors = {"lora_A": torch.full((2, 8), 300.0), "lora_B": torch.full((12, 2), 300.0)}
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({f"{prefix}.{n}.weight": t for n, t in factors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    path = recipe(tmp_path, merge_method="passthrough", models=[{"model": f"{model}+{adapter}"}])
    refused(cli("merge", path, "-o", tmp_path / "out"), UP, "float16", tmp_path / "out")


def test_repairs(models: Any, tmp_path: Path) -> None:
    half = models("mixtral", dtype="float16")
    plan = apply(plan_of(open_checkpoint(half)), "refit", repair=str(repair_of(half, tmp_path / "repair", 1e6)))
    with pytest.raises(RefusedError, match=r"experts\.0\.w2\.weight holds numbers that float16 cannot: beyond 65504"):
        write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
