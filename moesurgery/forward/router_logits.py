"""Capture router logits and ban experts, wherever a model's code multiplies by the router's matrix.

Families compute logits in modules of many names and forms. What they have in common is one linear map by one
parameter, which a torch function mode can intercept. It is active in one block, and not in its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SAME_VALUES = frozenset(
    {"to", "type", "float", "t", "transpose", "permute", "contiguous", "__get__", "bfloat16", "half"}
)
_LINEAR = frozenset({"linear", "matmul", "mm", "addmm", "__matmul__", "einsum"})


class RouterTap(TorchFunctionMode):
    """Keeps the `logits` [T, E] of a router with parameter [E, H] (or [H, E]), and sets those of banned experts to
    the lowest value of their dtype."""

    def __init__(self, router: torch.Tensor, banned: Sequence[int]) -> None:
        super().__init__()
        self.logits: torch.Tensor | None = None
        self._banned = list(banned)
        self._tracked: dict[int, torch.Tensor] = {id(router): router}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if isinstance(result, torch.Tensor) and (name in _SAME_VALUES or name in _LINEAR):
            for argument in (*args, *(kwargs or {}).values()):
                if not isinstance(argument, torch.Tensor) or id(argument) not in self._tracked:
                    continue
                if name in _SAME_VALUES and result.numel() == argument.numel():
                    self._tracked[id(result)] = result
                elif name in _LINEAR:
                    self._take(result)
                break
        return result

    def _take(self, logits: torch.Tensor) -> None:
        if self._banned:
            logits[..., self._banned] = torch.finfo(logits.dtype).min
        self.logits = logits.reshape(-1, logits.shape[-1])


def torch_functions_unseen() -> AbstractContextManager[Any]:
    """Return a context in which no torch function mode is active."""
    return torch._C.DisableTorchFunction()
