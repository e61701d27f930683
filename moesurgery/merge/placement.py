"""Which tensors the output has, and which layer of which slice each of them comes from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from moesurgery.errors import RefusedError, at_line
from moesurgery.merge.recipe.stage import Stage
from moesurgery.merge.sources import MergeSource, MergeSources, OutputPosition
from moesurgery.moe.canonical_names import StoredTensor


class Placement:
    """The tensors of a stage's output in order. Raises RefusedError where a source lacks one or has one more."""

    def __init__(self, stage: Stage, sources: MergeSources) -> None:
        self.stage, self.sources = stage, sources

    @cached_property
    def tensors(self) -> list[tuple[str, StoredTensor, OutputPosition]]:
        """The name of each tensor, the tensor whose form it takes, and its position."""
        return list(self._stacked() if self.stage.stacked else self._whole())

    @cached_property
    def stack(self) -> list[tuple[int, int, float]]:
        """The layers of a stacked output: slice, layer within it, and how far along it that is."""
        layers = []
        for index, part in enumerate(self.stage.slices):
            first, last = part.inputs[0].layers or (0, 0)
            count = last - first
            layers += [(index, i, i / (count - 1) if count > 1 else 1.0) for i in range(count)]
        return layers

    @property
    def left_out(self) -> list[int]:
        """The layers for multi-token prediction, which belong to the old stack and not to a new one."""
        donor = self.sources.donor
        return [layer for layer in donor.by_layer if layer is not None and layer >= donor.layers]

    def _whole(self) -> Iterator[tuple[str, StoredTensor, OutputPosition]]:
        donor = self.sources.donor
        (sources,) = self.sources.by_slice
        for source in sources:
            for layer in donor.paths.keys() | source.parts.paths.keys():
                self._same(layer, donor.paths.get(layer, frozenset()), source, layer)
        for name, holder in donor.tensors.items():
            yield name, holder, self._position(holder)

    def _stacked(self) -> Iterator[tuple[str, StoredTensor, OutputPosition]]:
        donor = self.sources.donor
        outside = donor.by_layer.get(None, [])
        for source in (source for of_slice in self.sources.by_slice for source in of_slice):
            self._same(None, donor.paths.get(None, frozenset()), source, None)
        first = next((i for i, name in enumerate(donor.tensors) if donor.tensors[name].layer is not None), 0)
        before = set(list(donor.tensors)[:first])
        for holder in outside:
            if holder.name in before:
                yield holder.name, holder, self._position(holder)
        forms = {donor.paths[layer]: held for layer, held in reversed(donor.by_layer.items())}
        for number, (index, offset, t) in enumerate(self.stack):
            lead = self.sources.lead(index)
            layer = lead.first + offset
            wanted = lead.parts.paths[layer]
            for source in self.sources.by_slice[index]:
                self._same(number, wanted, source, source.first + offset)
            held = donor.by_layer[layer] if lead.parts is donor else forms.get(wanted, lead.parts.by_layer[layer])
            for holder in held:
                yield donor.name_of(number, holder.rest), holder, OutputPosition(index, offset, number, t)
        for holder in outside:
            if holder.name not in before:
                yield holder.name, holder, self._position(holder)

    def _position(self, holder: StoredTensor) -> OutputPosition:
        """Return the position of a tensor outside of a stack; what comes before the layers is the first slice's."""
        donor = self.sources.donor
        if holder.layer is None:
            after = donor.anatomy.component[holder.name] in ("norm", "head")
            return OutputPosition(len(self.stage.slices) - 1 if after else 0, None, None, 0.0)
        t = min(holder.layer / (donor.layers - 1), 1.0) if donor.layers > 1 else 1.0
        return OutputPosition(0, holder.layer, holder.layer, t)

    def _same(self, layer: int | None, wanted: frozenset[str], source: MergeSource, theirs: int | None) -> None:
        """Refuse where a source lacks a part of the output, or has one that the output would not."""
        have = source.parts.paths.get(theirs, frozenset())
        if have == wanted:
            return
        missing, extra = sorted(wanted - have), sorted(have - wanted)
        where = f"layer {theirs}: " if theirs is not None else ""
        if layer is None and missing == ["lm_head.weight"] and not extra:
            hint = "its output is tied to the embedding; `dense` models of both kinds do not merge"
        elif layer is not None and layer >= self.sources.donor.layers:
            hint = "`slices:` with all layers of both leave out the layers for multi-token prediction"
        else:
            hint = "only models with the same parts merge: the same number of experts, biases, shared experts"
        message = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which would be dropped"
        rest = len(missing or extra) - 1
        with at_line(self.sources.origin, source.line):
            raise RefusedError(
                f"{source.parts.label}: {where}{message}" + (f" (and {rest} more)" if rest else ""), hint
            )
