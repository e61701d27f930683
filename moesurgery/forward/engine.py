"""The forward pass of a model that does not fit in memory: all windows go through one layer, then the next.

The model's own code runs, unchanged, once per batch of windows. Each of these forward passes is a coroutine
that stops at the door of every unit (`skeleton.Unit`) until all have come there; then the unit's weights are
read from the plan, all batches go through, and the weights are given free. So what a layer is called with
(positions, masks, sliding windows, what earlier layers left for later ones) is what the model's code says.

    engine = Engine(plan)
    engine.run(tokens, experts=watch_experts, logits=take_logits)

Memory: one unit's weights, the hidden states of all windows twice (a model keeps its embeddings), one batch's
activations. Units stay loaded while all that are take less than `keep` bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.forward.coroutine import Coroutine, current
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import NO_HOOKS, BlockCall, ExpertsCall, Hooks
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.forward.meta_model import MetaModel
from moesurgery.forward.router_logits import RouterTap
from moesurgery.forward.routing_adapters import adapter_of, routed
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

KEEP_BYTES = 256 << 20
BATCH_TOKENS = 4096
LOGITS_BYTES = 512 << 20

Progress = Callable[[int], None]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]

_here = threading.local()  # the stream that a thread runs


@dataclass
class Resume:
    """Begin at decoder layer `layer`: `outputs[i]` is what the layer before it returned for batch i."""

    layer: int
    outputs: list[Any]


@dataclass
class _PauseAt:
    """What a stream asks for: to go through a unit."""

    unit: LayerUnit
    call: Callable[[], Any]


@dataclass
class Stream:
    """The forward pass of one batch."""

    number: int
    first: int
    tokens: Tokens
    coroutine: Coroutine = field(init=False)
    last: Any = None  # what the last unit returned


class Streams:
    """The forward passes of all batches, side by side. Close when done."""

    def __init__(self, engine: Engine, tokens: Tokens, windows: int, watch: Hooks, resume: Resume | None) -> None:
        self.engine = engine
        self.watch = watch
        self.resume = resume
        self.passed = resume.layer if resume else 0  # decoder layers behind all streams
        self.streams = [Stream(i, first, part) for i, (first, part) in enumerate(tokens.batches(windows))]
        for stream in self.streams:
            stream.coroutine = Coroutine(partial(engine._forward, stream, self))
        try:
            for stream in self.streams:
                stream.coroutine.advance()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.streams)

    @property
    def unit(self) -> LayerUnit | None:
        """The unit at whose door all streams wait; None when all have ended."""
        waiting = {s.coroutine.request.unit.path: s.coroutine.request.unit for s in self.streams if s.coroutine.request}
        if len(waiting) > 1:
            raise RefusedError(f"batches take different ways through the model: {', '.join(waiting)}")
        return next(iter(waiting.values()), None)

    def rehearse(self, watch: Hooks, count: int | None = None) -> list[Any]:
        """Send all streams, or the first `count`, through the unit they wait at under another watch, leave them at its
        door, and return what the unit returns for each."""
        unit = self.unit
        assert unit is not None
        with self.engine.loaded(unit):
            return [self.engine._go(stream, watch) for stream in self.streams[:count]]

    def step(self, progress: Progress = lambda count: None) -> None:
        """Take all streams through the unit they wait at, to the next door."""
        unit = self.unit
        assert unit is not None
        with self.engine.loaded(unit):
            for stream in self.streams:
                stream.last = self.engine._go(stream, self.watch)
                stream.coroutine.advance(stream.last)
                if unit.layer is not None:
                    progress(stream.tokens.count)
        if unit.layer is not None:
            self.passed = unit.layer + 1

    def to_layer(self, layer: int, progress: Progress = lambda count: None) -> None:
        """Go on until decoder layer `layer` is next; past the last one where there are no more."""
        while (unit := self.unit) is not None:
            if unit.layer == layer or self.passed >= len(self.engine.layers):
                return
            self.step(progress)

    def finish(self, number: int) -> Any:
        """Take one stream to the end and return the model's logits [b, S, V]. Call for each in turn."""
        stream = self.streams[number]
        while not stream.coroutine.done:
            unit = stream.coroutine.request.unit
            with self.engine.loaded(unit, pin=True):
                stream.last = self.engine._go(stream, self.watch)
                stream.coroutine.advance(stream.last)
        stream.last = None
        result, stream.coroutine.result = stream.coroutine.result, None
        return result

    def close(self) -> None:
        for stream in self.streams:
            stream.coroutine.close()
        self.engine.unpin()


