"""What one document of a merge recipe asks for, once it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesurgery.merge.compute.method import Method
from moesurgery.merge.recipe.parameter_values import ParameterValues
from moesurgery.merge.recipe.tokenizer_config import TokenizerConfig


@dataclass(frozen=True)
class Input:
    """One model of a slice; `layers` are None where all are taken."""

    model: str
    layers: tuple[int, int] | None
    parameters: ParameterValues
    line: int


@dataclass(frozen=True)
class LayerSlice:
    """Layers of the output that are made of the same layers of the inputs. `parameters` are the slice's own."""

    inputs: tuple[Input, ...]
    base: str | None
    parameters: ParameterValues
    line: int


@dataclass(frozen=True)
class Stage:
    """One document. `stacked`: it lists slices, so the number of layers may change.

    `align`: what of the other models is put in the order of the base's: "experts", "neurons". `references`: the
    models that `value`, the document as data, names, by the path there.
    """

    name: str | None
    method: Method
    slices: tuple[LayerSlice, ...]
    stacked: bool
    base: str | None
    parameters: ParameterValues
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
    references: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All models that the stage names, in the order in which it does, the base first."""
        models = [] if self.base is None else [self.base]
        for part in self.slices:
            models += [entry.model for entry in part.inputs] + ([part.base] if part.base else [])
        if self.tokenizer is not None:
            token_sources = [s.model for s in self.tokenizer.tokens.values() if s and s.model]
            models += [m for m in (self.tokenizer.source, *token_sources) if m not in ("base", "union")]
        return list(dict.fromkeys(models))

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)

    @property
    def tokenizer_line(self) -> int:
        return self.line_of("tokenizer" if "tokenizer" in self.lines else "tokenizer_source")

    def line_naming(self, model: str) -> int:
        """Return the line of the document's key under which a model is named first."""
        return self.line_of(next(str(path[0]) for path, text in self.references.items() if text == model))
