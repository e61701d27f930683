"""The models of a stage, opened: who gives names and layout, who is the base, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from moesurgery.errors import RecipeError, RefusedError, at_line
from moesurgery.families.quantised import without_quantisation
from moesurgery.merge.compatibility import config_differences, tokenizers_differ
from moesurgery.merge.recipe.parameter_values import ParameterValues
from moesurgery.merge.recipe.stage import LayerSlice, Stage
from moesurgery.merge.references import Models, split
from moesurgery.moe.canonical_names import CanonicalName, CanonicalTensors


@dataclass(frozen=True)
class OutputPosition:
    """Where a tensor of the output comes from: a slice, a layer within it, and how far along it that is."""

    slice: int
    offset: int | None  # None outside of layers
    layer: int | None  # of the output
    t: float


@dataclass(frozen=True)
class MergeSource:
    """One input of a slice."""

    reference: str
    parts: CanonicalTensors
    parameters: ParameterValues
    first: int  # the layer that the slice's first layer comes from
    line: int

    def key(self, path: str, position: OutputPosition) -> CanonicalName:
        """Return the key of a part of the output in this model."""
        return CanonicalName(None if position.offset is None else self.first + position.offset, path)


class MergeSources:
    """The inputs of a stage, slice by slice, in the order in which its method takes them."""

    def __init__(self, stage: Stage, models: Models, origin: str) -> None:
        self.stage, self.origin = stage, origin
        self._models = models
        self.by_slice = [self._opened_slice(part) for part in stage.slices]

    @cached_property
    def donor(self) -> CanonicalTensors:
        """The model whose names, layout, config and side files the output takes: the base, or the first."""
        return self.opened(self.stage.models[0])

    @cached_property
    def others(self) -> list[MergeSource]:
        """One source of every model but the donor."""
        sources = (source for slice_sources in self.by_slice for source in slice_sources)
        return list({s.reference: s for s in sources if s.parts is not self.donor}.values())

    @cached_property
    def parts(self) -> list[CanonicalTensors]:
        """All models, the donor first."""
        return [self.donor, *(source.parts for source in self.others)]

    def opened(self, reference: str) -> CanonicalTensors:
        """Return a model; its quantised weights as plain numbers, unless they are only put elsewhere."""
        plain = self.stage.method.name != "passthrough" or self.stage.dtype is not None or self._adapted
        return self._models.parts(reference, plain=plain)

    @cached_property
    def _adapted(self) -> bool:
        """Whether one of the models has an adapter on it, which is applied to numbers."""
        return any(split(model)[1] is not None for model in self.stage.models)

    def named(self) -> dict[str, CanonicalTensors]:
        """Return all models that the stage names, those for its tokenizer alone too, by reference."""
        models = {}
        for name in self.stage.models:
            with at_line(self.origin, self.stage.line_naming(name)):
                models[name] = self.opened(name)
        return models

    def lead(self, index: int) -> MergeSource:
        """Return the source of a slice that the output's form follows: the donor, or the first."""
        sources = self.by_slice[index]
        return next((s for s in sources if s.parts is self.donor), sources[0])

    def base(self, index: int) -> MergeSource | None:
        """Return the source of a slice that is its base model."""
        reference = self.stage.slices[index].base or self.stage.base
        return next((s for s in self.by_slice[index] if s.reference == reference), None)

    def disagreements(self) -> Iterator[tuple[int, str]]:
        """Yield, with its line, what config and tokenizer of the models disagree on; refuse models of another kind."""
        donor, stacked = self.donor, self.stage.stacked
        for source in self.others:
            parts = source.parts
            with at_line(self.origin, source.line):
                if parts.anatomy.model_type != donor.anatomy.model_type:
                    raise RefusedError(
                        f"{parts.label} is a {parts.anatomy.model_type}, {donor.label} a"
                        f" {donor.anatomy.model_type}: only models of one architecture merge"
                    )
                if not stacked and parts.layers != donor.layers:
                    raise RefusedError(
                        f"{parts.label} has {parts.layers} layers, {donor.label} {donor.layers}",
                        "`slices:` with `layer_range:` say which of them merge",
                    )
            configs = (without_quantisation(p.plan.config) for p in (donor, parts))
            differences = config_differences(*configs, stacked=stacked)
            if differences:
                yield source.line, f"config.json of {parts.label} disagrees, {donor.label}'s counts: {differences}"
            if self.stage.tokenizer is None and tokenizers_differ(donor.plan.checkpoint, parts.plan.checkpoint):
                yield (
                    source.line,
                    f"{parts.label} has another tokenizer than {donor.label}, whose is kept: the same row of the"
                    " embedding may stand for another token",
                )

    def _opened_slice(self, part: LayerSlice) -> list[MergeSource]:
        """Return the models of a slice in the order in which the method takes them, the base first or apart."""
        sources = []
        for entry in part.inputs:
            with at_line(self.origin, entry.line):
                parts = self.opened(entry.model)
                if entry.layers is not None and entry.layers[1] > parts.layers:
                    ends = f"layer_range ends at {entry.layers[1]}, but {entry.model} has {parts.layers} layers"
                    raise RecipeError(ends)
            first = entry.layers[0] if entry.layers else 0
            sources.append(MergeSource(entry.model, parts, entry.parameters, first, entry.line))
        base = part.base or self.stage.base
        if base is None:
            return sources
        if not self.stage.stacked and all(s.reference != base for s in sources):
            line = self.stage.line_of("base_model")
            with at_line(self.origin, line):
                sources.append(MergeSource(base, self.opened(base), {}, 0, line))
        if self.stage.method.base == "first":
            sources.sort(key=lambda s: s.reference != base)
        return sources
