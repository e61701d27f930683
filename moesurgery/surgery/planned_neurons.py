"""What a plan file says of neurons: read for one checkpoint, and checked against its stored form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.escape import one_line
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.components import MTP
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import neuron_count
from moesurgery.plan.plan import Plan
from moesurgery.stats.plan_file import LayerPlan, PlanFile
from moesurgery.surgery.choose_neurons import Kept, Slimmed, in_whole_blocks
from moesurgery.surgery.planned_experts import about_plan, other_command

_NAME = "slim-experts"


@dataclass(frozen=True)
class PlannedNeurons:
    """The neurons that a plan keeps by block, the numbers of them that `slimmed_blocks` takes, and what records say."""

    file: PlanFile
    kept: Mapping[str, Kept]
    width: int | None
    shared: int | None
    dense: int | None
    warnings: tuple[str, ...]
    about: Mapping[str, Any]

    def of(self, plan: Plan, slimmed: Mapping[str, Slimmed]) -> dict[str, Kept]:
        """Return the neurons of the blocks that lose some; prediction layers that the plan leaves out are not there.

        Raises RefusedError for another block that is left out, and for neurons that are not there or go together.
        """
        for where, entry in slimmed.items():
            if where in self.kept:
                self._check(where, entry, neuron_count(entry.block, plan.tensors))
            elif any(plan.anatomy.component[member.name] != MTP for member in entry.block.members):
                raise RefusedError(
                    f"{_NAME}: {self.file.path} says nothing of {where}, which gets another width too",
                    "name every block whose width is the same number in config.json",
                )
        return {where: self.kept[where] for where in slimmed if where in self.kept}

    def _check(self, where: str, slimmed: Slimmed, neurons: int) -> None:
        for expert, own in enumerate(self.kept[where]):
            named = f"{self.file.path}: expert {expert} of {where}"
            if len(own) != slimmed.width or own != sorted(set(own)):
                raise RefusedError(
                    f"{_NAME}: {named} keeps {len(own)} neurons, the first of them all {slimmed.width}; each is named"
                    " once, in ascending order"
                )
            if own[-1] >= neurons:
                raise RefusedError(f"{_NAME}: {named} keeps neuron {own[-1]}, there are {neurons}")
            if not in_whole_blocks(own, slimmed.size):
                raise RefusedError(
                    f"{_NAME}: {named} does not keep whole blocks of {slimmed.size} neurons, which share a scale or a"
                    " word here",
                    "make the plan on this copy: it is for the plain one too; or dequantise first with `moesurgery"
                    " convert --dequantize`",
                )


def planned_neurons(plan: Plan, file: PlanFile) -> PlannedNeurons:
    """Return the neurons that a plan keeps of a model.

    Raises RefusedError where the plan is for another model, or says nothing of neurons, or not of all experts.
    """
    anatomy = plan.anatomy
    warning = file.check(plan, _NAME)
    routed = {block.where: block for block in anatomy.blocks}
    beside, apart = shared_experts(anatomy, plan.tensors), dense_ffns(anatomy, plan.tensors)
    named = {where: entry for where, entry in file.by_block(anatomy, _NAME).items() if entry.neurons is not None}
    if not named and not file.ffns:
        raise RefusedError(f"{_NAME}: {file.path} says nothing of neurons", other_command(file))
    for where in file.ffns:
        if where not in beside and where not in apart:
            raise RefusedError(
                f"{_NAME}: {file.path} speaks of {one_line(repr(where), 80)}, which is no FFN of this model"
            )
    blocks = {**routed, **beside, **apart}
    kept = {w: _by_expert(file, blocks[w], w, entry) for w, entry in {**named, **file.ffns}.items()}
    family = anatomy.settings.family
    of_shared = None if family.shared_width == "" else _first(kept, beside)
    of_dense = None if family.dense_width in family.width_keys else _first(kept, apart)
    warnings = () if warning is None else (warning,)
    return PlannedNeurons(file, kept, _first(kept, routed), of_shared, of_dense, warnings, about_plan(file))


def _first(kept: Mapping[str, Kept], blocks: Mapping[str, MoeBlock]) -> int | None:
    """Return how many neurons the first of some blocks keeps; None where a plan says nothing of them."""
    return next((len(own[0]) for where, own in kept.items() if where in blocks), None)


def _by_expert(file: PlanFile, block: MoeBlock, where: str, entry: LayerPlan) -> list[list[int]]:
    neurons: Mapping[int, Sequence[int]] = entry.neurons or {}
    if sorted(neurons) != list(range(block.experts)) or not all(neurons.values()):
        raise RefusedError(
            f"{_NAME}: {file.path} does not name the neurons of each of the {block.experts} experts of {where}",
            "a plan is for checkpoints of one model, before its experts are cut",
        )
    return [list(neurons[expert]) for expert in range(block.experts)]
