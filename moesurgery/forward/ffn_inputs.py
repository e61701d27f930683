"""The inputs of each layer's FFN for a few prompts: the hidden states that a router there would get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Slice
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch


def ffn_inputs(plan: Plan, tokens: Tokens, ffn: str) -> Iterator[torch.Tensor]:
    """Yield, for each layer in turn, the float32 input [prompts, tokens, H] of its module `ffn`.

    The model runs layer by layer (`engine`): memory is one layer and the activations. Rows of padding are undefined.
    """
    import torch

    engine = Engine(plan)
    inputs: list[torch.Tensor] = []

    def see(module: Any, args: Any) -> None:
        inputs.append(args[0].detach().clone())

    for i, unit in enumerate(engine.layers):
        try:
            unit.module.get_submodule(ffn).register_forward_pre_hook(see)
        except AttributeError:
            raise RefusedError(f"layer {i} has no module {ffn}") from None
    passes = engine.start(tokens, batch=engine.windows_per_batch(tokens, False))
    try:
        while passes.passed < len(engine.layers):
            passes.step()
            if inputs:
                yield torch.cat([torch.nn.functional.pad(f, (0, 0, 0, tokens.length - f.shape[1])) for f in inputs])
                inputs.clear()
    finally:
        passes.close()


def embeddings(plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """Return the float32 embeddings [..., H] of token ids, reading only their rows."""
    import torch

    name = next((n for n in plan.tensors if n.endswith("embed_tokens.weight")), None)
    if name is None:
        raise CheckpointError("the model has no embed_tokens.weight")
    table = plan.tensors[name]
    tokens, where = torch.unique(ids, return_inverse=True)
    if len(tokens) and int(tokens.max()) >= table.shape[0]:
        raise CheckpointError(f"token {int(tokens.max())} is beyond the {table.shape[0]} rows of {name}")
    reader = FileReader()
    try:
        rows = []
        for token in tokens.tolist():
            reader.begin_chunk()
            row = Slice(table, token, token + 1)
            rows.append(row.evaluate(0, row.numel, reader).to(torch.float32).clone())
        reader.check()
    finally:
        reader.close()
    return torch.stack(rows)[where]
