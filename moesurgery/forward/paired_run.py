"""Run MoE blocks of an edited model on the inputs of the original's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moesurgery.forward.engine import Engine
from moesurgery.forward.experts_module import RoutingTensors
from moesurgery.forward.hooks import BlockCall, ExpertsCall, Hooks
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch


class PairedRun:
    """Runs single MoE blocks of `plan`. Weights in common with `original` are shared in memory."""

    def __init__(self, original: Engine, plan: Plan) -> None:
        self.engine = original.sharing(plan)
        self.original = original
        self.original.weights.freed.append(self._free)
        self._unit: str | None = None

    def _free(self, unit: LayerUnit) -> None:
        """Free the weights of a unit that the original engine has freed, before the next unit is loaded."""
        if unit.path == self._unit:
            self._unit = None
            self.engine.weights.forget(self.engine.meta_model.units[unit.path])

    def run(self, call: BlockCall, experts: Callable[[ExpertsCall], Any]) -> None:
        """Run the block of `call` on the call's inputs, with `experts` in place of its experts module."""
        import torch

        unit = self.engine.meta_model.units[call.block.unit]
        if self._unit != unit.path:
            self.engine.weights.unpin()
            with self.engine.weights.loaded(unit, pin=True):
                self._unit = unit.path
        module = self.engine.meta_model.model.get_submodule(call.block.path)
        hooks = Hooks(experts=experts, router_logits=True)
        with torch.no_grad(), self.engine.hooked(hooks, call.tokens, call.first, unit):
            module(*call.args, **call.kwargs)

    def routing(self, call: BlockCall) -> RoutingTensors:
        """Return the experts [T, k] and weights [T, k] that the edited block's router chooses."""
        import torch

        routings: list[RoutingTensors] = []

        def experts(seen: ExpertsCall) -> torch.Tensor:
            routings.append((seen.index, seen.weights))
            return torch.zeros_like(seen.hidden)

        self.run(call, experts)
        return routings[0]

    def close(self) -> None:
        self.original.weights.freed.remove(self._free)
        self._unit = None
        self.engine.weights.unpin()
