"""The output of each single expert, not yet multiplied by its routing weight, by the model's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesurgery.forward.cpu_experts import BY_EXPERT, outputs_by_expert
from moesurgery.forward.experts_module import RoutingTensors
from moesurgery.forward.hooks import ExpertsCall

if TYPE_CHECKING:
    import torch

PART_BYTES = 128 << 20  # of expert outputs held at once, in float32
PART_BYTES_GPU = 4 << 30


@dataclass(frozen=True)
class ExpertOutputs:
    """The outputs of experts for some tokens of one call, under one routing or several.

    rows [t] are the tokens' indices in the call: `half` 0 is tokens of even windows, 1 of odd ones. `index` [t, U]
    are the experts that any routing chose, the number of experts where there are fewer; `outputs` [t, U, H] their
    outputs without weights, as the model computes them; `weights[name]` [t, U] the weights by a routing in float32, and
    `chosen[name]` [t, U] whether it chose the expert. For padding, and tokens that do not count, nothing is chosen, nor
    are experts of a number that is not routed (identity experts); where nothing is chosen, weights are zero.
    """

    half: int
    rows: torch.Tensor
    index: torch.Tensor
    outputs: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    chosen: Mapping[str, torch.Tensor]

    @cached_property
    def products(self) -> torch.Tensor:
        """<f_i, f_j> [t, U, U]."""
        return product(self.outputs, self.outputs.transpose(1, 2))

    def routed(self, name: str) -> torch.Tensor:
        """The routed output y [t, H] under a routing, in float32."""
        return (self.outputs * self.weights[name][..., None]).sum(dim=1)

    def along(self, target: torch.Tensor) -> torch.Tensor:
        """<f_i, y> [t, U] for a target y [t, H] in float32."""
        return (self.outputs.float() @ target[..., None])[..., 0]


def expert_outputs(call: ExpertsCall, experts: int, routings: Mapping[str, RoutingTensors]) -> Iterator[ExpertOutputs]:
    """Yield the outputs of all experts that any routing chose, some tokens at a time. Each is computed once."""
    import torch

    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    most = min(experts, sum(index.shape[-1] for index, _ in routings.values()))
    limit = PART_BYTES_GPU if hidden.is_cuda else PART_BYTES
    step = max(1, limit // (4 * most * hidden.shape[-1]))
    for half in (0, 1):
        for rows in torch.split(call.half(half), step):
            if not len(rows):
                continue
            part = {
                n: (i.reshape(-1, i.shape[-1])[rows], w.reshape(-1, w.shape[-1])[rows])
                for n, (i, w) in routings.items()
            }
            index, weights, chosen = _together(part, experts)
            if call.real is not None:
                real = call.real[rows][:, None]
                weights = {name: values * real for name, values in weights.items()}
                chosen = {name: values & real for name, values in chosen.items()}
            outputs = each_output(call, hidden[rows], index.clamp(max=experts - 1))
            yield ExpertOutputs(half, rows, index, outputs, weights, chosen)


def _together(
    routings: Mapping[str, RoutingTensors], experts: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the experts [t, U] that any routing chose, and by routing the weights [t, U] and which it chose."""
    import torch

    if len(routings) == 1:
        ((name, (index, weights)),) = routings.items()
        inside = index < experts
        return torch.where(inside, index, experts), {name: weights.float() * inside}, {name: inside}
    dense: dict[str, torch.Tensor] = {}
    member: dict[str, torch.Tensor] = {}
    for name, (index, weights) in routings.items():
        inside = index < experts
        at = torch.where(inside, index, experts)
        empty = torch.zeros(len(index), experts + 1, device=index.device)
        dense[name] = empty.scatter(1, at, weights.float())[:, :experts]
        member[name] = empty.bool().scatter_(1, at, True)[:, :experts]
    wanted = torch.stack(list(member.values())).any(dim=0)
    union = wanted.int().topk(max(1, int(wanted.sum(1).max())), dim=1, sorted=True).indices
    there = wanted.gather(1, union)
    return (
        torch.where(there, union, experts),
        {name: values.gather(1, union) * there for name, values in dense.items()},
        {name: values.gather(1, union) & there for name, values in member.items()},
    )


