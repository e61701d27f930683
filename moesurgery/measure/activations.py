"""The two halves of an expert: what comes before its down-projection, and the down-projection itself.

transformers' experts modules of nearly all families share one form (stacked parameters, `_apply_gate`), whatever
their gating function. Where a module does not have it, or computes something else, that is found out and said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.measure.engine import ExpertsCall
from moesurgery.measure.outputs import one_expert

if TYPE_CHECKING:
    import torch

_FORM = ("has_gate", "has_bias", "is_transposed", "down_proj")


def activations(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return h [t, I], the input of an expert's down-projection, for inputs [t, H]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    up = hidden @ weight if module.is_transposed else hidden @ weight.T
    if module.has_bias:
        up = up + getattr(module, f"{name}_bias")[expert]
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)  # type: ignore[no-any-return]


def down(module: Any, expert: int) -> torch.Tensor:
    """Return an expert's down-projection [H, I]: a view, to be changed in place."""
    weight = module.down_proj[expert]
    return weight.T if module.is_transposed else weight  # type: ignore[no-any-return]


def check_form(call: ExpertsCall, hint: str = "use --refit expert, which needs outputs only") -> None:
    """Raise RefusedError, with a hint, unless the experts of this call are `down(activations)` plus a bias."""
    module, where = call.module, call.block.where
    problem = f"{type(call.module).__name__} has no activations that can be told from its down-projection"
    if not all(hasattr(module, name) for name in _FORM) or getattr(module, "has_post_expert_norm", False):
        raise RefusedError(f"{where}: {problem}", hint)
    expert = int(call.index.reshape(-1)[0])
    if not 0 <= expert < len(module.down_proj):
        return
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])[:16]
    expected = one_expert(call, expert, hidden)
    found = activations(module, expert, hidden) @ down(module, expert).T
    if module.has_bias:
        found = found + module.down_proj_bias[expert]
    if not bool((found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6):
        raise RefusedError(f"{where}: {problem}", hint)
