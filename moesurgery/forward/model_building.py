"""A model as transformers' own code builds it from config.json, without weights: parameters are on the meta device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.anatomy import model_type_of
from moesurgery.forward.model_config import load_config
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

_building = threading.RLock()


def build(plan: Plan, dtype: torch.dtype) -> Any:
    """Return the model that config.json describes, parameters on the meta device, buffers real.

    Its code is transformers' own: code beside a checkpoint is never imported.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = model_type_of(plan.config)
    mend_llama4()
    if kind not in CONFIG_MAPPING:
        raise RefusedError(
            f"transformers {transformers.__version__} has no model code for model_type {kind!r}, so it cannot be run",
            "counting and editing work without it",
        )
    try:
        config = load_config(plan.config)
        if config.is_encoder_decoder:
            raise RefusedError(
                f"{kind} is an encoder-decoder: it has no loss on running text, and is not run",
                "counting and editing work without it",
            )
        # Grouped matmuls of all experts where the model's code can do without a loop over them.
        config._experts_implementation = None
        with torch.no_grad(), parameters_on_meta():
            return _class_of(plan, config)._from_config(config, dtype=dtype).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"transformers cannot build the model of config.json: {error}") from error


def mend_llama4() -> None:
    """Patch Llama 4 of transformers so that it runs: 5.24 reads `image_outputs` of an output that has none.

    Before 5.24 nothing reads it; a version whose output has it is left alone.
    """
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    output: Any = MoeCausalLMOutputWithPast
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _class_of(plan: Plan, config: Any) -> Any:
    """Return the class that `architectures` names, or the causal language model of the config."""
    import transformers

    for name in plan.config.get("architectures") or ():
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have modules put every parameter that they register on the meta device; buffers keep their values.

    One thread at a time: what is changed meanwhile is torch's own.
    """
    import torch

    _building.acquire()
    register = torch.nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        _building.release()
