"""What llama-imatrix would see of a model that transformers runs: sums of squared inputs of its weights, by column.

Of experts for each of them, over the tokens that are routed to it; of other linear maps over all tokens, where windows
have no padding. Names are those that llama.cpp's converter gives the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moesurgery.errors import RefusedError
from moesurgery.forward.activations import activations, check_form, reads
from moesurgery.forward.hooks import ExpertsCall

if TYPE_CHECKING:
    import numpy as np
    import torch

    from moesurgery.forward.engine import Engine
    from moesurgery.forward.tokens import Tokens

_HINT = "leave --imatrix out, or run llama-imatrix on the GGUF"


class ImatrixSums:
    """Sums of squares [E, n] and counts [E] by the name of a weight in GGUF, added to while a model runs."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._adding = threading.Lock()

    def add_experts(self, call: ExpertsCall) -> None:
        """Add one call of a block's experts. Raises RefusedError where their activations cannot be read."""

        block = call.block.block
        if f"blk.{block.layer}.ffn_down_exps.weight" not in self._sums:
            check_form(call, _HINT)
        index = call.rows(call.index)
        hidden = call.rows(call.hidden)
        for expert in range(block.experts):
            rows = hidden[(index == expert).any(dim=-1)]
            if not len(rows):
                continue
            read, inner = reads(call.module, expert, rows), activations(call.module, expert, rows)
            for weight, values in (("ffn_gate_exps", read), ("ffn_up_exps", read), ("ffn_down_exps", inner)):
                if weight == "ffn_gate_exps" and block.layout is not None and not block.layout.gated:
                    continue
                self._add(f"blk.{block.layer}.{weight}.weight", values, expert, block.experts)

    def _add(self, name: str, values: torch.Tensor, row: int = 0, rows: int = 1) -> None:
        import torch

        squares = values.float().square().sum(0, dtype=torch.float64)
        with self._adding:  # batches may be computed by several threads
            if name not in self._sums:
                self._sums[name] = torch.zeros(rows, values.shape[-1], dtype=torch.float64, device=values.device)
                self._counts[name] = torch.zeros(rows, dtype=torch.float64)
            self._sums[name][row] += squares
            self._counts[name][row] += len(values)

    @contextmanager
    def watching(self, engine: Engine, tokens: Tokens) -> Iterator[None]:
        """Add the inputs of all linear maps of the layers while the block runs."""
        import torch

        handles = []
        names = {} if tokens.counts is not None else _gguf_names(engine)
        for path, module in engine.meta_model.model.named_modules():
            if path in names and isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(self._hook(names[path])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._add(name, args[0].reshape(-1, args[0].shape[-1]))

        return hook

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return all sums [E, n] and counts [E], in the order of names."""
        return {name: (self._sums[name].cpu().numpy(), self._counts[name].numpy()) for name in sorted(self._sums)}


def _gguf_names(engine: Engine) -> dict[str, str]:
    """Return what llama.cpp calls the weights of a model's linear maps, by the path of the module.

    Of the architectures that the package gguf knows, the one that has names for most of them. Raises RefusedError
    without that package.
    """
    try:
        from gguf import MODEL_ARCH, get_tensor_name_map
    except ImportError:
        raise RefusedError(
            "an imatrix is written with the package gguf, which is not installed", 'pip install "moesurgery[gguf]"'
        ) from None
    anatomy = engine.plan.anatomy
    wanted = {
        name: target.removesuffix(".weight")
        for name, target in engine.meta_model.target.items()
        if name in anatomy.layer and name.endswith(".weight")
    }
    best: dict[str, str] = {}
    for architecture in MODEL_ARCH:
        table = get_tensor_name_map(architecture, anatomy.settings.layers or 0)
        named = {path: table.get_name(name, try_suffixes=(".weight",)) for name, path in wanted.items()}
        known = {path: name for path, name in named.items() if name is not None}
        best = known if len(known) > len(best) else best
    return best
