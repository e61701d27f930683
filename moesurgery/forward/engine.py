"""The forward pass of a model that does not fit in memory: all windows go through one layer, then the next.

The model's own code runs, unchanged, once per batch of windows. Each of these forward passes is a coroutine that is
suspended before every unit (`layer_units.LayerUnit`) until all batches have reached it; then the unit's weights are
loaded from the plan, all batches are computed, and the weights are freed. So each layer gets the arguments (positions,
masks, sliding windows, values kept by earlier layers) that the model's own code passes to it.

    engine = Engine(plan)
    engine.run(tokens, Hooks(experts=see_experts), logits=take_logits)

Memory: one unit's weights, the hidden states of all windows twice (a model keeps its embeddings), one batch's
activations. Units stay loaded as far as `keep` bytes go. On a GPU that is what its memory leaves, and the next unit is
prefetched while one computes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.forward import memory_budget
from moesurgery.forward.coroutine import Coroutine, Errand, current
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import NO_HOOKS, BlockCall, ExpertsCall, Hooks
from moesurgery.forward.layer_units import LayerUnit, modules_without_weights
from moesurgery.forward.meta_model import MetaModel
from moesurgery.forward.router_logits import RouterTap, torch_functions_unseen
from moesurgery.forward.routing_adapters import adapter_of, routed
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

# On the processor; on a GPU its memory decides (`memory_budget`).
KEEP_BYTES = 256 << 20
BATCH_TOKENS = 1024  # more leave the caches: on two cores batches of 4,096 take a quarter longer
LOGITS_BYTES = 512 << 20

_on_gpus: weakref.WeakSet[Any] = weakref.WeakSet()  # engines that share the memory of their device

Progress = Callable[[int], None]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]

_here = threading.local()  # the forward pass (`Stream`) that this thread runs


@dataclass
class Resume:
    """Begin at decoder layer `layer`: `outputs[i]` is what the layer before it returned for batch i."""

    layer: int
    outputs: list[Any]


@dataclass
class _PauseAt:
    """The request of a forward pass that has reached a unit and is suspended there."""

    unit: LayerUnit
    call: partial[Any]


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
        self.passed = resume.layer if resume else 0  # decoder layers that all batches have completed
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
        """The unit that all batches are to run next; None when all have finished."""
        waiting = {s.coroutine.request.unit.path: s.coroutine.request.unit for s in self.streams if s.coroutine.request}
        if len(waiting) > 1:
            raise RefusedError(f"batches take different ways through the model: {', '.join(waiting)}")
        return next(iter(waiting.values()), None)

    @property
    def resumable(self) -> bool:
        """Whether layers get no argument that earlier layers may have written to."""
        requests = [stream.coroutine.request for stream in self.streams]
        given = [value for r in requests if r is not None for value in (*r.call.args, *r.call.keywords.values())]
        return all(value is None or not isinstance(value, (dict, list, set)) or not value for value in given)

    def rehearse(self, watch: Hooks, count: int | None = None) -> list[Any]:
        """Run the next unit on all batches, or the first `count`, with other hooks, without advancing them, and return
        the unit's output for each."""
        unit = self.unit
        assert unit is not None
        with self.engine.loaded(unit):
            return [self.engine._go(stream, watch) for stream in self.streams[:count]]

    def step(self, progress: Progress = lambda count: None) -> None:
        """Run the next unit on all batches, and advance them to the unit after it."""
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
        """Run units until decoder layer `layer` is next, or until all layers are done."""
        while (unit := self.unit) is not None:
            if unit.layer == layer or self.passed >= len(self.engine.layers):
                return
            self.step(progress)

    def finish(self, number: int) -> Any:
        """Run one batch to the end and return the model's logits [b, S, V]. Call for each in turn."""
        stream = self.streams[number]
        while not stream.coroutine.done:
            unit = stream.coroutine.request.unit
            with self.engine.loaded(unit, pin=True):
                stream.last = self.engine._go(stream, self.watch)
                stream.coroutine.advance(stream.last)
        stream.last = None
        result, stream.coroutine.result = stream.coroutine.result, None
        return result

    def ends(self, number: int, windows: int | None = None) -> Iterator[tuple[int, Tokens, Any]]:
        """Run one batch, whose layers are done, to the end; yield (first window, windows, logits [b, S, V]).

        As many `windows` at a time as memory has room for their logits, where batches are larger.
        """
        stream = self.streams[number]
        size, layers = windows or self.engine.windows_per_head(stream.tokens), len(self.engine.layers)
        if size >= len(stream.tokens) or not _is_cut_by_windows(stream.last, stream.tokens):
            yield stream.first, stream.tokens, self.finish(number)
            return
        last, stream.last = stream.last, None
        stream.coroutine.close()
        for start in range(0, len(stream.tokens), size):
            part = stream.tokens.rows(start, start + size)
            rest = Streams(self.engine, part, size, NO_HOOKS, Resume(layers, [_windows(last, start, start + size)]))
            try:
                yield stream.first + start, part, rest.finish(0)
            finally:
                rest.streams[0].coroutine.close()

    def close(self) -> None:
        for stream in self.streams:
            stream.coroutine.close()
        self.engine.unpin()


