"""A stack of which several positions run one block: whether they can, and the tensors that they then have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import mean
from moesurgery.families.layer_config import layer_settings
from moesurgery.families.layer_stack import Stack
from moesurgery.moe.expert_axis import Entries
from moesurgery.plan.plan import Plan
from moesurgery.surgery.tie_blocks.distances import Compared
from moesurgery.surgery.tie_blocks.schemes import TIE_BLOCKS, TieScheme


@dataclass(frozen=True)
class TiedStack:
    """An arrangement of the blocks of one model; `apart` are texts in the names of tensors that are not shared."""

    plan: Plan
    stack: Stack
    arrangement: TieScheme
    apart: Sequence[str]

    def shared(self, inside: str) -> bool:
        return not any(text in inside for text in self.apart)

    def check(self) -> None:
        """Refuse blocks that cannot take each other's place: other tensors, other shapes, another kind of layer."""
        settings = self.plan.anatomy.settings
        tensors, blocks = self.plan.tensors, self.stack.blocks
        for position, old in enumerate(self.arrangement.own):
            for source in self.arrangement.sources[self.arrangement.tie_map[position]]:
                if source == old:
                    continue
                forms = [
                    {inside: (tensors[name].dtype, tensors[name].shape) for inside, name in blocks[block].items()}
                    for block in (source, old)
                ]
                different = sorted(i for i in forms[0].keys() | forms[1].keys() if forms[0].get(i) != forms[1].get(i))
                kinds = layer_settings(settings, source), layer_settings(settings, old)
                if different:
                    inside = different[0]
                    why = f"{inside} differs ({_form(forms[0], inside)}; {_form(forms[1], inside)})"
                elif kinds[0] != kinds[1]:
                    key = next(k for k in kinds[0].keys() | kinds[1].keys() if kinds[0].get(k) != kinds[1].get(k))
                    why = f"{key} says {kinds[1].get(key)!r} of one and {kinds[0].get(key)!r} of the other"
                else:
                    continue
                raise RefusedError(
                    f"{TIE_BLOCKS}: block {old} cannot run with the weights of block {source}: {why}",
                    "choose groups of blocks of one kind, with --blocks if no scheme has them",
                )

    def weights(self, source: int, inside: str) -> Expr:
        """Return what the positions of a group share."""
        parts = [self.plan.tensors[self.stack.blocks[block][inside]] for block in self.arrangement.sources[source]]
        if len(parts) > 1 and parts[0].dtype not in PLAIN_FLOATS:
            raise RefusedError(
                f"{TIE_BLOCKS}: {inside} is quantised ({parts[0].dtype}): its average has no exact form",
                "use --init first, or dequantise first with `moesurgery convert --dequantize`",
            )
        return mean(parts)

    def entries(self, *, everywhere: bool) -> Entries:
        """Return what takes the place of each block's tensors: those of its positions, tied ones only `everywhere`."""
        entries: Entries = {}
        for old, names in self.stack.blocks.items():
            if old >= self.stack.depth:
                continue
            positions = [i for i, block in enumerate(self.arrangement.own) if block == old]
            for inside, name in names.items():
                replacements = []
                for position in positions:
                    source = self.arrangement.tie_map[position]
                    if not self.shared(inside):
                        replacements.append((self.stack.name(position, inside), self.plan.tensors[name]))
                    elif everywhere or source == position:
                        replacements.append((self.stack.name(position, inside), self.weights(source, inside)))
                entries[name] = replacements
        return entries

    def compared(self) -> list[Compared]:
        """Return each shared tensor whose weights come from other blocks than its own, with those."""
        pairs: list[Compared] = []
        for position, old in enumerate(self.arrangement.own):
            sources = self.arrangement.sources[self.arrangement.tie_map[position]]
            if sources == (old,):
                continue
            for inside, name in self.stack.blocks[old].items():
                if self.shared(inside):
                    others = [self.plan.tensors[self.stack.blocks[block][inside]] for block in sources]
                    pairs.append((inside, position, self.plan.tensors[name], others))
        return pairs


def _form(forms: Mapping[str, Any], inside: str) -> str:
    return f"{forms[inside][0]} {list(forms[inside][1])}" if inside in forms else "absent"
