"""The two halves of an expert: what comes before its down-projection, and the down-projection itself.

transformers' experts modules of nearly all families share one form (stacked parameters, `_apply_gate`), whatever
their gating function. Where a module does not have it, or computes something else, `check_form` raises RefusedError.
Blocks without such a module are read through an adapter (`routing_adapters`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.forward.expert_outputs import one_expert
from moesurgery.forward.hooks import ExpertsCall
from moesurgery.forward.routing_adapters import adapter_of

if TYPE_CHECKING:
    import torch

_FORM = ("has_gate", "has_bias", "is_transposed", "down_proj")


def activations(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return h [t, I], the input of an expert's down-projection, for inputs [t, H]."""
    return gated(module, before_gate(module, expert, reads(module, expert, hidden)))


def reads(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the input [t, H] of an expert's first projection, for the block's inputs [t, H]."""
    adapter = adapter_of(module)
    return hidden if adapter is None else adapter.reads(module, expert, hidden)


def before_gate(module: Any, expert: int, read: torch.Tensor) -> torch.Tensor:
    """Return the output [t, P] of an expert's first projection for `read` [t, H]: P is 2 I with a gate, else I."""
    output = read @ first(module, expert).T
    if adapter_of(module) is None and module.has_bias:
        output = output + getattr(module, f"{_first_name(module)}_bias")[expert]
    return output


def gated(module: Any, output: torch.Tensor) -> torch.Tensor:
    """Return h [t, I] for the first projection's output [t, P]."""
    adapter = adapter_of(module)
    if adapter is not None:
        return adapter.gated(module, output)
    return module._apply_gate(output) if module.has_gate else module.act_fn(output)  # type: ignore[no-any-return]


def first(module: Any, expert: int) -> torch.Tensor:
    """Return an expert's first projection [P, H], gate and up as the module has them: a view, to change in place."""
    adapter = adapter_of(module)
    if adapter is not None:
        return adapter.first(module, expert)
    weight = getattr(module, _first_name(module))[expert]
    return weight.T if module.is_transposed else weight  # type: ignore[no-any-return]


def down(module: Any, expert: int) -> torch.Tensor:
    """Return an expert's down-projection [H, I]: a view, to be changed in place."""
    adapter = adapter_of(module)
    if adapter is not None:
        return adapter.down(module, expert)
    weight = module.down_proj[expert]
    return weight.T if module.is_transposed else weight  # type: ignore[no-any-return]


def _first_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def check_form(call: ExpertsCall, hint: str = "use --refit expert, which needs outputs only") -> None:
    """Raise RefusedError, with a hint, unless the experts of this call are `down(activations)` plus a bias."""
    module, where = call.module, call.block.where
    if adapter_of(module) is not None:
        return  # an adapter provides these two halves by construction
    problem = f"{type(call.module).__name__} has no activations that can be told from its down-projection"
    if not all(hasattr(module, name) for name in _FORM) or getattr(module, "has_post_expert_norm", False):
        raise RefusedError(f"{where}: {problem}", hint)
    expert = int(call.index.reshape(-1)[0])
    if not 0 <= expert < len(module.down_proj):
        return
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])[:16]
    expected = one_expert(call, expert, hidden)
    recomputed = activations(module, expert, hidden) @ down(module, expert).T
    if module.has_bias:
        recomputed = recomputed + module.down_proj_bias[expert]
    if not bool((recomputed - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6):
        raise RefusedError(f"{where}: {problem}", hint)
