"""Router logits seen, and experts banned, wherever a model's code multiplies by the router's matrix.

Families compute logits in modules of many names and forms. What they have in common is one linear map by one
parameter, which a torch function mode can watch for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SAME_VALUES = frozenset(
    {"to", "type", "float", "t", "transpose", "permute", "contiguous", "__get__", "bfloat16", "half"}
)
_LINEAR = frozenset({"linear", "matmul", "mm", "addmm", "__matmul__", "einsum"})


class RouterTap(TorchFunctionMode):
    """Keeps the logits [T, E] of each router in `logits`, and gives banned experts the lowest there is.

    `routers` maps names to router parameters [E, H] (or [H, E]), `banned` names to expert numbers.
    """

    def __init__(self, routers: Mapping[str, torch.Tensor], banned: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.logits: dict[str, torch.Tensor] = {}
        self._banned = {name: list(experts) for name, experts in banned.items()}
        self._tracked: dict[int, tuple[torch.Tensor, str]] = {id(p): (p, name) for name, p in routers.items()}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if isinstance(result, torch.Tensor) and (name in _SAME_VALUES or name in _LINEAR):
            for argument in (*args, *(kwargs or {}).values()):
                found = self._tracked.get(id(argument)) if isinstance(argument, torch.Tensor) else None
                if found is None:
                    continue
                if name in _SAME_VALUES and result.numel() == argument.numel():
                    self._tracked[id(result)] = (result, found[1])
                elif name in _LINEAR:
                    self._take(found[1], result)
                break
        return result

    def _take(self, name: str, logits: torch.Tensor) -> None:
        banned = self._banned.get(name)
        if banned:
            logits[..., banned] = torch.finfo(logits.dtype).min
        self.logits[name] = logits.reshape(-1, logits.shape[-1])