def each_output(call: ExpertsCall, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the outputs [t, U, H], without weights, of the experts `index` [t, U] for their tokens `hidden` [t, H]."""
    import torch

    if is_grouped(call.module):
        return grouped_outputs(call.module, hidden, index)
    count = index.shape[-1]
    alone = index.reshape(-1, 1)
    ones = torch.ones(len(alone), 1, device=hidden.device, dtype=call.weights.dtype)
    outputs = call.run(hidden.repeat_interleave(count, dim=0), alone.to(call.index.dtype), ones)
    return outputs.view(len(hidden), count, -1)


def grouped_outputs(module: Any, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the outputs [t, U, H] of chosen experts of a grouped module, by the module's own grouped matmuls.

    Tokens are sorted by expert once, as in the module; only the weighting and the sum over experts are left out.
    """
    import torch
    from transformers.integrations.moe import _grouped_linear

    if not hidden.is_cuda:
        by_place = torch.empty(index.numel(), hidden.shape[-1], dtype=module.down_proj.dtype)
        for places, values in outputs_by_expert(module, hidden, index):
            by_place.index_copy_(0, places, values)
        return by_place.view(*index.shape, -1)
    count, flat = index.shape[-1], index.reshape(-1)
    expert, order = torch.sort(flat)
    offsets = torch.histc(expert.int(), module.num_experts, 0, module.num_experts - 1).cumsum(0, dtype=torch.int32)
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def projected(name: str, read: torch.Tensor) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        projection: torch.Tensor = _grouped_linear(read, getattr(module, name), offsets, bias, module.is_transposed)
        return projection

    up = projected(first, hidden[order // count])
    outputs = projected("down_proj", module._apply_gate(up) if module.has_gate else module.act_fn(up))
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    return torch.empty_like(outputs).index_copy_(0, order, outputs).view(*index.shape, -1)


def is_grouped(module: Any) -> bool:
    """Whether an experts module computes the weighted sum of all chosen experts by grouped matmuls."""
    config = getattr(module, "config", None)
    return hasattr(module, "has_post_expert_norm") and getattr(config, "_experts_implementation", "") in (
        BY_EXPERT,
        "grouped_mm",
    )


def one_expert(call: ExpertsCall, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the output [t, H] of one expert for given inputs [t, H], without any weight."""
    import torch

    chosen = torch.full((len(hidden), 1), expert, device=hidden.device, dtype=call.index.dtype)
    return call.run(hidden, chosen, torch.ones(len(hidden), 1, device=hidden.device, dtype=call.weights.dtype))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right, matrices or batches of them, accumulated and returned in float32."""
    import torch

    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def summed_by_expert(index: torch.Tensor, values: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the sums [E, n] in float32 of rows `values` [S, n] by their expert `index` [S]; others count for nothing.

    Computed as a matmul with a one-hot matrix, so that the sums are deterministic on a GPU.
    """
    import torch

    member = torch.arange(experts, device=index.device)[:, None] == index
    return product(member.to(values.dtype), values)


def by_expert(index: torch.Tensor, values: torch.Tensor, experts: int) -> torch.Tensor:
    """Return values [t, U, …] of chosen experts `index` [t, U] as [t, E, …], zero for those that are not chosen."""
    import torch

    dense = torch.zeros(len(index), experts + 1, *values.shape[2:], device=values.device, dtype=values.dtype)
    places = index.view(*index.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return dense.scatter_(1, places, values)[:, :experts]


def gram_by_expert(part: ExpertOutputs, name: str, experts: int) -> torch.Tensor:
    """Return the sum [E, E] over tokens of g_i g_j <f_i, f_j> for the experts that a routing chose, in float32."""
    import torch

    weights = part.weights[name]
    pairs = torch.where(part.chosen[name][:, :, None] & part.chosen[name][:, None, :], part.products, 0.0)
    pairs = pairs * weights[:, :, None] * weights[:, None, :]
    places = part.index[:, None, :].expand(-1, part.index.shape[1], -1)
    rows = torch.zeros(*part.index.shape, experts + 1, device=pairs.device).scatter_(2, places, pairs)
    return summed_by_expert(part.index.reshape(-1), rows.flatten(0, 1)[:, :experts], experts)
