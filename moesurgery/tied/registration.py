"""Tied models in transformers: their `tied_…` types registered where `AutoConfig` looks model types up.

transformers has no entry point for model types, so nothing is registered before `register_tied_models` is called: by
whoever loads a tied checkpoint, and here by what builds a model. The classes are made when a `tied_…` config is loaded.
Where a future transformers has no room for that, nothing is registered, and a tied checkpoint still loads with
`trust_remote_code=True`: its code stands beside it.
"""

from __future__ import annotations

from typing import Any


def register_tied_models() -> None:
    """Let `transformers.AutoConfig` and `AutoModelForCausalLM` load tied checkpoints without `trust_remote_code`.

    Imports transformers. May be called any number of times.
    """
    from transformers.models.auto import configuration_auto

    mapping: Any = getattr(configuration_auto, "CONFIG_MAPPING", None)
    extra = getattr(mapping, "_extra_content", None)
    if isinstance(extra, dict) and not isinstance(extra, _TiedConfigs):
        mapping._extra_content = _TiedConfigs(extra)


class _TiedConfigs(dict[str, Any]):
    """Config classes by model type; those of tied models are made, with their model classes, when asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and _stock_classes(key) is not None)

    def __missing__(self, key: str) -> Any:
        class_names = _stock_classes(key)
        if class_names is None:
            raise KeyError(key)
        import transformers

        from moesurgery.tied import modeling_tied

        config = None
        for auto, name in zip(("AutoModelForCausalLM", "AutoModel"), class_names, strict=True):
            made: Any = getattr(modeling_tied, f"Tied{name}")
            config = self[key] = made.config_class
            # save_pretrained then writes the modeling file beside the weights.
            config.register_for_auto_class()
            made.register_for_auto_class(auto)
            getattr(transformers, auto).register(config, made)
        return config


def _stock_classes(key: str) -> tuple[str, str] | None:
    """Return the causal language model and the base model of the stock family behind a `tied_…` type."""
    if not key.startswith("tied_"):
        return None
    from transformers.models.auto import modeling_auto

    stock = key.removeprefix("tied_")
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(stock)
    base = modeling_auto.MODEL_MAPPING_NAMES.get(stock)
    return (causal, base) if isinstance(causal, str) and isinstance(base, str) else None
