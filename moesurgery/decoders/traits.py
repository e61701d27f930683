"""What a decoder computes around its FFNs, as config.json says it: the words of `architectures`.

A *trait* is one fact, such as whether q, k and v have biases, or the window of each layer. For each trait a type says
where its config keeps the value (a codec with keys) or what its code does whatever the config says (`Always`).
Reading a config as one type and writing the traits as another's is the config rewrite of a pair. A value that the
other type cannot hold is a conflict: it would be dropped silently, so the pair is refused.

Every value that a config leaves out is read with its own type's default and written down: what is absent would
otherwise get the default of the other type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moesurgery.errors import CheckpointError
from moesurgery.families.rope_keys import Config

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
class TraitChoice:
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
class TraitKey:
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
    """Return the number of attention heads. Raises CheckpointError where the config states none."""
    return whole_number(config, "num_attention_heads")


def even_head_dim(config: Config) -> int:
    """Return the width of a head where no key says it."""
    return whole_number(config, "hidden_size") // heads(config)
