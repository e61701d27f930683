"""Prediction (MTP) layers, run on the last hidden states of the trunk.

transformers' code for them (`MtpModel`, in 5.24) finds them under the numbers that its model classes list: 46 and 92
for GLM-4-MoE.

Those of DeepSeek-V3 (arXiv 2412.19437, section 2.2), GLM-4-MoE and their like stand behind the stack. What goes into
the k-th at position t is

    eh_proj [enorm(embedding of token t + k), hnorm(h)]

where h is the hidden state at t after the trunk's last norm, or what the prediction layer before put out. The order of
the halves and the norm are vLLM's: `models/deepseek_mtp.py` and `models/glm4_moe_mtp.py` get what `DeepseekV2Model` and
its like return, which is normed. (vLLM has zeros for the embedding at position 0; the paper does not.) The rest is a
decoder layer of the family's own class: it is run as the last layer of a model whose config has one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.layer_config import LayerOrigin, restacked_config, without_prediction
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

_NORMS, _PROJECTION = ("enorm.weight", "hnorm.weight"), "eh_proj.weight"
_QUANTISED = "quantization_config"


def prediction_blocks(engine: Engine, hidden: Sequence[Any]) -> list[MoeBlock]:
    """Return the MoE blocks of prediction layers that can be run on what the trunk's last layer returned."""
    import torch

    anatomy, width = engine.plan.anatomy, engine.width
    tensors, target = engine.meta_model.tensors, engine.meta_model.target
    shapes = {**dict.fromkeys(_NORMS, (width,)), _PROJECTION: (width, 2 * width)}
    found: list[MoeBlock] = []
    for block in anatomy.blocks:
        names = {f"{block.layer_path}.{name}": shape for name, shape in shapes.items()}
        if (
            block.mtp
            and block.layer == len(engine.layers) + len(found)
            and all(name in tensors and tuple(tensors[name].shape) == shape for name, shape in names.items())
            and {f"{block.root}norm.weight", f"{block.root}embed_tokens.weight"} <= target.keys()
            and all(isinstance(values, torch.Tensor) for values in hidden)
        ):
            found.append(block)
    return found


def longer_engine(engine: Engine, layers: int) -> Engine:
    """Return the engine of the model with its first `layers` prediction layers as decoder layers.

    Raises RefusedError where config.json cannot say so, CheckpointError where tensors are missing.
    """
    longer = engine.sharing(_longer(engine.plan, layers))
    last = longer.layers[-1]
    engine.weights.make_room(last.stage, last.nbytes)
    return longer


def _longer(plan: Plan, layers: int) -> Plan:
    """Return the plan with its first `layers` prediction layers in the stack: each is what the last of the trunk is."""
    settings = plan.anatomy.settings
    trunk = replace(settings, config={k: v for k, v in without_prediction(settings).items() if k != _QUANTISED})
    depth = settings.layers or 0
    config = restacked_config(trunk, [LayerOrigin(trunk, min(i, depth - 1)) for i in range(depth + layers)])
    if _QUANTISED in plan.config:  # it names layers by numbers, which stay what they are
        config[_QUANTISED] = plan.config[_QUANTISED]
    return replace(plan, config=config)


def prediction_inputs(
    engine: Engine, block: MoeBlock, number: int, tokens: Tokens, hidden: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the inputs [b, S, H] of prediction layer `number`, the first being 1, for each batch of windows.

    `hidden` [b, S, H] is what the layer before returned. The last `number` positions of a window have no token to go
    with: what they get is of no use (`with_next`).
    """
    import torch

    meta_model = engine.meta_model
    norms = [meta_model.value(f"{block.layer_path}.{name}") for name in _NORMS]
    projection = meta_model.value(f"{block.layer_path}.{_PROJECTION}")
    eps = meta_model.model.config.get_text_config().rms_norm_eps

    units = {n: meta_model.unit_of(meta_model.target[f"{block.root}{n}.weight"]) for n in ("norm", "embed_tokens")}

    def run(name: str, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = units[name].module(values.to(meta_model.devices[units[name].stage]))
        return result.to(meta_model.device)

    def normed(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * torch.nn.functional.rms_norm(values.float(), weight.shape, eps=eps).to(values.dtype)

    inputs, start = [], 0
    try:
        for unit in units.values():
            with engine.weights.loaded(unit, pin=True):
                pass
        with torch.no_grad():
            for states in hidden:
                ids = tokens.ids[start : start + len(states), : states.shape[1]]
                start += len(states)
                before = run("norm", states) if number == 1 else states.to(meta_model.device)
                embedded = run("embed_tokens", ids.roll(-number, dims=1))
                both = torch.cat([normed(embedded, norms[0]), normed(before, norms[1])], dim=-1)
                inputs.append(both @ projection.T)
    finally:
        engine.weights.unpin()
    return inputs


def with_next(tokens: Tokens, number: int) -> Tokens:
    """Return the windows, of which only tokens count that have another one `number` places on."""
    import torch

    real = torch.ones_like(tokens.ids, dtype=torch.bool) if tokens.mask is None else tokens.mask
    counted = torch.nn.functional.pad(real, (0, number))[:, number:]
    return Tokens(tokens.ids, tokens.mask, counted if tokens.counts is None else counted & tokens.counts)
