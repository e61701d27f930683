"""Hooks that read, and may change, the calls of a model's MoE blocks and of their experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.tokens import Tokens

if TYPE_CHECKING:
    import torch


@dataclass
class ExpertsCall:
    """One call of a block's `experts` module: T tokens of one batch.

    hidden [T, H], index [T, k] and weights [T, k] are its inputs: the routing that the model itself computed. Where
    the code has no such module, an adapter (`routing_adapters`) provides the same, and `module` is the block.
    `logits` [T, E] are the router's, where it is a linear map. `real` [T] is False for padding, and for tokens
    that do not count. `run()` computes the module's output [T, H]; `run(hidden, index, weights)` from other inputs.
    """

    block: ExpertsModule
    module: Any
    tokens: Tokens
    first: int  # the number of the batch's first window
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None
    run: Callable[..., torch.Tensor]

    @property
    def real(self) -> torch.Tensor | None:
        counts = self.tokens.counts
        return counts.reshape(-1).to(self.hidden.device) if counts is not None else None

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the rows [t, …] of values of this call that are not padding."""
        flat, real = values.reshape(-1, values.shape[-1]), self.real
        return flat if real is None else flat[real]

    def half(self, half: int) -> torch.Tensor:
        """Return the places [t] of all tokens of even windows (0) or of odd ones (1)."""
        import torch

        places = torch.arange(self.tokens.ids.numel(), device=self.hidden.device)
        return places.view(len(self.tokens), -1)[(self.first + half) % 2 :: 2].reshape(-1)

    @property
    def window(self) -> torch.Tensor:
        """The number of the window of each token [T]."""
        import torch

        numbers = torch.arange(self.first, self.first + len(self.tokens), device=self.hidden.device)
        return numbers.repeat_interleave(self.tokens.length)


@dataclass
class BlockCall:
    """One call of the smallest module that holds a block's router and experts; `run()` computes its output."""

    block: ExpertsModule
    tokens: Tokens
    first: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Hooks:
    """Callbacks for one pass.

    `experts` is called in place of every `experts` module and returns its output, or None for the usual one.
    `block` is called in place of the module around router and experts, and returns its output. `ban` returns the
    experts that a block's router may not choose. `router_logits` has `ExpertsCall.logits` filled in.
    """

    experts: Callable[[ExpertsCall], Any] | None = None
    block: Callable[[BlockCall], Any] | None = None
    ban: Callable[[ExpertsModule], Sequence[int]] | None = None
    router_logits: bool = False


NO_HOOKS = Hooks()
