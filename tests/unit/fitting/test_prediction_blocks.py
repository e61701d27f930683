"""Statistics of prediction layers: every sum against loops over what transformers' own decoder layers do there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting import collector
from moesurgery.fitting.collector import collect, collect_over
from moesurgery.forward import engine as engine_module
from moesurgery.forward import scratch as scratch_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.scratch import Scratch
from moesurgery.forward.tokens import Tokens, padded
from moesurgery.stats.criteria import scores
from moesurgery.stats.statistics_file import Stats, load_stats
from tests.commands.test_drop_experts import with_prediction_layer
from tests.quantise import make_fp8, rewrite
from tests.tiny import PROMPT, load, read_config, read_tensors
from tests.unit.fitting.test_collector import Seen, assert_close, by_loops

LAYERS = ["model.layers.2", "model.layers.3"]
OWN = ("enorm", "hnorm", "eh_proj")


def norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * values / torch.sqrt((values**2).mean(-1, keepdim=True) + eps)


class Reference(Seen):
    """The prediction layers as transformers loads them where config.json counts them as the last of four layers."""

    def __init__(self, trunk: Path, predicting: Path, folder: Path, prompt: torch.Tensor) -> None:
        tensors = read_tensors(predicting)
        own = {where: [tensors.pop(f"{where}.{name}.weight") for name in OWN] for where in LAYERS}
        kinds = {k: [*v, "sparse", "sparse"] for k, v in read_config(predicting).items() if k == "mlp_layer_types"}
        rewrite(predicting, folder, tensors, {"num_hidden_layers": 4, "num_nextn_predict_layers": 0, **kinds})
        super().__init__(folder, prompt)
        self.calls.clear()
        model, eps = load(trunk).model, self.model.config.rms_norm_eps
        with torch.no_grad():
            states = model(prompt).last_hidden_state  # after the last norm
            for number, (where, (enorm, hnorm, projection)) in enumerate(own.items(), 1):
                embedded, length = model.embed_tokens(prompt[:, number:]), prompt.shape[1] - number
                both = torch.cat([norm(embedded, enorm, eps), norm(states[:, :length], hnorm, eps)], dim=-1)
                places = torch.arange(length)[None]
                states = self.model.get_submodule(where)(
                    both @ projection.T,
                    attention_mask=torch.full((length, length), float("-inf")).triu(1)[None, None],
                    position_embeddings=model.rotary_emb(both, places),
                    position_ids=places,
                )


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe", "glm4_moe_lite"])
def trunk(request: pytest.FixtureRequest, models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last norm has weights of its own, so that a second norm does not undo it."""
    path = tmp_path_factory.mktemp(request.param) / "trunk"
    tensors = read_tensors(models(request.param))
    torch.manual_seed(7)
    rewrite(models(request.param), path, {**tensors, "model.norm.weight": 3 * torch.rand(32)}, {})
    return path


@pytest.fixture(scope="module")
def predicting(trunk: Path) -> Path:
    """The same with two prediction layers, of which the second goes on from the first."""
    path = trunk.with_name("predicting")
    tensors = with_prediction_layer(trunk, trunk.with_name("one"))
    first, second = (f"{where}." for where in LAYERS)
    more = {n.replace(first, second): t + 0.1 * torch.randn_like(t) for n, t in tensors.items() if n.startswith(first)}
    rewrite(trunk, path, {**tensors, **more}, {"num_nextn_predict_layers": 2})
    return path


@pytest.fixture(autouse=True)
def one_window_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", PROMPT.shape[1])


def stats_of(path: Path, tokens: Tokens | None = None, **options: Any) -> Stats:
    return collect(Engine(plan_of(open_checkpoint(path))), tokens or Tokens(PROMPT), **options)


def test_every_sum_of_the_formula(trunk: Path, predicting: Path, tmp_path: Path) -> None:
    found = load_stats(stats_of(predicting, other_top_k=(3,), keep=(6,)).save(tmp_path / "s"))
    assert list(found.prediction) == LAYERS
    seen = Reference(trunk, predicting, tmp_path / "four", PROMPT)
    for number, (where, block) in enumerate(found.prediction.items(), 1):
        windows = torch.arange(len(PROMPT)).repeat_interleave(PROMPT.shape[1] - number)
        for name, values in by_loops(seen, where, windows, torch.ones(len(windows), dtype=torch.bool)).items():
            assert_close(block.sums[name], values, name)
        assert block.total("recon@6").sum() == 6
        assert block.total("mass@3") > 0


