"""What the FFN of each layer reads, for a batch of prompts: the states that a router in its place would see.

The model is never loaded whole: transformers' own forward pass runs over a model without weights, and each layer's
weights are read when the pass reaches it and dropped when it leaves. Memory is one layer in float32, the embeddings
of the prompts' tokens, and the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.plan.expr import Rows
from moesurgery.plan.plan import Plan
from moesurgery.plan.reader import FileReader

if TYPE_CHECKING:
    import torch


def hidden_states(plan: Plan, ids: torch.Tensor, mask: torch.Tensor, ffn: str) -> list[torch.Tensor]:
    """Return, for each layer, the float32 input [prompts, tokens, H] of its module `ffn`.

    `ids` and `mask` are [prompts, tokens]; padding (mask 0) stands on the right, so that positions are right as they
    are. Rows of the result at padding mean nothing. Raises CheckpointError where a tensor is missing.
    """
    import torch

    found: list[torch.Tensor] = []
    with _streamed_model(plan) as (base, prefix):
        layers = base.layers
        for i, layer in enumerate(layers):
            _load_around(plan, layer, f"{prefix}layers.{i}.")
            try:
                module = layer.get_submodule(ffn)
            except AttributeError:
                raise RefusedError(f"layer {i} has no module {ffn}") from None
            module.register_forward_pre_hook(lambda m, args: found.append(args[0].detach().clone()))
        # The embedding module itself runs, on the rows of these tokens alone: some scale what they look up.
        tokens, numbers = torch.unique(ids, return_inverse=True)
        base.embed_tokens.weight = torch.nn.Parameter(embeddings(plan, tokens), requires_grad=False)
        base.embed_tokens.padding_idx = None
        with torch.inference_mode():
            base(input_ids=numbers, attention_mask=mask, use_cache=False)
    return found


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
            row = Rows(table, token, token + 1)
            rows.append(row.evaluate(0, row.numel, reader).to(torch.float32).clone())
    finally:
        reader.close()
    return torch.stack(rows)[where]


@contextmanager
def _streamed_model(plan: Plan) -> Iterator[tuple[Any, str]]:
    """Give the decoder without its head and without weights, and the prefix of its tensors' names."""
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    automatic: Any = transformers.AutoConfig
    loader: Any = transformers.AutoModelForCausalLM
    config = dict(plan.config)
    config.pop("auto_map", None)
    settings = automatic.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = loader.from_config(settings, dtype=torch.float32, trust_remote_code=False).eval()
    prefix = f"{model.base_model_prefix}."
    base = getattr(model, model.base_model_prefix)
    for module in base.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # Tables computed from the config, such as RoPE's: there is a rule for each, and no file holds them.
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            model._init_weights(module)
    _load(plan, {n: p for n, p in base.named_parameters() if n.count(".") == 1 and "norm" in n}, base, prefix)
    yield base, prefix


def _load_around(plan: Plan, layer: Any, prefix: str) -> None:
    """Read a layer's weights just before it runs, and drop them just after."""

    def before(module: Any, args: Any) -> None:
        _load(plan, dict(layer.named_parameters()), layer, prefix)

    def after(module: Any, args: Any, output: Any) -> None:
        layer.to("meta")

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _load(plan: Plan, parameters: dict[str, Any], module: Any, prefix: str) -> None:
    import torch

    reader = FileReader()
    state = {}
    try:
        for name, parameter in parameters.items():
            expr = plan.tensors.get(prefix + name)
            if expr is None or expr.shape != tuple(parameter.shape):
                what = "is missing" if expr is None else f"has shape {list(expr.shape)}, not {list(parameter.shape)}"
                raise CheckpointError(f"{prefix}{name} {what}")
            reader.begin_chunk()
            state[name] = expr.evaluate(0, expr.numel, reader).view(expr.shape).to(torch.float32).clone()
    finally:
        reader.close()
    module.load_state_dict(state, strict=False, assign=True)
