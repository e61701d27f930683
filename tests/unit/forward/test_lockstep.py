"""Several models in lockstep: what each computes alone, with the layers that they have in common run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.expr.elementwise import Scale
from moesurgery.forward import engine as engine_module
from moesurgery.forward.engine import Engine
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.forward.loss import Loss, compared, losses, losses_of_several
from moesurgery.forward.meta_model import MetaModel
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens
from moesurgery.forward.unit_runner import BatchPass, UnitRunner
from moesurgery.plan.plan import Plan
from tests.families import ROWS
from tests.unit.forward.test_engine import ENCODER_DECODERS

IDS = torch.randint(3, 33, (6, 24), generator=torch.Generator().manual_seed(5))
DOMAINS = [Domain("a", IDS[:4]), Domain("b", IDS[4:])]
TOKENS = Tokens(IDS)
# A GLM-4-MoE whose first two layers of four have no experts.
GLM = {"num_hidden_layers": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
NOISE = {t for t in ROWS if "diffusion" in t}  # what a model computes that starts from noise, it computes once


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", 48)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many models ran each unit, by its path."""
    counts: Counter[str] = Counter()
    run_unit = UnitRunner.run_unit

    def counting(self: UnitRunner, batch_pass: BatchPass, hooks: Any) -> Any:
        if batch_pass.number == 0 and batch_pass.unit is not None:
            counts[batch_pass.unit.path.removeprefix("model.")] += 1
        return run_unit(self, batch_pass, hooks)

    monkeypatch.setattr(UnitRunner, "run_unit", counting)
    return counts


@pytest.fixture
def glm(models: Any) -> Plan:
    return plan_of(open_checkpoint(models("glm4_moe", **GLM)))


def together(plans: Iterable[Plan], **options: Any) -> list[list[Loss]]:
    first, *others = plans
    engine = Engine(first, **options)
    return losses_of_several([[engine, *map(engine.sharing, others)]], DOMAINS)


def assert_as_alone(plans: Iterable[Plan], found: list[list[Loss]]) -> None:
    for plan, each in zip(plans, found, strict=True):
        for one, other in zip(each, losses(Engine(plan, keep=0), DOMAINS), strict=True):
            assert one == other
            assert one.by_token is not None
            assert other.by_token is not None
            assert np.array_equal(one.by_token.nats, other.by_token.nats)


def dropped(plan: Plan, *experts: list[int]) -> Plan:
    """Drop other experts in each layer that has some."""
    where = [block.layer_path for block in plan.anatomy.main_blocks]
    return apply(plan, "drop-experts", experts=dict(zip(where, experts, strict=True)))


def layers(counts: Counter[str]) -> list[int]:
    return [counts[f"layers.{i}"] for i in range(4)]


def test_layers_in_common_are_run_once(glm: Plan, ran: Counter[str]) -> None:
    plans = [glm, dropped(glm, [0], [1]), dropped(glm, [0], [2]), dropped(glm, [3], [1])]
    found = together(plans)
    assert layers(ran) == [1, 1, 3, 4]
    assert (ran["embed_tokens"], ran["norm"], ran["lm_head"]) == (1, 4, 4)
    assert len({each[0].nats for each in found}) == 4
    assert_as_alone(plans, found)


@pytest.mark.parametrize("keep", [0, 1 << 30, None])
def test_a_change_in_the_middle_parts_models_there_for_good(glm: Plan, ran: Counter[str], keep: int | None) -> None:
    def scaled(name: str) -> Plan:
        return replace(glm, tensors={**glm.tensors, name: Scale(glm.tensors[name], 0.5)})

    plans = [glm, scaled("model.layers.1.mlp.up_proj.weight"), scaled("model.layers.3.input_layernorm.weight")]
    found = together(plans, keep=keep)
    assert layers(ran) == [1, 2, 2, 3]
    assert_as_alone(plans, found)
    ran.clear()
    together([glm, scaled("model.embed_tokens.weight"), scaled("lm_head.weight")])
    assert (ran["embed_tokens"], layers(ran), ran["lm_head"]) == (2, [2, 2, 2, 2], 3)


def test_another_config_parts_models_at_the_first_layer_with_experts(glm: Plan, ran: Counter[str]) -> None:
    wider = replace(glm, config={**glm.config, "num_experts_per_tok": 3})
    louder = replace(glm, config={**glm.config, "routed_scaling_factor": 2.0})
    plans = [glm, wider, louder]
    found = together(plans)
    assert layers(ran) == [1, 1, 3, 3]
    assert len({each[0].nats for each in found}) == 3
    assert_as_alone(plans, found)


def test_another_rope_parts_models_at_the_first_layer(glm: Plan, ran: Counter[str]) -> None:
    """It is no part of a layer's module: it comes with what the layer is called with."""
    rope = {**glm.config["rope_parameters"], "rope_theta": 77.0}
    plans = [glm, replace(glm, config={**glm.config, "rope_parameters": rope})]
    found = together(plans)
    assert (ran["embed_tokens"], layers(ran)) == (1, [2, 2, 2, 2])
    assert found[0][0].nats != found[1][0].nats
    assert_as_alone(plans, found)


@pytest.mark.parametrize("what", ["buffer", "number", "class"])
def test_other_code_parts_models(glm: Plan, ran: Counter[str], what: str) -> None:
    """What a layer's module holds beside weights from the checkpoint is compared too."""
    first = Engine(glm)
    engines = [first, first.sharing(glm)]
    for i, engine in enumerate(engines):
        norm = engine.layers[1].module.input_layernorm
        if what == "buffer":
            norm.register_buffer("table", torch.tensor([1.0, i]), persistent=False)
        elif what == "number":
            norm.variance_epsilon = 0.1 * i
        elif i:
            norm.__class__ = type("Other", (type(norm),), {})
    losses_of_several([engines], DOMAINS)
    assert layers(ran) == [1, 2, 2, 2]


