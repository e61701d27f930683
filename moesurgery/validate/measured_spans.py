"""Every tensor of a checkpoint with what it is and what one pass over its bytes says of it."""

from __future__ import annotations

from dataclasses import dataclass

from moesurgery.checkpoint.header import TensorInfo
from moesurgery.cpu_count import cores
from moesurgery.families.anatomy import BlockTensor
from moesurgery.validate.context import Context
from moesurgery.validate.tensor_statistics import Span, Statistics, survey

_PART = 8 << 20


@dataclass(frozen=True)
class MeasuredSpan:
    """A span, what it is, and what was found in it."""

    span: Span
    member: BlockTensor | None
    component: str
    statistics: Statistics

    @property
    def where(self) -> str:
        return f"expert {self.span.expert} of " if self.span.expert is not None else ""


def measured_spans(subject: Context) -> list[MeasuredSpan]:
    """Read every weight once. Raises CheckpointError where one cannot be read."""
    members = {member.name: member for block in subject.whole_blocks for member in block.members}
    experts = {member.name: block.experts for block in subject.whole_blocks for member in block.members}
    spans: list[Span] = []
    for name, info in subject.tensors.items():
        member = members.get(name)
        count = experts[name] if member is not None and member.part is not None and member.axis == 0 else 0
        spans += _spans(info, count)
    threads = min(4, cores())
    surveyed = survey(subject.source, spans, subject.progress, threads)
    component = subject.anatomy.component
    return [
        MeasuredSpan(span, members.get(span.info.name), component[span.info.name], statistics)
        for span, statistics in zip(spans, surveyed, strict=True)
    ]


def _spans(info: TensorInfo, experts: int) -> list[Span]:
    """Cut stacked experts apart where they are whole bytes; leave everything else in one piece."""
    if not experts or len(info.shape) < 2 or info.shape[0] % experts or info.nbytes % experts:
        return [Span(info, None, info.start, info.nbytes)]
    size = info.nbytes // experts
    return [Span(info, e, info.start + e * size, size) for e in range(experts)]


def same_bytes(subject: Context, a: Span, b: Span) -> bool:
    """Whether two spans hold the same bytes."""
    if a.nbytes != b.nbytes:
        return False
    for at in range(0, a.nbytes, _PART):
        length = min(_PART, a.nbytes - at)
        mine = subject.source.read(a.info.file, a.start + at, length)
        if mine != subject.source.read(b.info.file, b.start + at, length):
            return False
    return True