class Engine:
    """Runs a plan's model, written or not, in little memory. `dtype` is that of weights and activations.

    Raises RefusedError where transformers has no code for the model, CheckpointError where tensors are missing.
    """

    def __init__(self, plan: Plan, *, device: str = "cpu", dtype: str = "float32", keep: int = KEEP_BYTES) -> None:
        self.plan = plan
        self.skeleton = MetaModel(plan, device, dtype)
        self.layers = self.skeleton.layers
        self.blocks = self.skeleton.blocks()
        self.keep = keep
        self._resident: dict[str, LayerUnit] = {}  # least recently used first
        self._pinned: set[str] = set()
        self.freed: list[Callable[[LayerUnit], None]] = []  # called when a unit's weights go
        self._active: _Active | None = None
        self._tap: RouterTap | None = None
        for block in self.blocks:
            if block.experts is not None:
                self._wrap(self.skeleton.model.get_submodule(block.experts), partial(self._at_experts, block))
            self._wrap(self.skeleton.model.get_submodule(block.path), partial(self._at_block, block))
        for unit in self.skeleton.units.values():
            self._wrap(unit.module, partial(self._at_door, unit))

    @property
    def device(self) -> torch.device:
        return self.skeleton.device

    @property
    def routed(self) -> list[ExpertsModule]:
        """The MoE blocks whose routing can be seen."""
        return [block for block in self.blocks if block.experts is not None]

    @property
    def vocabulary(self) -> int:
        return int(self.skeleton.model.config.get_text_config().vocab_size)

    def start(
        self,
        tokens: Tokens,
        watch: Hooks = NO_HOOKS,
        *,
        resume: Resume | None = None,
        batch: int | None = None,
    ) -> Streams:
        """Begin the forward pass of all windows, `batch` at a time (small enough for logits by default)."""
        return Streams(self, tokens, batch or self.windows_per_batch(tokens, True), watch, resume)

    def windows_per_batch(self, tokens: Tokens, logits: bool) -> int:
        """Return how many windows go through a layer together, with room for their logits if asked for."""
        limit = BATCH_TOKENS
        if logits:
            limit = min(limit, LOGITS_BYTES // (4 * self.vocabulary))
        return max(1, limit // tokens.length)

    def run(
        self,
        tokens: Tokens,
        watch: Hooks = NO_HOOKS,
        *,
        logits: Callable[[int, Tokens, torch.Tensor], None] | None = None,
        progress: Progress = lambda count: None,
    ) -> None:
        """Send all windows through the model.

        `logits` is called with (first window, windows, logits [b, S, V]) batch by batch; without it the head is
        never run. `progress` counts tokens times layers.
        """
        streams = self.start(tokens, watch, batch=self.windows_per_batch(tokens, logits is not None))
        try:
            streams.to_layer(len(self.layers), progress)
            if logits is not None:
                for i, stream in enumerate(streams.streams):
                    logits(stream.first, stream.tokens, streams.finish(i))
        finally:
            streams.close()

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """Return the logits [N, S, V] in float32: for few windows."""
        import torch

        found: list[torch.Tensor] = []
        self.run(tokens, logits=lambda first, part, values: found.append(values.float().cpu()))
        return torch.cat(found)

    def work(self, tokens: Tokens) -> int:
        """What `progress` counts up to in one run."""
        return tokens.count * len(self.layers)

    @contextmanager
    def loaded(self, unit: LayerUnit, *, pin: bool = False) -> Iterator[None]:
        """Have a unit's weights in memory. Those over the budget are given free afterwards, pinned ones later."""
        if unit.path not in self._resident:
            self._evict(self.keep - unit.nbytes)
            self.skeleton.load(unit)
        self._resident[unit.path] = self._resident.pop(unit.path, unit)
        if pin:
            self._pinned.add(unit.path)
        yield
        self._evict(self.keep)

    def forget(self, unit: LayerUnit) -> None:
        """Give a unit's weights free at once: what was changed in them goes."""
        self._pinned.discard(unit.path)
        if self._resident.pop(unit.path, None) is not None:
            self._free(unit)

    def unpin(self) -> None:
        self._pinned.clear()
        self._evict(self.keep)

    def _evict(self, budget: int) -> None:
        """Give units free, least recently used first, until those that may go take no more than `budget`."""
        free = [path for path in self._resident if path not in self._pinned]
        held = sum(self._resident[path].nbytes for path in free)
        for path in free:
            if held <= budget:
                return
            unit = self._resident.pop(path)
            held -= unit.nbytes
            self._free(unit)

    def _free(self, unit: LayerUnit) -> None:
        self.skeleton.free(unit)
        for told in self.freed:
            told(unit)

    @contextmanager
    def watching(self, watch: Hooks, tokens: Tokens, first: int, unit: LayerUnit) -> Iterator[None]:
        """Have a watch see what a unit does, for a batch of windows that begins at window `first`."""
        before = self._active, self._tap
        blocks = [b for b in self.blocks if b.unit == unit.path]
        banned = {b.where: list(watch.ban(b)) for b in blocks} if watch.ban else {}
        self._active = _Active(watch, tokens, first, banned)
        self._tap = None
        with ExitStack() as stack:
            if blocks and (watch.router_logits or any(banned.values())):
                routers = {b.where: self.skeleton.tensor(b.router) for b in blocks if b.router is not None}
                self._tap = stack.enter_context(RouterTap(routers, banned))
            for block in blocks:
                if banned.get(block.where) and block.correction is not None:
                    stack.enter_context(_lowered(self.skeleton.tensor(block.correction), banned[block.where]))
            try:
                yield
            finally:
                self._active, self._tap = before

    def _forward(self, stream: Stream, streams: Streams) -> Any:
        """The body of a stream: the model's own forward pass."""
        import torch

        _here.stream, _here.resume = stream, streams.resume
        tokens = stream.tokens
        with torch.no_grad():
            mask = None if tokens.mask is None else tokens.mask.to(self.device, torch.long)
            output = self.skeleton.text_model(tokens.ids.to(self.device), attention_mask=mask, use_cache=False)
        return output.logits

    def _go(self, stream: Stream, watch: Hooks) -> Any:
        """Send one stream through the unit at whose door it waits, and return what the unit returns."""
        import torch

        door: _PauseAt = stream.coroutine.request
        with torch.no_grad(), self.watching(watch, stream.tokens, stream.first, door.unit):
            return door.call()

    def _wrap(self, module: Any, around: Callable[..., Any]) -> None:
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(module, forward, args, kwargs)

        module.forward = wrapped

    def _at_door(self, unit: LayerUnit, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
        coroutine = current()
        if coroutine is None:
            return forward(*args, **kwargs)
        resume: Resume | None = _here.resume
        if resume is not None and unit.layer is not None and unit.layer < resume.layer:
            return resume.outputs[_here.stream.number]
        return coroutine.ask(_PauseAt(unit, partial(forward, *args, **kwargs)))

    def _at_block(
        self, block: ExpertsModule, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs
    ) -> Any:
        active = self._active
        if active is None or active.watch.block is None:
            return forward(*args, **kwargs)
        run = partial(forward, *args, **kwargs)
        return active.watch.block(BlockCall(block, active.tokens, active.first, args, kwargs, run))

    def _at_experts(
        self, block: ExpertsModule, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs
    ) -> Any:
        active = self._active
        if active is None or (active.watch.experts is None and not active.banned.get(block.where)):
            return forward(*args, **kwargs)
        adapter = adapter_of(module)
        given = [*args, *kwargs.values()]
        if adapter is None:
            hidden, index, weights = given
        else:
            hidden = given[0].reshape(-1, given[0].shape[-1])
            index, weights = adapter.routing(module, hidden)
        if any(bool((index == e).any()) for e in active.banned.get(block.where, ())):
            raise RefusedError(f"{block.where}: its router does not choose by logits, so an expert cannot be masked")
        if active.watch.experts is None:
            return forward(*args, **kwargs)

        def run(*changed: Any) -> Any:
            chosen = changed or (hidden, index, weights)
            return forward(*chosen) if adapter is None else routed(module, *chosen)

        logits = self._tap.logits.get(block.where) if self._tap else None
        call = ExpertsCall(block, module, active.tokens, active.first, hidden, index, weights, logits, run)
        result = active.watch.experts(call)
        if result is None:
            return forward(*args, **kwargs)
        return result if adapter is None else adapter.returned(module, given[0], result)


@dataclass(frozen=True)
class _Active:
    watch: Hooks
    tokens: Tokens
    first: int
    banned: dict[str, list[int]]


@contextmanager
def _lowered(bias: torch.Tensor, entries: list[int]) -> Iterator[None]:
    """Lower some entries of a selection bias so far that they are never chosen."""
    before = bias.data.clone()
    bias.data.view(-1)[entries] = -1e30
    try:
        yield
    finally:
        bias.data.copy_(before)
