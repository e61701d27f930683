"""The second moments of what down-projections read, one expert at a time.

When one layer has been run on all tokens, each of its experts in turn has its moments summed, sum g^2 h h^T [2, I, I]
over even and odd windows, in float64: h is the input of its down-projection, g its weight. `--refit down` solves with
the same sums. Those of a shared expert or a dense FFN are of what its down-projection reads, with g = 1.

Memory beside the forward pass: for all tokens the inputs of one layer's experts, and what its other FFN's
down-projection reads; and two square matrices of the width of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moesurgery.families.anatomy import MoeBlock
from moesurgery.fitting.expert_fit import RoutedTokens, add_products, weighted_activations
from moesurgery.fitting.neuron_order import removal_order
from moesurgery.forward.activations import check_form, down
from moesurgery.forward.batch_passes import BatchPasses
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall
from moesurgery.forward.layer_units import LayerUnit
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import neurons_together

if TYPE_CHECKING:
    import torch

_HINT = "`slim-experts --by weights` needs no text"


@dataclass(frozen=True)
class Moments:
    """The moments `gram` [2, I, I] of one expert of `block`, and its down-projection `weight` [H, I].

    `where` is the block's, or the module of a shared expert or dense FFN. `tokens` were routed to the expert.
    """

    where: str
    block: MoeBlock
    expert: int
    gram: torch.Tensor
    weight: torch.Tensor
    tokens: int

    @property
    def outputs(self) -> torch.Tensor:
        """W^T W [I, I] in float64."""
        wide = self.weight.double()
        return wide.T @ wide

    @property
    def saliency(self) -> torch.Tensor:
        """sum g^2 h_i^2 |W_i|^2 [I], W_i a column of W."""
        return self.squares * self.weight.double().square().sum(0)

    @property
    def squares(self) -> torch.Tensor:
        """sum g^2 h_i^2 [I]."""
        return self.gram.sum(0).diagonal()


@dataclass
class _Ffn:
    block: MoeBlock
    unit: str
    linear: Any  # its down-projection
    handle: Any
    read: list[torch.Tensor]


class NeuronMoments:
    """Holds what one layer's FFNs read, for all tokens, until their moments are asked for. Close when done."""

    def __init__(self, engine: Engine) -> None:
        self._calls: dict[str, list[ExpertsCall]] = {}
        self._ffns: dict[str, _Ffn] = {}
        self._paused = False
        plan = engine.plan
        for module, block in {
            **shared_experts(plan.anatomy, plan.tensors),
            **dense_ffns(plan.anatomy, plan.tensors),
        }.items():
            name = next(m.name for m in block.named("down") if m.stem.main)
            path, _, leaf = engine.meta_model.target.get(name, "").rpartition(".")
            if leaf != "weight" or block.members[0].expert is None:
                continue  # not run, as in a prediction layer, or no linear module of its own
            linear = engine.meta_model.model.get_submodule(path)
            read: list[torch.Tensor] = []
            handle = linear.register_forward_pre_hook(partial(self._hold, read))
            self._ffns[module] = _Ffn(block, engine.meta_model.unit_of(f"{path}.{leaf}").path, linear, handle, read)

    def _hold(self, read: list[torch.Tensor], module: Any, args: tuple[Any, ...]) -> None:
        if not self._paused:
            read.append(args[0])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold nothing of what is run within: a block that is tried again reads its shared expert again."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def see(self, call: ExpertsCall) -> None:
        """Hold a call of a block's experts."""
        self._calls.setdefault(call.block.where, []).append(call)

    def of_layer(self, unit: LayerUnit, passes: BatchPasses) -> Iterator[Moments]:
        """Yield the moments of each expert of a unit that is loaded and was run on all tokens, and let go of it.

        Raises RefusedError where the experts' activations cannot be read.
        """
        for where, calls in self._calls.items():
            block, module = calls[0].block.block, calls[0].module
            check_form(calls[0], _HINT)
            routed = RoutedTokens(calls, block.experts)
            for expert in range(block.experts):
                mine, weight = routed.of(expert), down(module, expert)
                rows = weighted_activations(module, expert, mine)
                gram = _summed(rows, [part.odd for part in mine], weight)
                yield Moments(where, block, expert, gram, weight, sum(len(h) for h in rows))
        self._calls.clear()
        for where, ffn in self._ffns.items():
            if ffn.unit == unit.path and len(ffn.read) == len(passes):
                rows, odd = [], []
                for batch, read in zip(passes.passes, ffn.read, strict=True):
                    windows, length = batch.tokens.ids.shape
                    numbers = (batch.first + _range(windows, read)).repeat_interleave(length)
                    counts = batch.tokens.counts
                    real = slice(None) if counts is None else counts.reshape(-1).to(read.device)
                    rows.append(read.reshape(-1, read.shape[-1])[real].float())
                    odd.append((numbers % 2 == 1)[real])
                gram = _summed(rows, odd, ffn.linear.weight)
                yield Moments(where, ffn.block, 0, gram, ffn.linear.weight, sum(len(h) for h in rows))
            ffn.read.clear()

    def close(self) -> None:
        for ffn in self._ffns.values():
            ffn.handle.remove()


def _range(count: int, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.arange(count, device=like.device)


def _summed(rows: Sequence[torch.Tensor], odd: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return the sums of h h^T [2, I, I] over even and odd windows for `rows` [t, I] of each batch."""
    import torch

    width = weight.shape[1]
    gram = torch.zeros(2, width, width, dtype=torch.float64, device=weight.device)
    for h, of_odd in zip(rows, odd, strict=True):
        add_products(gram[0], h[~of_odd], h[~of_odd])
        add_products(gram[1], h[of_odd], h[of_odd])
    return gram


def neuron_sums(engine: Engine, found: Moments) -> dict[str, torch.Tensor]:
    """Return the sums of one expert's neurons [I] that statistics have (`stats.statistics_file`)."""
    import torch

    size = neurons_together(found.block, engine.plan.tensors)
    order, errors = removal_order(found.gram.sum(0), found.outputs, 0, size)
    if size > 1:
        order = (order[:, None] * size + _range(size, order)).flatten()
        before = torch.cat([errors.new_zeros(1), errors[:-1]])
        errors = (before[:, None] + (errors - before)[:, None] * (1 + _range(size, order)) / size).flatten()
    sums = {"neuron_saliency": found.saliency, "neuron_order": order.double(), "neuron_error": errors}
    return {**sums, "neuron_squares": found.squares}
