"""What one document of a merge recipe asks for, once it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesurgery.merge.compute.method import Method
from moesurgery.merge.recipe.parameter_values import ParameterValues
from moesurgery.merge.recipe.tokenizer_config import TokenizerConfig

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class Input:
    """One model of a slice; `layers` are None where all are taken."""

    model: str
    layers: tuple[int, int] | None
    settings: ParameterValues
    line: int


@dataclass(frozen=True)
class LayerSlice:
    """Layers of the output that are made of the same layers of the inputs. `settings` are the slice's own."""

    inputs: tuple[Input, ...]
    base: str | None
    settings: ParameterValues
    line: int


@dataclass(frozen=True)
class Stage:
    """One document. `stacked`: it lists slices, so the number of layers may change.

    `align`: what of the other models is put in the order of the base's: "experts", "neurons". `places`: where in
    `value`, the document as data, models are named, and how.
    """

    name: str | None
    method: Method
    slices: tuple[LayerSlice, ...]
    stacked: bool
    base: str | None
    settings: ParameterValues
    dtype: str | None = None
    granularity: Literal["expert", "tensor"] = "expert"
    align: frozenset[str] = frozenset()
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    seed: int = 0
    line: int = 1
    lines: dict[str, int] = field(default_factory=dict)
    warnings: tuple[tuple[int, str], ...] = ()
    value: dict[str, Any] = field(default_factory=dict)
    places: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All models that the stage names, in the order in which it does, the base first."""
        found = [] if self.base is None else [self.base]
        for part in self.slices:
            found += [entry.model for entry in part.inputs] + ([part.base] if part.base else [])
        if self.tokenizer is not None:
            wishes = [wish.model for wish in self.tokenizer.tokens.values() if wish and wish.model]
            found += [m for m in (self.tokenizer.source, *wishes) if m not in ("base", "union")]
        return list(dict.fromkeys(found))

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)

    @property
    def tokenizer_line(self) -> int:
        return self.line_of("tokenizer" if "tokenizer" in self.lines else "tokenizer_source")

    def line_naming(self, model: str) -> int:
        """Return the line of the document's key under which a model is named first."""
        return self.line_of(next(str(path[0]) for path, text in self.places.items() if text == model))
