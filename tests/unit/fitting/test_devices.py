"""A model or its windows shared among devices: the sums, losses and fits of one device.

Several devices are simulated by naming the processor several times.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import RecipeError
from moesurgery.fitting.ablation import ablate, ablate_over, takers
from moesurgery.fitting.collector import collect
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.fitting.run_settings import RunSettings
from moesurgery.forward import engine as engine_module
from moesurgery.forward.device_threads import side_by_side
from moesurgery.forward.engine import Engine
from moesurgery.forward.loss import compared, compared_over
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens, shared_out
from moesurgery.forward.unit_runner import moved
from moesurgery.plan.plan import Plan
from moesurgery.stats.repair_file import FittedBlock

LAYERS = 5
IDS = torch.randint(3, 60, (10, 24), generator=torch.Generator().manual_seed(5))
TOKENS = Tokens(IDS)
TWO = ["cpu", "cpu"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", 48)


@pytest.fixture
def plan(models: Any) -> Plan:
    return plan_of(open_checkpoint(models("mixtral", num_hidden_layers=LAYERS)))


@pytest.mark.parametrize("devices", [2, 3, 4, 7])
def test_layers_are_spread_in_order(plan: Plan, devices: int) -> None:
    engine = Engine(plan, device=["cpu"] * devices)
    assert [unit.stage for unit in engine.layers] == [i * devices // LAYERS for i in range(LAYERS)]
    others = {unit.path: unit.stage for unit in engine.meta_model.units.values() if unit.layer is None}
    assert others == {"model.embed_tokens": 0, "model.norm": devices - 1, "lm_head": devices - 1}


@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_a_pipeline_computes_what_one_device_computes(plan: Plan, keep: int) -> None:
    one, several = Engine(plan, keep=keep), Engine(plan, device=["cpu"] * 3, keep=keep)
    assert torch.equal(several.logits(TOKENS), one.logits(TOKENS))
    assert torch.equal(several.logits(TOKENS), one.logits(TOKENS))  # now with what stayed loaded
    here, there = collect(one, TOKENS, (3,), (6,)), collect(several, TOKENS, (3,), (6,))
    for where, block in here.blocks.items():
        for name, values in block.sums.items():
            assert np.array_equal(there.blocks[where].sums[name], values), name


def test_where_all_layers_are_held_batch_after_batch_goes_through(plan: Plan) -> None:
    engine = Engine(plan, device=TWO, keep=1 << 30)
    engine.run(TOKENS)  # loads
    order: list[tuple[int, int | None]] = []
    run_unit = engine.run_unit

    def seen(batch_pass: Any, hooks: Any) -> Any:
        order.append((batch_pass.number, batch_pass.unit.layer))
        return run_unit(batch_pass, hooks)

    engine.run_unit = seen  # type: ignore[method-assign]
    engine.run(TOKENS)
    layers = [(batch, layer) for batch, layer in order if layer is not None]
    assert layers == [(batch, layer) for batch in range(5) for layer in range(LAYERS)]


def test_arguments_of_all_layers_are_copied_once() -> None:
    """To the meta device, since there may be no other beside the processor."""
    meta, copies = torch.device("meta"), WeakTensorKeyDictionary()
    hidden, rotary = torch.zeros(2), (torch.zeros(3), torch.zeros(3))
    first, second = (moved({"rotary": rotary, "none": None}, meta, copies)["rotary"] for _ in range(2))
    assert all(part.device == meta for part in first)
    assert all(one is other for one, other in zip(first, second, strict=True))
    rotary[0].add_(1)
    assert moved(rotary, meta, copies)[0] is not first[0]  # of what was written to since, again
    given = [hidden]
    assert moved(given, meta, copies) is given
    assert given[0].device == meta
    assert moved(given, meta, copies)[0] is given[0]
    del hidden
    assert len(copies) == 2  # a copy lives no longer than what it is of


def test_jobs_keep_their_threads() -> None:
    def who(number: int) -> tuple[int, int]:
        return number, threading.get_ident()

    first, second = (side_by_side([partial(who, i) for i in range(3)]) for _ in range(2))
    assert first == second
    assert [number for number, _ in first] == [0, 1, 2]
    assert len({thread for _, thread in first}) == 3
    assert side_by_side([partial(who, 7)]) == [(7, threading.get_ident())]
    ended = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        side_by_side([fail, lambda: (time.sleep(0.05), ended.append(1))[1]])
    assert ended  # the others are waited for


def test_each_device_keeps_its_share(plan: Plan) -> None:
    layer = Engine(plan).layers[0].nbytes
    engine = Engine(plan, device=TWO, keep=2 * layer)
    engine.run(TOKENS)
    assert 0 < engine.weights.held(0) <= 2 * layer
    assert 0 < engine.weights.held(1) <= 2 * layer


@pytest.mark.parametrize("count", [2, 3])
def test_losses_of_shared_windows(plan: Plan, count: int) -> None:
    edited = apply(plan, "rescale", top_k=3)
    domains = [Domain("a", IDS[:7]), Domain("b", IDS[7:])]
    expected = compared([Engine(plan), Engine(edited)], domains)
    found = compared_over([[Engine(plan), Engine(edited)] for _ in range(count)], domains)
    for here, there in zip(expected, found, strict=True):
        for one, other in zip(here, there, strict=True):
            assert (other.domain, other.tokens) == (one.domain, one.tokens)
            assert other.nats == pytest.approx(one.nats, rel=1e-6)
            if one.divergence is not None:
                assert other.divergence == pytest.approx(one.divergence, rel=1e-4, abs=1e-8)


def test_leaving_out_with_shared_windows(plan: Plan) -> None:
    wanted = {b.where: [1, 4] for b in Engine(plan).routed}
    one = ablate(Engine(plan), TOKENS, wanted, ["mask", "zero"])
    both = ablate_over([Engine(plan), Engine(plan)], TOKENS, wanted, ["mask", "zero"], kept=[None, None])
    assert both.tokens == one.tokens
    assert both.base == pytest.approx(one.base, rel=1e-6)
    for mode in ("mask", "zero"):
        assert both.index[mode] == pytest.approx(one.index[mode], rel=1e-6)
        for where, losses in one.single[mode].items():
            assert both.single[mode][where] == pytest.approx(losses, rel=1e-6)
    assert takers([Engine(plan), Engine(plan)], TOKENS) == takers([Engine(plan)], TOKENS)


@pytest.mark.parametrize("kind", ["expert", "down"])
def test_repairs_over_devices(plan: Plan, kind: Any) -> None:
    edited = apply(plan, "drop-experts", experts=[1, 6])
    found: dict[int, list[FittedBlock]] = {1: [], 2: []}
    for count, fitted in found.items():
        engines = [Engine(each, device=["cpu"] * count) for each in (plan, edited)]
        fit_layers(*engines, TOKENS, RepairOptions(kind, minimum=0), fitted.append)  # type: ignore[misc]
    for one, other in zip(found[1], found[2], strict=True):
        assert (one.where, one.factors, one.error_after) == (other.where, other.factors, other.error_after)


def test_what_engines_there_are(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunSettings, "devices", ["cpu"] * 4)
    settings = RunSettings()
    room = 1 << 40
    monkeypatch.setattr(Engine, "fits", lambda engine, tokens: room > 0)
    assert [len(e.meta_model.devices) for e in settings.engines(plan, TOKENS)] == [1] * 4
    assert [len(e.meta_model.devices) for e in settings.pair(plan, plan, TOKENS)] == [1, 1]
    assert len(settings.engine(plan, TOKENS).meta_model.devices) == 1
    room = 0
    assert [len(e.meta_model.devices) for e in settings.engines(plan, TOKENS)] == [4]
    assert [len(e.meta_model.devices) for e in settings.pair(plan, plan, TOKENS)] == [2, 2]
    assert len(settings.engine(plan, TOKENS).meta_model.devices) == 4
    assert [[len(e.meta_model.devices) for e in group] for group in settings.groups([plan, plan], TOKENS)] == [[4, 4]]


def test_windows_are_shared_out_in_pairs() -> None:
    assert [len(part) for part in shared_out(TOKENS, 3)] == [2, 4, 4]
    assert [len(part) for part in shared_out(TOKENS.rows(0, 1), 4)] == [1]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no such device"):
        RunSettings(device="cuda:63").check()
