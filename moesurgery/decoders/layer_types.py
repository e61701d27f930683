"""How each layer mixes positions: through which window, with RoPE or without, as `layer_types` and its kin say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moesurgery.decoders.traits import ConflictError, Traits, whole_number
from moesurgery.families.rope_keys import Config

# A window that stands for none, where a type cannot do without.
BOUNDLESS = 1 << 20


class AttentionKind(NamedTuple):
    """How one layer mixes positions: by what, through which window (None: all before), with RoPE or without."""

    window: int | None = None
    rope: bool = True
    mixer: str = "attention"


Layers = tuple[AttentionKind, ...]


def count_layers(config: Config) -> int:
    """Return the number of layers. Raises CheckpointError where the config states none."""
    return whole_number(config, "num_hidden_layers")


def _one_window(layers: Layers) -> int | None:
    """Return the one window of the layers that have one. Raises ConflictError where they differ."""
    windows = {layer.window for layer in layers} - {None}
    if len(windows) > 1:
        raise ConflictError(f"windows of {', '.join(str(w) for w in sorted(windows, key=str))} here, one for all there")
    return next(iter(windows), None)


def _only_attention_with_rope(layers: Layers) -> None:
    if any(layer.mixer != "attention" for layer in layers):
        raise ConflictError("layers without attention here, none there")
    if not all(layer.rope for layer in layers):
        raise ConflictError("layers without position embedding (NoPE) here, none there")


@dataclass(frozen=True)
class AllFull:
    """Every layer attends to everything before, with RoPE."""

    keys: tuple[str, ...] = ()

    def read(self, config: Config) -> Layers:
        return (AttentionKind(),) * count_layers(config)

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        _only_attention_with_rope(value)
        window = _one_window(value)
        if window is not None and window < traits["max_position_embeddings"]:  # a longer one changes nothing
            raise ConflictError(f"a sliding window of {window} here, none there")
        return {}


@dataclass(frozen=True)
class OneWindow:
    """One `sliding_window` for all layers, or none. `switch`: a flag that turns it on, False by default."""

    default: int | None
    switch: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("sliding_window", *((self.switch,) if self.switch else ()))

    def read(self, config: Config) -> Layers:
        window = config.get("sliding_window", self.default) or None
        if self.switch and not config.get(self.switch):
            window = None
        return (AttentionKind(window),) * count_layers(config)

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        _only_attention_with_rope(value)
        window = _one_window(value)
        if any(layer.window != window for layer in value):
            raise ConflictError(f"some layers with a window of {window} and some without here, all alike there")
        return {"sliding_window": window, **({self.switch: window is not None} if self.switch else {})}


Pattern = Callable[[Config, int], bool]


@dataclass(frozen=True)
class LayerTypes:
    """`layer_types` says which layers slide; where it is absent, `slides(config, layer)` does.

    `switch`: a flag that turns windows on. `rope_when_sliding`: full layers have no position embedding (Cohere 2).
    `extra`: keys that the pattern reads.
    """

    window: int | None
    slides: Pattern
    switch: str | None = None
    rope_when_sliding: bool = False
    extra: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return ("layer_types", "sliding_window", *((self.switch,) if self.switch else ()), *self.extra)

    def read(self, config: Config) -> Layers:
        window = config.get("sliding_window", self.window) or None
        if self.switch and not config.get(self.switch):
            window = None
        types = config.get("layer_types")
        kinds = []
        for i in range(count_layers(config)):
            sliding = types[i] == "sliding_attention" if types else window is not None and self.slides(config, i)
            kinds.append(AttentionKind(window if sliding else None, rope=sliding or not self.rope_when_sliding))
        return tuple(kinds)

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        window = _one_window(value)
        if self.rope_when_sliding:
            if window is None and all(layer.rope for layer in value):
                # RoPE comes with a window: one that no context fills changes nothing.
                window = max(BOUNDLESS, traits["max_position_embeddings"])
                value = tuple(layer._replace(window=window) for layer in value)
            if any(layer.rope != (layer.window is not None) for layer in value):
                raise ConflictError("RoPE and windows in different layers here, in the same layers there")
        else:
            _only_attention_with_rope(value)
        types = ["full_attention" if layer.window is None else "sliding_attention" for layer in value]
        return {
            "layer_types": types,
            "sliding_window": window,
            **({self.switch: window is not None} if self.switch else {}),
        }


# What a layer is where `layer_types` is absent, by (the type chunks, the layer has RoPE).
_KIND_BY_ROPE = {
    (False, True): "full_attention",
    (False, False): "sliding_attention",
    (True, True): "chunked_attention",
    (True, False): "full_attention",
}


@dataclass(frozen=True)
class RopeFlags:
    """`no_rope_layers`: 1 for layers with RoPE, 0 for those without. All layers attend to everything before.

    `windows`: the type also has windows, on the layers without RoPE, where `use_sliding_window` says so. `chunked`:
    layers with RoPE attend within chunks where `layer_types` does not say otherwise.
    """

    windows: bool = False
    chunked: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        own = ("no_rope_layers", "no_rope_layer_interval", "layer_types")
        return (*own, "use_sliding_window", "sliding_window") if self.windows else own

    def read(self, config: Config) -> Layers:
        flags = config.get("no_rope_layers")
        interval = config.get("no_rope_layer_interval") or 4
        types = config.get("layer_types")
        window = (config.get("sliding_window") if config.get("use_sliding_window") else None) if self.windows else None
        kinds = []
        for i in range(count_layers(config)):
            rope = bool(flags[i]) if flags else (i + 1) % interval != 0
            kind = types[i] if types else _KIND_BY_ROPE[self.chunked, rope]
            mixer = "chunked attention" if kind == "chunked_attention" else "attention"
            kinds.append(AttentionKind(window if kind == "sliding_attention" else None, rope, mixer))
        return tuple(kinds)

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        if any(layer.window is not None for layer in value):
            raise ConflictError(f"a sliding window of {_one_window(value)} here, none there")
        if any(layer.mixer != "attention" for layer in value):
            raise ConflictError("layers without full attention here, none there")
        return {"no_rope_layers": [int(layer.rope) for layer in value], "layer_types": ["full_attention"] * len(value)}


@dataclass(frozen=True)
class MixedLayers:
    """`layer_types` names attention ("full_attention") and other mixers; `default(config, layer)` where it is absent.

    `attention` is the name to write for attention layers. `rope_if`: a key and the value of it without which no layer
    has RoPE. `extra`: keys that the default reads.
    """

    default: Callable[[Config, int], str]
    attention: str = "full_attention"
    rope_if: tuple[str, str] | None = None
    extra: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return ("layer_types", *((self.rope_if[0],) if self.rope_if else ()), *self.extra)

    def read(self, config: Config) -> Layers:
        types = config.get("layer_types")
        names = types or [self.default(config, i) for i in range(count_layers(config))]
        rope = self.rope_if is None or config.get(self.rope_if[0]) == self.rope_if[1]
        return tuple(
            AttentionKind(None, rope, "attention" if n in ("full_attention", "attention") else n) for n in names
        )

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        if any(layer.window is not None or not layer.rope for layer in value):
            raise ConflictError("windows or layers without position embedding here, none there")
        return {
            "layer_types": [self.attention if layer.mixer == "attention" else layer.mixer for layer in value],
            **({self.rope_if[0]: self.rope_if[1]} if self.rope_if else {}),
        }
