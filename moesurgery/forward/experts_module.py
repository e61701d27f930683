"""Where a transformers model has one MoE block, and the routing tensors its router passes to its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.families.anatomy import MoeBlock

if TYPE_CHECKING:
    import torch

RoutingTensors = tuple["torch.Tensor", "torch.Tensor"]  # chosen experts [T, k] and their weights [T, k]


@dataclass(frozen=True)
class ExpertsModule:
    """Where a model's module tree has one MoE block of the plan.

    `experts` is the path of the module that is called with (hidden [T, H], indices [T, k], weights [T, k]), or of
    the block that an adapter reads (`adapters`); None where the family's code has neither, and `unread` is the reason.
    `router` and `correction` are paths of parameters. `path` is the smallest module that holds all of it.
    """

    block: MoeBlock
    unit: str
    path: str
    experts: str | None
    router: str | None
    correction: str | None
    unread: str = ""

    @property
    def where(self) -> str:
        return self.block.where
