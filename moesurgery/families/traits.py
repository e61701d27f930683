"""What a decoder computes around its FFNs, as config.json says it: the words of `architectures`.

A *trait* is one fact, such as whether q, k and v have biases, or the window of each layer. For each trait a type says
where its config keeps the value (a codec with keys) or what its code does whatever the config says (`Always`).
Reading a config as one type and writing the traits as another's is the config rewrite of a pair. A value that the
other type cannot hold is a conflict: it would be dropped silently, so the pair is refused.

Every value that a config leaves out is read with its own type's default and written down: what is absent would
otherwise get the default of the other type.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from moesurgery.errors import CheckpointError

Config = Mapping[str, Any]
Traits = Mapping[str, Any]


class ConflictError(Exception):
    """A type cannot hold the value of a trait; the message says why, as the end of a sentence."""


class Codec(Protocol):
    """How one type keeps one trait."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that belong to the trait in this type."""

    def read(self, config: Config) -> Any:
        """Return the value that `config` gives the trait."""

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        """Return the keys that give the trait `value`, among `traits` read from `config`. Raises ConflictError."""


@dataclass(frozen=True)
class Always:
    """The type's code fixes the trait."""

    value: Any
    keys: tuple[str, ...] = ()

    def read(self, config: Config) -> Any:
        return self.value

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        if value != self.value:
            raise ConflictError(f"{shown(value)} here, always {shown(self.value)} there")
        return {}


def shown(value: Any) -> str:
    """Show a trait's value to a person."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Derived:
    """The type's code computes the trait from the config."""

    value: Callable[[Config], Any]
    keys: tuple[str, ...] = ()

    def read(self, config: Config) -> Any:
        return self.value(config)

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        return Always(self.value({**config, **traits})).write(value, traits, config)


@dataclass(frozen=True)
class Choice:
    """The config's `name` chooses among `values`, given as config value -> trait; `default` is a config value."""

    name: str
    values: Mapping[Any, Any]
    default: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, config: Config) -> Any:
        chosen = config.get(self.name, self.default)
        if chosen not in self.values:
            raise CheckpointError(f"config.json: {self.name} is {chosen!r}, expected one of {list(self.values)}")
        return self.values[chosen]

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        for key, meaning in self.values.items():
            if meaning == value:
                return {self.name: key}
        raise ConflictError(f"{shown(value)} here, {' or '.join(map(shown, self.values.values()))} there")


@dataclass(frozen=True)
class Key:
    """The config keeps the trait under `name`. `default` may be a function of the config.

    `null`: whether null is a value of its own; otherwise it means `if_null`, or the default. `aliases` are read, not
    written.
    `means` replaces values that the type reads as others.
    """

    name: str
    default: Any
    null: bool = False
    aliases: tuple[str, ...] = ()
    means: Mapping[Any, Any] = field(default_factory=dict)
    if_null: Callable[[Config], Any] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def read(self, config: Config) -> Any:
        for key in self.keys:
            if key in config and (self.null or config[key] is not None):
                value = config[key]
                return self.means.get(value, value) if self.means else value
        if self.if_null is not None and self.name in config:
            return self.if_null(config)
        return self.default(config) if callable(self.default) else self.default

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        return {self.name: value}


