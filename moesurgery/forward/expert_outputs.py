"""What each expert says, apart from the others and from its weight: by the model's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moesurgery.forward.experts_module import RoutingTensors
from moesurgery.forward.hooks import ExpertsCall

if TYPE_CHECKING:
    import torch

PART_BYTES = 128 << 20


@dataclass(frozen=True)
class ExpertOutputs:
    """What experts say to some real tokens of one call, under one routing or several.

    rows [t] are the tokens' places in the call. `index` [t, U] are the experts that any routing chose, -1 where
    there are fewer; `outputs` [t, U, H] their outputs without weights, in float32; `weights[name]` [t, U] the
    weights by a routing, and `chosen[name]` [t, U] whether it chose the expert. Experts of a number that is not
    routed (identity experts) are left out.
    """

    rows: torch.Tensor
    index: torch.Tensor
    outputs: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    chosen: Mapping[str, torch.Tensor]

    @cached_property
    def products(self) -> torch.Tensor:
        """<f_i, f_j> [t, U, U]."""
        return self.outputs @ self.outputs.transpose(1, 2)

    def routed(self, name: str) -> torch.Tensor:
        """The routed output y [t, H] under a routing."""
        return (self.outputs * self.weights[name][..., None]).sum(dim=1)


def expert_outputs(call: ExpertsCall, experts: int, routings: Mapping[str, RoutingTensors]) -> Iterator[ExpertOutputs]:
    """Yield the outputs of all experts that any routing chose, some tokens at a time. Each is computed once."""
    import torch

    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    real = torch.arange(len(hidden), device=hidden.device)
    if call.real is not None:
        real = real[call.real]
    most = min(experts, sum(index.shape[-1] for index, _ in routings.values()))
    for rows in torch.split(real, max(1, PART_BYTES // (4 * most * hidden.shape[-1]))):
        dense: dict[str, torch.Tensor] = {}
        member: dict[str, torch.Tensor] = {}
        for name, (index, weights) in routings.items():
            chosen = index.reshape(-1, index.shape[-1])[rows]
            inside = chosen < experts
            at = chosen.clamp(max=experts)
            dense[name] = hidden.new_zeros(len(rows), experts + 1, dtype=torch.float32).scatter_(
                1, at, (weights.reshape(-1, index.shape[-1])[rows] * inside).float()
            )[:, :experts]
            member[name] = torch.zeros(len(rows), experts + 1, dtype=torch.bool, device=hidden.device).scatter_(
                1, at, True
            )[:, :experts]
        wanted = torch.stack(list(member.values())).any(dim=0)
        union = wanted.int().topk(int(wanted.sum(1).max()), dim=1, sorted=True).indices
        there = wanted.gather(1, union)
        outputs = torch.zeros(len(rows), union.shape[1], hidden.shape[1], device=hidden.device)
        for expert in torch.where(wanted.any(dim=0))[0].tolist():
            token, slot = torch.where((union == expert) & there)
            outputs[token, slot] = one_expert(call, expert, hidden[rows[token]]).float()
        yield ExpertOutputs(
            rows,
            torch.where(there, union, -1),
            outputs,
            {name: values.gather(1, union) * there for name, values in dense.items()},
            {name: values.gather(1, union) & there for name, values in member.items()},
        )


def one_expert(call: ExpertsCall, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the output [t, H] of one expert for given inputs [t, H], without any weight."""
    import torch

    chosen = torch.full((len(hidden), 1), expert, device=hidden.device, dtype=call.index.dtype)
    return call.run(hidden, chosen, torch.ones(len(hidden), 1, device=hidden.device, dtype=call.weights.dtype))
