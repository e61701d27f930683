"""Tied models in transformers: registered when transformers is imported, whoever imports it, and not before.

`import moesurgery` calls `install`. transformers has no entry point for model types, and importing it takes seconds,
so its module of config classes is met on its way in. The classes themselves are made when a `tied_…` config is
loaded. Where a future transformers has no room for that, nothing is registered, and a tied checkpoint still loads
with `trust_remote_code=True`: its code stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Register tied models now where transformers is imported, else as soon as it is."""
    if _CONFIGS in sys.modules:
        _register(sys.modules[_CONFIGS])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds one module as the other finders do, and registers tied models after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIGS:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                loader.exec_module = _then_register(loader.exec_module)
                return spec
        return None


def _then_register(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def executed(module: ModuleType) -> None:
        execute(module)
        _register(module)

    return executed


def _register(module: ModuleType) -> None:
    """Put `tied_…` types where `AutoConfig.register` puts its own."""
    mapping: Any = getattr(module, "CONFIG_MAPPING", None)
    extra = getattr(mapping, "_extra_content", None)
    if isinstance(extra, dict) and not isinstance(extra, _TiedConfigs):
        mapping._extra_content = _TiedConfigs(extra)


class _TiedConfigs(dict[str, Any]):
    """Config classes by model type; those of tied models are made, with their model classes, when asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and _stock_classes(key) is not None)

    def __missing__(self, key: str) -> Any:
        found = _stock_classes(key)
        if found is None:
            raise KeyError(key)
        import transformers

        from moesurgery.tied import modeling_tied

        config = None
        for auto, name in zip(("AutoModelForCausalLM", "AutoModel"), found, strict=True):
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
