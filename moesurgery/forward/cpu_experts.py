"""Experts on a processor: one after the other, each on the tokens that are routed to it.

transformers' `grouped_mm` reads, multiplies and writes the rows of all experts in one array per step, which leaves the
caches of a processor; here every step works on the rows of one expert. Registered with transformers as an
implementation of its experts modules, and used in place of `grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BY_EXPERT = "moesurgery_by_expert"


def use_by_expert(model: Any) -> None:
    """Have a model's experts modules that would run `grouped_mm` run `by_expert_forward`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BY_EXPERT, by_expert_forward)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "has_post_expert_norm") and getattr(config, "_experts_implementation", "") == "grouped_mm":
            config._experts_implementation = BY_EXPERT


def by_expert_forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum [T, H] of the chosen experts `index` [T, k] for `hidden` [T, H], added in float32."""
    import torch

    scale = weights.reshape(-1, 1)
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for places, outputs in outputs_by_expert(module, hidden, index):
        total.index_add_(0, places // index.shape[-1], (outputs * scale[places]).float())
    return total.to(hidden.dtype)


def outputs_by_expert(
    module: Any, hidden: torch.Tensor, index: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each chosen expert its places [n] in the flattened `index` [T, k], and its outputs [n, H] there.

    Numbers that are no expert of the module are left out.
    """
    import torch

    flat = index.reshape(-1)
    counts = torch.bincount(flat, minlength=module.num_experts).tolist()
    groups = torch.split(torch.argsort(flat, stable=True), counts)
    for expert in range(module.num_experts):
        places = groups[expert]
        if len(places):
            yield places, _output(module, expert, hidden.index_select(0, places // index.shape[-1]))


def _output(module: Any, expert: int, read: torch.Tensor) -> torch.Tensor:
    """Return the output [n, H] of one expert for its inputs [n, H], as the module's grouped matmuls compute it."""
    first = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, read)
    outputs = _linear(
        module, "down_proj", expert, module._apply_gate(first) if module.has_gate else module.act_fn(first)
    )
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


def _linear(module: Any, name: str, expert: int, read: torch.Tensor) -> torch.Tensor:
    import torch

    weight = getattr(module, name)[expert]
    weight = weight if module.is_transposed else weight.T
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    read = read.to(weight.dtype)
    return read @ weight if bias is None else torch.addmm(bias, read, weight)