def test_fewer_layers_and_tied_ones(models: Any, ran: Counter[str]) -> None:
    plan = plan_of(open_checkpoint(models("mixtral", num_hidden_layers=4)))
    short = replace(
        plan,
        config={**plan.config, "num_hidden_layers": 3},
        tensors={n: e for n, e in plan.tensors.items() if "layers.3." not in n},
    )
    tied = apply(plan, "tie-blocks", blocks=[0, 1, 0, 1], norms="shared", distances="none")
    plans = [plan, short, tied]
    found = together(plans)
    assert layers(ran) == [1, 1, 2, 2]
    assert len({each[0].nats for each in found}) == 3
    assert_as_alone(plans, found)


@pytest.mark.parametrize("model_type", [t for t in ROWS if t not in ENCODER_DECODERS | NOISE])
def test_every_family(models: Any, model_type: str, ran: Counter[str]) -> None:
    """With the experts of the last block halved: layers that write into what they are given would show."""
    plan = plan_of(open_checkpoint(models(model_type)))
    engine = Engine(plan)
    last = next(b for b in reversed(plan.anatomy.main_blocks) if b.where == engine.blocks[-1].where)
    halved = {m.name: Scale(plan.tensors[m.name], 0.5) for m in last.named("down") or last.members[-1:]}
    plans = [plan, replace(plan, tensors={**plan.tensors, **halved})]
    ran.clear()
    found = together(plans)
    assert_as_alone(plans, found)
    assert found[0] != found[1]


def test_a_layer_is_read_by_all_before_the_next(glm: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = MetaModel.load

    def loading(self: MetaModel, unit: LayerUnit) -> None:
        loaded.append(unit.path)
        load(self, unit)

    plans = [glm, dropped(glm, [0], [1]), dropped(glm, [2], [1])]
    first = Engine(glm, keep=0)
    engines = [first, *map(first.sharing, plans[1:])]
    monkeypatch.setattr(MetaModel, "load", loading)
    losses_of_several([engines], DOMAINS)
    expected = ["embed_tokens", "layers.0", "layers.1", *["layers.2"] * 3, *["layers.3"] * 3]
    assert loaded == [*(f"model.{path}" for path in expected), *["model.norm", "lm_head"] * 3]


def test_weights_that_the_first_model_keeps_are_not_read_again(glm: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    fill = FileReader.fill

    def filling(self: FileReader, view: memoryview, *where: Any) -> None:
        read.append(len(view))
        fill(self, view, *where)

    monkeypatch.setattr(FileReader, "fill", filling)
    louder = replace(glm, config={**glm.config, "routed_scaling_factor": 2.0})

    def bytes_of(*plans: Plan, **options: Any) -> int:
        read.clear()
        together(plans, **options)
        return sum(read)

    biases = 2 * 8 * 4  # of the selection of experts: buffers are not shared
    assert bytes_of(glm, louder) == bytes_of(glm) + biases < bytes_of(glm, louder, keep=0)


def test_no_more_models_at_once_than_memory_has_room_for(glm: Plan, ran: Counter[str]) -> None:
    first = Engine(glm)
    hidden, largest = first.hidden_bytes(TOKENS), max(unit.nbytes for unit in first.meta_model.units.values())
    for models in (1, 2, 5):
        assert Engine(glm, memory=largest + models * hidden + 7).models_at_once(TOKENS) == models
    assert Engine(glm, memory=1).models_at_once(TOKENS) == 1
    plans = [glm, dropped(glm, [0], [1]), dropped(glm, [2], [1]), dropped(glm, [2], [0]), dropped(glm, [4], [0])]
    found = together(plans, memory=largest + 2 * hidden + 7)
    assert layers(ran) == [3, 3, 4, 5]  # two, two and one; the second pair drops the same experts of layer 2
    assert_as_alone(plans, found)


def test_progress_reaches_the_work_of_all_models(glm: Plan) -> None:
    plans = [glm, dropped(glm, [0], [1])]
    first = Engine(glm)
    engines = [first, first.sharing(plans[1])]
    steps: list[int] = []
    losses_of_several([engines], DOMAINS, steps.append)
    assert sum(steps) == sum(engine.work(TOKENS) for engine in engines)


def test_several_devices(glm: Plan, ran: Counter[str]) -> None:
    """Windows shared among devices, which are whole batches each here, and layers spread over them."""
    plans = [glm, dropped(glm, [0], [1]), dropped(glm, [0], [2])]
    groups = [[first, *map(first.sharing, plans[1:])] for first in (Engine(glm), Engine(glm))]
    found = losses_of_several(groups, DOMAINS)
    assert layers(ran) == [2, 2, 4, 6]
    assert_as_alone(plans, found)
    ran.clear()
    found = together(plans, device=["cpu", "cpu"])
    assert layers(ran) == [1, 1, 2, 3]
    assert_as_alone(plans, found)


def test_compared_models_share_layers_too(glm: Plan, ran: Counter[str]) -> None:
    plans = [glm, dropped(glm, [0], [1]), dropped(glm, [0], [2])]
    found = compared([Engine(plan) for plan in plans], DOMAINS)
    assert layers(ran) == [1, 1, 2, 3]
    for plan, each in zip(plans[1:], found[1:], strict=True):
        assert each == compared([Engine(glm), Engine(plan)], DOMAINS)[1]
