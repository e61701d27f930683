"""Estimate the cost of a calibration from one batch in the first layers: time, memory, disk space, bytes read."""

from __future__ import annotations

import time
from dataclasses import dataclass

from moesurgery.fitting.collector import add, check_routing
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.scratch import scratch_bytes
from moesurgery.forward.tokens import Tokens


@dataclass(frozen=True)
class Forecast:
    """Seconds of all and of one layer (computing all tokens, and being read); bytes read and held; `layers` in all.

    `seconds` are with what the first use of each device takes (kernels, libraries), one device after the other.
    """

    seconds: float
    layer_seconds: float
    load_seconds: float
    read_bytes: int
    memory_bytes: int
    scratch_bytes: int
    layers: int


def forecast(engine: Engine, tokens: Tokens, devices: int = 1) -> Forecast:
    """Time one batch in the first MoE layer and the loading of its weights, and extrapolate to all layers.

    Raises RefusedError for a family whose routing cannot be read.
    """
    from moesurgery.stats.statistics_file import empty_sums

    blocks = check_routing(engine, "collect")
    first = next(unit for unit in engine.layers if unit.path == blocks[0].unit)
    assert first.layer is not None
    size = engine.windows_per_batch(tokens, False)
    batch = tokens.rows(0, size)
    settings = engine.plan.anatomy.settings

    def experts(call: ExpertsCall) -> object:
        sums = empty_sums(call.block.block.experts, call.hidden.shape[-1], [], call.hidden.device)
        return add(sums, call, {"": (call.index, call.weights)}, settings)

    begun = time.perf_counter()
    passes = engine.start(batch, Hooks(experts=experts, router_logits=True), batch=size)
    try:
        passes.to_layer(first.layer)
        if engine.on_gpu:  # pinned memory, streams and threads, which are made once
            engine.meta_model.read(engine.layers[(first.layer + 1) % len(engine.layers)])
        began = time.perf_counter()
        engine.meta_model.read(first)
        load = time.perf_counter() - began
        with engine.weights.loaded(first, pin=True):
            passes.peek(passes.hooks)  # warm-up: kernels, caches
            _wait(engine)
            began = time.perf_counter()
            start = began - begun - (3 if engine.on_gpu else 2) * load  # all before this, but what was read
            passes.step()
            _wait(engine)
            step = time.perf_counter() - began
    finally:
        passes.close()
    each = step * tokens.count / max(1, batch.count) / devices
    together = max(load, each) if engine.on_gpu else load + each
    sizes = [unit.nbytes for unit in engine.meta_model.units.values()]
    hidden = engine.hidden_bytes(tokens) // devices
    work = engine.batch_bytes(batch)
    held = min(sum(sizes), sum(engine.weights.keep) + (2 if engine.on_gpu else 1) * max(sizes))
    stored = {
        part.info: part
        for unit in engine.layers
        for g in unit.groups
        for _, n in g.names
        for part in engine.meta_model.tensors[n].stored()
    }
    count = len(engine.layers)
    return Forecast(
        seconds=devices * max(0.0, start - step) + count * together + load,
        layer_seconds=each,
        load_seconds=load,
        read_bytes=sum(part.nbytes for part in stored.values()),
        memory_bytes=held + hidden + work,
        scratch_bytes=scratch_bytes(tokens.ids.numel(), engine.width, engine.meta_model.dtype.itemsize),
        layers=count,
    )


def _wait(engine: Engine) -> None:
    if engine.on_gpu:
        import torch

        torch.cuda.synchronize(engine.device)
