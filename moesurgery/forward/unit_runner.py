"""One unit of a model at a time, run on one batch with hooks: the layer between the model's own code and passes.

The modules of a model on the meta device are wrapped. Called from within a coroutine, a unit suspends it and asks to be
run (`UnitRequest`); MoE blocks and their experts modules call the hooks that are active.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.forward.coroutine import Coroutine, Errand, current
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.hooks import BlockCall, ExpertsCall, Hooks
from moesurgery.forward.layer_units import LayerUnit, modules_without_weights
from moesurgery.forward.loaded_weights import LoadedWeights
from moesurgery.forward.meta_model import MetaModel
from moesurgery.forward.router_logits import RouterTap, torch_functions_unseen
from moesurgery.forward.routing_adapters import adapter_of, routed
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    # Of arguments of units, on one device, with the versions that were copied.
    Copies = MutableMapping[torch.Tensor, tuple[int, torch.Tensor]]

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]

_this_thread = threading.local()  # the forward pass (`BatchPass`) that it runs, and what it resumes from


@dataclass
class Resume:
    """Begin at decoder layer `layer`: `outputs[i]` is what the layer before it returned for batch i."""

    layer: int
    outputs: list[Any]


@dataclass
class UnitRequest:
    """The request of a forward pass that has reached a unit and is suspended there."""

    unit: LayerUnit
    call: Callable[..., Any]
    args: _Args
    kwargs: _Kwargs


@dataclass
class BatchPass:
    """The forward pass of one batch: `tokens`, whose first window has the number `first`."""

    number: int
    first: int
    tokens: Tokens
    coroutine: Coroutine = field(init=False)
    last: Any = None  # what the last unit returned

    @property
    def unit(self) -> LayerUnit | None:
        """The unit that is to run next; None at the end."""
        request = self.coroutine.request
        return None if request is None else request.unit

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the next unit is to be called with: values, then names and values."""
        request: UnitRequest = self.coroutine.request
        return (*request.args, *sorted(request.kwargs.items()))


@dataclass(frozen=True)
class _Active:
    hooks: Hooks
    tokens: Tokens
    first: int
    banned: dict[str, list[int]]


