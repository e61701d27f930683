"""The weights of routed experts as matrices [out, in]: what they take in the forms that `convert --quantize` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from moesurgery.families.anatomy import Anatomy, BlockTensor, HasShape
from moesurgery.families.family import Layout
from moesurgery.plan.written_forms import LEAST_SIZE, WrittenForm

_OF_AN_ENTRY = 100  # bytes of a header that a tensor takes beside its name, at most


class ExpertMatrix(NamedTuple):
    """A size of matrices [out, in] of routed experts; `neurons` is the axis along which theirs are, None for none.

    `name` is the longest name that one has without its ending, `alone` whether each is a tensor already.
    """

    out: int
    into: int
    neurons: int | None
    name: int
    alone: bool

    def resized(self, width: float) -> tuple[int, int]:
        """Return out and in with this share of the neurons."""
        out, into = (round(n * width) if axis == self.neurons else n for axis, n in enumerate((self.out, self.into)))
        return out, into


def expert_matrices(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> Counter[ExpertMatrix]:
    """Return how many plain matrices of each size the routed experts have, gate and up apart."""
    found: Counter[ExpertMatrix] = Counter()
    for block in anatomy.blocks:
        longest = len(f"{block.where}..{block.experts}") + max(
            (len(part.path) for layout in _layouts(anatomy, block.of) for part in layout.parts), default=0
        )
        for member in block.members:
            if member.part is None or not member.stem.main:
                continue
            shape = tensors[member.name].shape
            if len(shape) < 2:
                continue
            out, into = _matrix(member, shape, block.experts)
            halves = 2 if member.role == "gate_up" else 1
            neurons = {"gate": 0, "up": 0, "gate_up": 0, "down": 1}.get(member.role)
            count = halves * (block.experts if member.expert is None else 1)
            found[ExpertMatrix(out // halves, into, neurons, longest, member.expert is not None)] += count
    return found


def _layouts(anatomy: Anatomy, of: object) -> tuple[Layout, ...]:
    family = anatomy.settings.family
    return getattr(of, "layouts", None) or family.layouts


def _matrix(member: BlockTensor, shape: tuple[int, ...], experts: int) -> tuple[int, int]:
    """Return outputs and inputs of one expert's weight."""
    assert member.part is not None
    rows, columns = shape[-2] // (experts if member.part.rows else 1), shape[-1]
    return (rows, columns) if member.part.order == "oi" else (columns, rows)


def can_be_quantised(anatomy: Anatomy, matrices: Mapping[ExpertMatrix, int], name: str, form: WrittenForm) -> bool:
    """Whether the experts can be stored in a form at some width: as linear layers whose inputs divide into its groups,
    one by one, or in gpt-oss' own form."""
    own = name == "mxfp4" and anatomy.settings.family.name == "gpt_oss"
    alone = all(
        any(layout.kind == "per-expert" for layout in (block.layout, *_layouts(anatomy, block.of)) if layout)
        for block in anatomy.blocks
    )
    return (own or alone) and all(
        (m.neurons == 1 or not m.into % form.group) and min(m.out, m.into) >= LEAST_SIZE for m in matrices
    )


def takes_width(form: WrittenForm, width: int) -> bool:
    """Whether down-projections with as many inputs can be stored in a form."""
    return width % form.group == 0 and width >= LEAST_SIZE


def quantised_bytes(matrices: Mapping[ExpertMatrix, int], form: WrittenForm, width: float) -> int:
    """Return the bytes of all matrices in a form, with this share of their neurons."""
    return sum(count * form.nbytes(*matrix.resized(width)) for matrix, count in matrices.items())


def added_header_bytes(matrices: Mapping[ExpertMatrix, int], form: WrittenForm) -> int:
    """Return how many bytes the headers grow by at most: each matrix becomes several tensors."""
    total = 0
    for matrix, count in matrices.items():
        entries = [matrix.name + len(end) + _OF_AN_ENTRY for end in form.stored(matrix.out, matrix.into)]
        total += count * (sum(entries) - (entries[0] - len(form.main) if matrix.alone else 0))
    return total