def _is_cut_by_windows(output: Any, tokens: Tokens) -> bool:
    """Whether the first axes of all that a layer returned are windows and positions."""
    parts = output if isinstance(output, tuple) else (output,)
    return all(part is None or tuple(part.shape[:2]) == tuple(tokens.ids.shape) for part in parts)


def _windows(output: Any, start: int, stop: int) -> Any:
    if isinstance(output, tuple):
        return tuple(_windows(part, start, stop) for part in output)
    return None if output is None else output[start:stop]


class Engine:
    """Runs a plan's model, written or not. `dtype` is that of weights and activations.

    `keep` bytes of weights stay loaded. Without it, `memory` bounds all that a run takes on its device; by default that
    is what is free on a GPU, and little on the processor. Raises RefusedError where transformers has no code for the
    model, CheckpointError where tensors are missing.
    """

    def __init__(
        self, plan: Plan, *, device: str = "cpu", dtype: str = "float32", keep: int | None = None, memory: int = 0
    ) -> None:
        self.plan = plan
        self.skeleton = MetaModel(plan, device, dtype)
        self.layers = self.skeleton.layers
        self.blocks = self.skeleton.blocks()
        self.on_gpu = self.device.type == "cuda"
        self.memory = memory
        self.keep = keep if keep is not None else KEEP_BYTES
        self._keeps_what_fits = keep is None
        self._resident: dict[str, LayerUnit] = {}  # least recently used first
        self._pinned: set[str] = set()
        self._ahead: dict[str, Future[dict[str, torch.Tensor]]] = {}  # weights that are being prefetched
        self._reading: ThreadPoolExecutor | None = None
        self.freed: list[Callable[[LayerUnit], None]] = []  # called when a unit's weights are freed
        self._active: _Active | None = None
        self._tap: RouterTap | None = None
        for block in self.blocks:
            if block.experts is not None:
                self._wrap(self.skeleton.model.get_submodule(block.experts), partial(self._at_experts, block))
            self._wrap(self.skeleton.model.get_submodule(block.path), partial(self._at_block, block))
        for unit in self.skeleton.units.values():
            self._wrap(unit.module, partial(self._at_door, unit))
        for module in modules_without_weights(self.skeleton.model):
            self._wrap(module, self._at_once)
        text = self.skeleton.model.config.get_text_config()
        self._shape = memory_budget.shape_of(text, plan.anatomy.settings.top_k or 1, self.skeleton.dtype.itemsize)
        if self.on_gpu and self._keeps_what_fits:
            _on_gpus.add(self)

    @property
    def device(self) -> torch.device:
        return self.skeleton.device

    @property
    def routed(self) -> list[ExpertsModule]:
        """The MoE blocks whose routing can be read."""
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
        """Begin the forward pass of all windows, `batch` at a time (by default as many as memory has room for)."""
        self._share_memory(tokens)
        return Streams(self, tokens, batch or self.windows_per_batch(tokens, True), watch, resume)

    def windows_per_batch(self, tokens: Tokens, logits: bool) -> int:
        """Return how many windows go through a layer together. On the processor their logits must have room too."""
        limit = BATCH_TOKENS
        if self.on_gpu:
            room = memory_budget.ACTIVATIONS * self._budget()
            limit = min(memory_budget.GPU_BATCH_TOKENS, int(room / self._shape.per_token(tokens.length)))
        elif logits:
            limit = min(limit, LOGITS_BYTES // (4 * self.vocabulary))
        return max(1, limit // tokens.length)

    def windows_per_head(self, tokens: Tokens) -> int:
        """Return how many windows have room for their logits, in float32 and once more."""
        if not self.on_gpu:
            return len(tokens)
        return max(1, int(memory_budget.LOGITS * self._budget()) // (8 * self.vocabulary * tokens.length))

    def _budget(self) -> int:
        """Return the bytes of device memory this engine may use, including weights that are already loaded."""
        held = sum(unit.nbytes for unit in self._resident.values())
        others = sum(1 for other in _on_gpus if other.device == self.device)
        free = (memory_budget.free_bytes(self.device) + held) // max(1, others)
        return min(free, self.memory) if self.memory else free

    @property
    def width(self) -> int:
        """The hidden size."""
        return self._shape.hidden

    def hidden_bytes(self, tokens: Tokens) -> int:
        """Return the bytes of the hidden states of all windows: embeddings are kept too, one batch is held twice."""
        return 3 * tokens.ids.numel() * self._shape.hidden * self._shape.itemsize

    def batch_bytes(self, tokens: Tokens) -> int:
        """Return about how many bytes a batch needs in a layer."""
        return tokens.ids.numel() * self._shape.per_token(tokens.length)

    def _share_memory(self, tokens: Tokens) -> None:
        """Set how many bytes of weights may stay loaded, next to hidden states, activations and the prefetched unit."""
        if not self._keeps_what_fits:
            return
        largest = max(unit.nbytes for unit in self.skeleton.units.values())
        hidden = self.hidden_bytes(tokens)
        if self.on_gpu:
            left = int((1 - memory_budget.ACTIVATIONS - 2 * memory_budget.LOGITS) * self._budget()) - hidden
            everything = sum(unit.nbytes for unit in self.skeleton.units.values())
            self.keep = left if everything <= left else max(0, left - 2 * largest)
        elif self.memory:
            self.keep = max(0, self.memory - hidden - largest)

    def run(
        self,
        tokens: Tokens,
        watch: Hooks = NO_HOOKS,
        *,
        logits: Callable[[int, Tokens, torch.Tensor], None] | None = None,
        progress: Progress = lambda count: None,
    ) -> None:
        """Run the model on all windows.

        `logits` is called with (first window, windows, logits [b, S, V]) batch by batch; without it the head is
        never run. `progress` counts tokens times layers.
        """
        streams = self.start(tokens, watch, batch=self.windows_per_batch(tokens, logits is not None))
        try:
            streams.to_layer(len(self.layers), progress)
            if logits is not None:
                for i in range(len(streams)):
                    for first, windows, values in streams.ends(i):
                        logits(first, windows, values)
        finally:
            streams.close()

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """Return the logits [N, S, V] in float32: for few windows."""
        import torch

        gathered = torch.zeros(*tokens.ids.shape, self.vocabulary)

        def take(first: int, part: Tokens, values: torch.Tensor) -> None:
            gathered[first : first + len(part), : part.length, : values.shape[-1]] = values.float().cpu()

        self.run(tokens, logits=take)
        return gathered

    def work(self, tokens: Tokens) -> int:
        """The total that `progress` reaches in one run."""
        return tokens.count * len(self.layers)

    @contextmanager
    def loaded(self, unit: LayerUnit, *, pin: bool = False) -> Iterator[None]:
        """Keep a unit's weights loaded within the context. Weights over the budget are freed afterwards."""
        if unit.path not in self._resident:
            self._evict(self.keep - unit.nbytes)
            ahead = self._ahead.pop(unit.path, None)
            if ahead is None:
                self.skeleton.load(unit)
            else:
                self.skeleton.put(unit, ahead.result())
        self._resident[unit.path] = self._resident.pop(unit.path, unit)
        if pin:
            self._pinned.add(unit.path)
        self._read_ahead(unit)
        yield
        self._evict(self.keep)

    def _read_ahead(self, unit: LayerUnit) -> None:
        """Prefetch the layer after `unit`; only on a GPU, where host memory is not the bottleneck."""
        if not self.on_gpu or self.skeleton.donor is not None or unit.layer is None:
            return
        following = self.layers[(unit.layer + 1) % len(self.layers)]
        if following.path in self._resident or following.path in self._ahead or following is unit:
            return
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "ahead")
        self._ahead[following.path] = self._reading.submit(self.skeleton.read, following)

    def forget(self, unit: LayerUnit) -> None:
        """Free a unit's weights at once, discarding any change made to them."""
        self._pinned.discard(unit.path)
        if self._resident.pop(unit.path, None) is not None:
            self._free(unit)

    def unpin(self) -> None:
        self._pinned.clear()
        self._evict(self.keep)

    def _evict(self, keep: int) -> None:
        """Free units until those that are not pinned take no more than `keep`.

        On a GPU the most recently used first: each pass begins again at the first layer, so that is needed soonest.
        """
        free = [path for path in self._resident if path not in self._pinned]
        held = sum(self._resident[path].nbytes for path in free)
        for path in reversed(free) if self.on_gpu else free:
            if held <= keep:
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
        """Attach hooks to a unit, for a batch of windows that begins at window `first`."""
        before = self._active
        blocks = [b for b in self.blocks if b.unit == unit.path]
        banned = {b.where: list(watch.ban(b)) for b in blocks} if watch.ban else {}
        self._active = _Active(watch, tokens, first, banned)
        with ExitStack() as stack:
            for block in blocks:
                if banned.get(block.where) and block.correction is not None:
                    stack.enter_context(_lowered(self.skeleton.tensor(block.correction), banned[block.where]))
            try:
                yield
            finally:
                self._active = before

    def _forward(self, stream: Stream, streams: Streams) -> Any:
        """The body of a batch's coroutine: the model's own forward pass."""
        import torch

        _here.stream, _here.resume = stream, streams.resume
        tokens = stream.tokens
        with torch.no_grad():
            mask = None if tokens.mask is None else tokens.mask.to(self.device, torch.long)
            output = self.skeleton.text_model(tokens.ids.to(self.device), attention_mask=mask, use_cache=False)
        return output.logits

    def _go(self, stream: Stream, watch: Hooks) -> Any:
        """Run the next unit on one batch, and return the unit's output."""
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

    def _at_once(self, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
        """Run modules between units, such as rotary embeddings, in the engine's thread."""
        import torch

        coroutine = current()
        if coroutine is None:
            return forward(*args, **kwargs)

        def call() -> Any:
            with torch.no_grad():
                return forward(*args, **kwargs)

        return coroutine.ask(Errand(call))

    def _at_block(
        self, block: ExpertsModule, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs
    ) -> Any:
        active = self._active
        if active is None:
            return forward(*args, **kwargs)

        def run() -> Any:
            banned = active.banned.get(block.where, [])
            if block.router is None or not (active.watch.router_logits or banned):
                return forward(*args, **kwargs)
            before, self._tap = self._tap, RouterTap(self.skeleton.tensor(block.router), banned)
            try:
                with self._tap:
                    return forward(*args, **kwargs)
            finally:
                self._tap = before

        if active.watch.block is None:
            return run()
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

        logits = self._tap.logits if self._tap else None
        call = ExpertsCall(block, module, active.tokens, active.first, hidden, index, weights, logits, run)
        with torch_functions_unseen():
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
    """Lower some entries of a selection bias so far that these experts are never chosen."""
    before = bias.data.clone()
    bias.data.view(-1)[entries] = -1e30
    try:
        yield
    finally:
        bias.data.copy_(before)