def whole_number(config: Config, key: str) -> int:
    """Return a count that the config must hold. Raises CheckpointError."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a whole number")
    return value


def heads(config: Config) -> int:
    return whole_number(config, "num_attention_heads")


def even_head_dim(config: Config) -> int:
    """Return the width of a head where no key says it."""
    return whole_number(config, "hidden_size") // heads(config)


class Rotary(NamedTuple):
    """Rotary position embedding: base, share of each head that is rotated, everything else as the config has it."""

    theta: float
    fraction: float
    rules: Mapping[str, Any]


# A window that stands for none, where a type cannot do without.
BOUNDLESS = 1 << 20

# The rule that multiplies queries beyond the original context; it has a trait of its own.
QUERY_SCALING = "llama_4_scaling_beta"


@dataclass(frozen=True)
class Rope:
    """`rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5), whichever the config has.

    `fraction` is the default of `partial_rotary_factor`; None where the code always rotates whole heads. `rules` are
    the parameters of a config that has none. `by_layer_type`: `rope_parameters` is keyed by layer type, and the full
    layers' entry counts. `also_theta`: the type keeps `rope_theta` beside `rope_parameters`.
    """

    theta: float = 10000.0
    fraction: float | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)
    by_layer_type: bool = False
    also_theta: bool = False

    keys = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")

    def read(self, config: Config) -> Rotary:
        given = config.get("rope_parameters") or config.get("rope_scaling")
        rules = given or self.rules
        if self.by_layer_type and isinstance(rules.get("full_attention"), Mapping):
            rules = rules["full_attention"]
        rules = copy.deepcopy(dict(rules))
        # A type's own rules come with its own base.
        theta = rules.pop("rope_theta", config.get("rope_theta") if given or not self.rules else None)
        fraction = rules.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        rules.pop(QUERY_SCALING, None)
        default = 1.0 if self.fraction is None else self.fraction
        return Rotary(
            float(self.theta if theta is None else theta), float(default if fraction is None else fraction), rules
        )

    def write(self, value: Rotary, traits: Traits, config: Config) -> dict[str, Any]:
        if self.fraction is None and value.fraction != 1.0:
            raise ConflictError(f"{value.fraction:g} of each head here, always whole heads there")
        partial = {} if self.fraction is None else {"partial_rotary_factor": value.fraction}
        if "rope_parameters" in config:
            rules: dict[str, Any] = {**value.rules, "rope_theta": value.theta, **partial}
            if self.by_layer_type:
                rules = {"full_attention": rules, "sliding_attention": dict(rules)}
            return {"rope_parameters": rules, **({"rope_theta": value.theta} if self.also_theta else {})}
        return {"rope_theta": value.theta, "rope_scaling": dict(value.rules) or None, **partial}


@dataclass(frozen=True)
class QueryScaling:
    """Queries are multiplied by 1 + beta log(1 + floor(position / original context)): 0 where that has no effect."""

    original: int  # the default original context
    context: int  # the default context

    keys = ()

    def read(self, config: Config) -> float:
        rules = config.get("rope_parameters") or config.get("rope_scaling")
        beta = 0.1 if rules is None else rules.get(QUERY_SCALING) or 0.0
        start = (rules or {}).get("original_max_position_embeddings") or self.original
        longest = config.get("max_position_embeddings") or self.context
        return 0.0 if longest <= start else float(beta)

    def write(self, value: Any, traits: Traits, config: Config) -> dict[str, Any]:
        raise NotImplementedError("no type to be written has it")


class Layer(NamedTuple):
    """How one layer mixes positions: by what, through which window (None: all before), with RoPE or without."""

    window: int | None = None
    rope: bool = True
    mixer: str = "attention"


Layers = tuple[Layer, ...]


def count_layers(config: Config) -> int:
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
        return (Layer(),) * count_layers(config)

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
        return (Layer(window),) * count_layers(config)

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
        found = []
        for i in range(count_layers(config)):
            sliding = types[i] == "sliding_attention" if types else window is not None and self.slides(config, i)
            found.append(Layer(window if sliding else None, rope=sliding or not self.rope_when_sliding))
        return tuple(found)

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
        found = []
        for i in range(count_layers(config)):
            rope = bool(flags[i]) if flags else (i + 1) % interval != 0
            kind = types[i] if types else _KIND_BY_ROPE[self.chunked, rope]
            mixer = "chunked attention" if kind == "chunked_attention" else "attention"
            found.append(Layer(window if kind == "sliding_attention" else None, rope, mixer))
        return tuple(found)

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
        return tuple(Layer(None, rope, "attention" if n in ("full_attention", "attention") else n) for n in names)

    def write(self, value: Layers, traits: Traits, config: Config) -> dict[str, Any]:
        if any(layer.window is not None or not layer.rope for layer in value):
            raise ConflictError("windows or layers without position embedding here, none there")
        return {
            "layer_types": [self.attention if layer.mixer == "attention" else layer.mixer for layer in value],
            **({self.rope_if[0]: self.rope_if[1]} if self.rope_if else {}),
        }