class UnitRunner:
    """A model of which single units are loaded and run. `keep` bytes of weights stay loaded on each device.

    Raises RefusedError where transformers has no code for the model, CheckpointError where tensors are missing.
    """

    def __init__(self, plan: Plan, devices: Sequence[str], dtype: str, keep: int) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self.plan = plan
        self.meta_model = MetaModel(plan, devices, dtype)
        self.layers = self.meta_model.layers
        self.blocks = self.meta_model.blocks()
        self.weights = LoadedWeights(self.meta_model, keep)
        self._active: _Active | None = None
        self._tap: RouterTap | None = None
        self._copies: dict[torch.device, Copies] = {d: WeakTensorKeyDictionary() for d in self.meta_model.devices}
        for block in self.blocks:
            if block.experts is not None:
                self._wrap(self.meta_model.model.get_submodule(block.experts), partial(self._at_experts, block))
            self._wrap(self.meta_model.model.get_submodule(block.path), partial(self._at_block, block))
        for unit in self.meta_model.units.values():
            self._wrap(unit.module, partial(self._at_unit, unit))
        for module in modules_without_weights(self.meta_model.model):
            self._wrap(module, self._at_once)

    @property
    def device(self) -> torch.device:
        """The device of the embedding: the only one, or the first."""
        return self.meta_model.device

    @property
    def routed(self) -> list[ExpertsModule]:
        """The MoE blocks whose routing can be read."""
        return [block for block in self.blocks if block.experts is not None]

    def forward(self, batch_pass: BatchPass, resume: Resume | None) -> Any:
        """Run the model's own forward pass on a batch, and return its logits: the body of a coroutine."""
        import torch

        _this_thread.batch_pass, _this_thread.resume = batch_pass, resume
        tokens = batch_pass.tokens
        with torch.no_grad():
            mask = None if tokens.mask is None else tokens.mask.to(self.device, torch.long)
            output = self.meta_model.text_model(tokens.ids.to(self.device), attention_mask=mask, use_cache=False)
        return output.logits

    def run_unit(self, batch_pass: BatchPass, hooks: Hooks) -> Any:
        """Run the unit that a batch has reached, whose weights are loaded, and return the unit's output."""
        import torch

        request: UnitRequest = batch_pass.coroutine.request
        args, kwargs = request.args, request.kwargs
        if len(self.meta_model.devices) > 1:
            device = self.meta_model.devices[request.unit.stage]
            copies = self._copies[device]
            args, kwargs = moved(args, device, copies), moved(kwargs, device, copies)
        with torch.no_grad(), self.hooked(hooks, batch_pass.tokens, batch_pass.first, request.unit):
            return request.call(*args, **kwargs)

    @contextmanager
    def hooked(self, hooks: Hooks, tokens: Tokens, first: int, unit: LayerUnit) -> Iterator[None]:
        """Attach hooks to a unit, for a batch of windows that begins at window `first`."""
        before = self._active
        blocks = [b for b in self.blocks if b.unit == unit.path]
        banned = {b.where: list(hooks.ban(b)) for b in blocks} if hooks.ban else {}
        self._active = _Active(hooks, tokens, first, banned)
        with ExitStack() as stack:
            for block in blocks:
                if banned.get(block.where) and block.correction is not None:
                    stack.enter_context(_lowered(self.meta_model.tensor(block.correction), banned[block.where]))
            try:
                yield
            finally:
                self._active = before

    def _wrap(self, module: Any, around: Callable[..., Any]) -> None:
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(module, forward, args, kwargs)

        module.forward = wrapped

    def _at_unit(self, unit: LayerUnit, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
        coroutine = current()
        if coroutine is None:
            return forward(*args, **kwargs)
        resume: Resume | None = _this_thread.resume
        if resume is not None and unit.layer is not None and unit.layer < resume.layer:
            return resume.outputs[_this_thread.batch_pass.number]
        return coroutine.ask(UnitRequest(unit, forward, args, kwargs))

    def _at_once(self, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
        """Run modules between units, such as rotary embeddings, in the thread that runs the units."""
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
            if block.router is None or not (active.hooks.router_logits or banned):
                return forward(*args, **kwargs)
            before, self._tap = self._tap, RouterTap(self.meta_model.tensor(block.router), banned)
            try:
                with self._tap:
                    return forward(*args, **kwargs)
            finally:
                self._tap = before

        if active.hooks.block is None:
            return run()
        return active.hooks.block(BlockCall(block, active.tokens, active.first, args, kwargs, run))

    def _at_experts(
        self, block: ExpertsModule, module: Any, forward: Callable[..., Any], args: _Args, kwargs: _Kwargs
    ) -> Any:
        active = self._active
        if active is None or (active.hooks.experts is None and not active.banned.get(block.where)):
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
        if active.hooks.experts is None:
            return forward(*args, **kwargs)

        def run(*changed: Any) -> Any:
            chosen = changed or (hidden, index, weights)
            return forward(*chosen) if adapter is None else routed(module, *chosen)

        logits = self._tap.logits if self._tap else None
        call = ExpertsCall(block, module, active.tokens, active.first, hidden, index, weights, logits, run)
        with torch_functions_unseen():
            result = active.hooks.experts(call)
        if result is None:
            return forward(*args, **kwargs)
        return result if adapter is None else adapter.returned(module, given[0], result)


def moved(value: Any, device: torch.device, copies: Copies) -> Any:
    """Return an argument of a unit with its tensors on a device. What layers share to write to is changed in place.

    A tensor that each layer is given, such as rotary embeddings, is copied once and found in `copies` afterwards: for
    every copy torch has the stream that it comes from wait for all work of the other, so devices would take turns.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        version, copy = copies.get(value, (None, None))
        if version != value._version:  # new, or written to since
            copy = value.to(device, non_blocking=True)
            copies[value] = value._version, copy
        return copy
    if isinstance(value, tuple):
        return tuple(moved(part, device, copies) for part in value)
    if isinstance(value, list):
        value[:] = [moved(part, device, copies) for part in value]
    elif isinstance(value, dict):
        value.update({key: moved(part, device, copies) for key, part in value.items()})
    return value


@contextmanager
def _lowered(bias: torch.Tensor, entries: list[int]) -> Iterator[None]:
    """Lower some entries of a selection bias so far that these experts are never chosen."""
    before = bias.data.clone()
    bias.data.view(-1)[entries] = -1e30
    try:
        yield
    finally:
        bias.data.copy_(before)
