"""Probing: leaving an expert out is what dropping it is; what experts are sent; table, JSON and pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.fitting import ablation as probe_module
from moesurgery.fitting.ablation import Ablations, ablate, screened, takers
from moesurgery.forward import engine as engine_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from tests.conftest import Result
from tests.golden.models import write
from tests.tiny import PROMPT, load, logits

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def one_window_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", PROMPT.shape[1])


def loss(model: torch.nn.Module) -> float:
    found = logits(model)[:, :-1].double()
    return float(cross_entropy(found.flatten(0, 1), PROMPT[:, 1:].flatten()))


def ablated(path: Path, mode: Any, experts: list[int]) -> Ablations:
    engine = Engine(plan_of(open_checkpoint(path)), keep=0)
    return ablate(engine, Tokens(PROMPT), {b.where: experts for b in engine.blocks}, [mode])


@pytest.mark.parametrize("abreast", [1, 1 << 30])
@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_without_an_expert_is_after_dropping_it(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, abreast: int
) -> None:
    """One index of all layers, by transformers on the written checkpoint; prefix reuse and side by side or not."""
    monkeypatch.setattr(probe_module, "ABREAST_BYTES", abreast)
    path = models(model_type)
    found = ablated(path, "mask", [2, 5])
    assert found.base == pytest.approx(loss(load(path)), abs=1e-6)
    for expert in (2, 5):
        out = tmp_path / str(expert)
        write_plan(apply(plan_of(open_checkpoint(path)), "drop-experts", experts=[expert]), out)
        assert found.index["mask"][expert] == pytest.approx(loss(load(out)), abs=1e-5)


def one_layer_cut(path: Path, layer: int, expert: int) -> float:
    """The loss of a transformers model with one expert of one layer cut out."""
    model = load(path)
    module = model.get_submodule(f"model.layers.{layer}.mlp")
    kept = [e for e in range(8) if e != expert]
    for holder in (module.experts, module.gate):
        for name, tensor in [*holder.named_parameters(), *holder.named_buffers()]:
            if tensor.shape[0] == 8:
                setattr(holder, name, torch.nn.Parameter(tensor[kept], requires_grad=False))
        if hasattr(holder, "num_experts"):
            holder.num_experts = 7
    return loss(model)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_one_expert_of_one_layer(models: Any, model_type: str) -> None:
    path = models(model_type)
    masked = ablated(path, "mask", [0, 5]).single["mask"]
    silent = ablated(path, "zero", [0, 5]).single["zero"]
    for layer in (0, 1):
        for expert in (0, 5):
            where = f"model.layers.{layer}"
            assert masked[where][expert] == pytest.approx(one_layer_cut(path, layer, expert), abs=1e-5)
            model = load(path)
            model.get_submodule(f"{where}.mlp").experts.down_proj.data[expert] = 0
            assert silent[where][expert] == pytest.approx(loss(model), abs=1e-5)


def test_an_expert_that_is_never_chosen(models: Any, tmp_path: Path) -> None:
    model = load(models("mixtral"))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = layer.mlp.gate.weight.data[2]  # a tie goes to the lower number
        layer.mlp.gate.weight.data[2:4] *= 0
    model.save_pretrained(tmp_path / "m", save_original_format=True)
    found = takers([Engine(plan_of(open_checkpoint(tmp_path / "m")))], Tokens(PROMPT))
    unused = [(w, e) for w, experts in found.items() for e, taken in enumerate(experts) if not taken]
    assert unused
    masked = ablated(tmp_path / "m", "mask", list(range(8)))
    for where, expert in unused:
        assert masked.single["mask"][where][expert] == pytest.approx(masked.base, abs=1e-7)


def test_which_tokens_an_expert_takes(models: Any) -> None:
    path = models("mixtral")
    found = takers([Engine(plan_of(open_checkpoint(path)))], Tokens(PROMPT))
    model = load(path)
    seen: dict[str, Counter[tuple[int, int]]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda m, args, w=f"model.layers.{number}": seen.__setitem__(
                w, Counter((int(e), int(t)) for t, row in zip(PROMPT.flatten(), args[1], strict=True) for e in row)
            )
        )
    logits(model)
    occurs = Counter(PROMPT.flatten().tolist())
    for where, experts in found.items():
        for expert, taken in enumerate(experts):
            assert len(taken) == min(8, sum(e == expert for e, _ in seen[where]))
            for token, count, share in taken:
                assert seen[where][expert, token] == count
                assert share == pytest.approx(count / occurs[token])


def test_screening_takes_both_ends(models: Any) -> None:
    block = Engine(plan_of(open_checkpoint(models("mixtral")))).blocks[0]
    scores = [5.0, 1, 7, 3, 2, 8, 6, 4]
    assert screened(block, scores, False, most=2) == [1, 2, 4, 5]
    assert screened(block, scores, True, most=2) == list(range(8))
    assert screened(block, scores, False) == list(range(8))


# The command


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    from tests.conftest import DEMO

    arguments = ["probe", DEMO, "--text", DEMO.parent / "calibration-code.txt", "--window", 32, "--tokens", 64]
    return tmp_path_factory.mktemp("probe") / "p", arguments


def test_the_command(probed: tuple[Path, list[object]], ok: Cli, cli: Cli) -> None:
    out, arguments = probed
    shown = ok(*arguments, "--mode", "mask", "-o", out).out
    assert shown.count("model.layers.") == 6
    assert "one index out of all layers (mask)" in shown
    document = json.loads(Path(f"{out}.json").read_text())
    assert document["tokens"] == 64
    for layer in document["layers"]:
        assert sum(e["usage"] for e in layer["experts"]) == pytest.approx(2)
        assert 0 < layer["entropy"] < 2.08
        assert layer["balance"] >= 0.9
        assert all(set(e["change"]) == {"mask"} for e in layer["experts"])
    assert Path(f"{out}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    html = Path(f"{out}.html").read_text()
    assert not re.search(r"(src|href)=|https?:", html)  # nothing is fetched
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    assert data is not None
    assert json.loads(data[1]) == document
    again = cli(*arguments, "-o", out)
    assert again.code == 2
    assert "--force" in again.err
    assert "expected one of mask, zero, both" in cli(*arguments, "--mode", "kill").err


def test_a_dense_model_has_nobody_to_leave_out(tmp_path: Path, cli: Cli) -> None:
    model = write("llama", 0, tmp_path / "dense")
    (tmp_path / "ids.jsonl").write_text(json.dumps(PROMPT.flatten().tolist()))
    result = cli("probe", model, "--text", tmp_path / "ids.jsonl", "--window", 16)
    assert result.code == 2
    assert "error: probe: this is a dense model" in result.err


def test_token_ids_need_no_tokenizer(models: Any, tmp_path: Path, ok: Any) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps(PROMPT.flatten().tolist()))
    options = ["--text", tmp_path / "ids.jsonl", "--window", 16, "--tokens", 32, "--mode", "zero", "--json"]
    document = ok("probe", models("mixtral"), *options).json
    assert {t["text"][:6] for e in document["layers"][0]["experts"] for t in e["takes"]} == {"token "}