def test_only_tokens_with_a_next_one_count(predicting: Path) -> None:
    rows = [PROMPT[0, :9].tolist(), PROMPT[1].tolist()]
    found = stats_of(predicting, padded(rows)).prediction
    apart = [stats_of(predicting, Tokens(torch.tensor([row]))).prediction for row in rows]
    assert [found[where].sums["tokens"].tolist() for where in LAYERS] == [[8, 23], [7, 22]]
    for where in LAYERS:
        for name in ("count", "gate_norm", "gram", "output"):
            assert_close(found[where].total(name), sum(part[where].total(name) for part in apart), name)


@pytest.mark.parametrize("engines", [[{}, {}], [{"device": ["cpu", "cpu"]}]])
def test_several_devices(predicting: Path, engines: list[dict[str, Any]]) -> None:
    plan = plan_of(open_checkpoint(predicting))
    each = [Engine(plan, **options) for options in engines]
    both = collect_over(each, Tokens(PROMPT), scratch=[None] * len(each))
    alone = stats_of(predicting)
    assert both.about["prediction"] == LAYERS
    for where in LAYERS:
        for name in ("tokens", "count", "gate_norm", "gram", "output"):
            assert_close(both.prediction[where].total(name), alone.prediction[where].total(name), name)


def test_killed_behind_the_trunk(predicting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "SAVE_SECONDS", 0)
    folder, expected = tmp_path / "scratch", stats_of(predicting).save(tmp_path / "whole").read_bytes()
    with monkeypatch.context() as killing:
        killing.setattr(collector, "prediction_inputs", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stats_of(predicting, scratch=Scratch(folder, {}))
    assert json.loads((folder / "state.json").read_text())["layer"] == 1
    assert stats_of(predicting, scratch=Scratch(folder, {})).save(tmp_path / "again").read_bytes() == expected


@pytest.mark.parametrize("by", ["reap-sum", "frequency"])
def test_the_experts_of_least_sums_go(predicting: Path, tmp_path: Path, by: Any) -> None:
    stats = stats_of(predicting)
    file = str(stats.save(tmp_path / "s"))
    plan = apply(plan_of(open_checkpoint(predicting)), "drop-experts", count=4, by=by, stats=file)
    gone = {layer["layer"]: layer["dropped"] for layer in plan.steps[0].report["layers"]}
    for where in LAYERS:
        found = scores(stats.prediction[where], by)
        for group in (range(4), range(4, 8)):
            assert set(gone[where]) & set(group) == set(sorted(group, key=lambda e: found[e])[:2])
    assert not any("router rows" in note for note in plan.steps[0].notes)
    merged = apply(plan_of(open_checkpoint(predicting)), "merge-experts", to=4, stats=file)
    assert not any("router rows" in note for note in merged.steps[0].notes)


def test_without_their_statistics_router_rows_choose(trunk: Path, predicting: Path, tmp_path: Path) -> None:
    """A file of a model without the layers, as older versions wrote it for those with them."""
    file = str(stats_of(trunk).save(tmp_path / "s"))
    step = apply(plan_of(open_checkpoint(predicting)), "drop-experts", count=4, stats=file).steps[0]
    assert any(f"{', '.join(LAYERS)}: not run" in note for note in step.notes)
    without = stats_of(predicting).save(tmp_path / "with")  # and the other way: the layers are gone
    apply(apply(plan_of(open_checkpoint(predicting)), "mtp-drop"), "drop-experts", count=4, stats=str(without))


def test_layers_of_another_form_are_not_run(predicting: Path, tmp_path: Path) -> None:
    tensors = read_tensors(predicting)
    del tensors[f"{LAYERS[0]}.hnorm.weight"]
    rewrite(predicting, tmp_path / "other", tensors, {})
    assert not stats_of(tmp_path / "other").prediction


def test_quantised_layers_with_a_list_of_modules(predicting: Path, tmp_path: Path) -> None:
    """A list that names layers by numbers keeps config.json from moving layers: here none moves."""
    make_fp8(predicting, tmp_path / "fp8")
    config = read_config(tmp_path / "fp8")["quantization_config"]
    tensors = read_tensors(tmp_path / "fp8") | {
        name: tensor for name, tensor in read_tensors(predicting).items() if "eh_proj" in name
    }
    config["modules_to_not_convert"] = [f"{where}.eh_proj" for where in LAYERS]
    rewrite(tmp_path / "fp8", tmp_path / "listed", tensors, {"quantization_config": config})
    plain, quantised = (
        stats_of(path).prediction[LAYERS[0]].total("gate_norm") for path in (predicting, tmp_path / "listed")
    )
    assert np.abs(plain - quantised).max() < 0.2 * plain.max()
