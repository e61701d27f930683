"""V: the weights themselves, from one streaming pass (`statistics`), and the few that must be compared in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from moesurgery.checkpoint.dtypes import element_count
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.cpu_count import cores
from moesurgery.errors import CheckpointError
from moesurgery.families.anatomy import BlockTensor, model_type_of
from moesurgery.families.components import EMBEDDING, HEAD, NORM, OTHER, ROUTED, ROUTER, VISION
from moesurgery.families.moe_layers import ranges
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.check_vocabulary import embedding_of, head_of, is_tied
from moesurgery.validate.context import Context
from moesurgery.validate.tensor_statistics import BLOCK, FLOAT_FORMATS, SHORTEST_RUN, Span, Statistics, survey

FAR = 100.0  # times the median of its siblings: what makes an expert strange in its layer
VERY_FAR = 1000.0  # what makes a tensor strange among the layers: norms and biases do vary
NEAR_OVERFLOW = {"F16": 60_000.0, "BF16": 1e30, "F32": 1e30}
_PART = 8 << 20


@dataclass(frozen=True)
class Judged:
    """A span, what it is, and what was found in it."""

    span: Span
    member: BlockTensor | None
    component: str
    statistics: Statistics

    @property
    def where(self) -> str:
        return f"expert {self.span.expert} of " if self.span.expert is not None else ""


def survey_of(subject: Context) -> list[Judged]:
    """Read every weight once. Raises CheckpointError where one cannot be read."""
    members = {member.name: member for block in subject.whole_blocks for member in block.members}
    experts = {member.name: block.experts for block in subject.whole_blocks for member in block.members}
    spans: list[Span] = []
    for name, info in subject.tensors.items():
        member = members.get(name)
        count = experts[name] if member is not None and member.part is not None and member.axis == 0 else 0
        spans += _spans(info, count)
    threads = min(4, cores())
    found = survey(subject.source, spans, subject.progress, threads)
    component = subject.anatomy.component
    return [
        Judged(span, members.get(span.info.name), component[span.info.name], statistics)
        for span, statistics in zip(spans, found, strict=True)
    ]


def _spans(info: TensorInfo, experts: int) -> list[Span]:
    """Cut stacked experts apart where they are whole bytes; leave everything else in one piece."""
    if not experts or len(info.shape) < 2 or info.shape[0] % experts or info.nbytes % experts:
        return [Span(info, None, info.start, info.nbytes)]
    size = info.nbytes // experts
    return [Span(info, e, info.start + e * size, size) for e in range(experts)]


@check("V01", "V02", "V03", "V04", "V05", "V07")
def values(subject: Context) -> Outcome:
    """Judge every tensor by itself and among its siblings."""
    try:
        judged = survey_of(subject)
    except CheckpointError as error:
        yield finding("V01", f"the weights cannot be read: {error.message}", hint=error.hint)
        return
    for one in judged:
        yield from _not_finite(subject, one)
        yield from _zero(subject, one)
        yield from _stretches(subject, one)
    yield from _twins(subject, judged)
    yield from _same_layers(subject, judged)
    yield from _strange(subject, judged)
    yield from _tails(subject, judged)
    parameters = subject.anatomy.parameters
    unknown = sorted({j.span.info.dtype for j in judged if parameters[j.span.info.name]} - FLOAT_FORMATS.keys())
    if unknown:
        yield NotChecked(("V01", "V04"), f"the values of {', '.join(unknown)} tensors: packed, judged as bytes only")


def _not_finite(subject: Context, one: Judged) -> Iterator[Finding]:
    found, name = one.statistics, one.span.info.name
    if found.nan or found.infinite:
        counts = [f"{n:,} {what}" for n, what in ((found.nan, "NaN"), (found.infinite, "infinities")) if n]
        severity: Severity | None = "warning" if name in subject.anatomy.buffers else None
        yield finding("V01", f"{one.where}it holds {' and '.join(counts)}", tensor=name, severity=severity)


def _zero(subject: Context, one: Judged) -> Iterator[Finding]:
    """All zero: a norm, embedding or head silences the model, an expert or a router itself."""
    info = one.span.info
    if not one.statistics.zero or not one.span.nbytes or not subject.anatomy.parameters[info.name]:
        return
    if one.component in (EMBEDDING, HEAD) and len(info.shape) > 1:
        yield finding("V02", "is all zero", tensor=info.name)
    elif one.component == NORM and info.name.endswith("weight"):
        # Gemma's norms multiply by 1 + w: zero is where they start.
        from_one = subject.anatomy.settings.family.norm.kind == "rms1" or "gemma" in model_type_of(subject.config)
        yield finding("V02", "is all zero", tensor=info.name, severity="warning" if from_one else None)
    elif len(info.shape) > 1 and one.component not in (VISION, OTHER) and not info.name.endswith("bias"):
        yield finding("V02", f"{one.where}it is all zero", tensor=info.name, severity="warning")


def _stretches(subject: Context, one: Judged) -> Iterator[Finding]:
    """Zeros in part of a weight, unless they are whole rows: those may be meant (padding, pruning)."""
    info, found = one.span.info, one.statistics
    if found.zero or not subject.anatomy.parameters[info.name] or len(info.shape) < 2:
        return
    for start, stop in found.runs:
        first, last = one.span.start - info.start + start, one.span.start - info.start + stop
        if not _whole_rows(one, first, last):
            message = f"{one.where}it is zero from byte {first:,} to {last:,} of {info.nbytes:,}"
            yield finding("V05", message, info.file, info.name, hint=_WRITTEN_PARTLY)
            return


_WRITTEN_PARTLY = "copy or download the shard again: part of it was never written"


def _whole_rows(one: Judged, first: int, last: int) -> bool:
    """Whether bytes `first:last` of a tensor are whole rows, as far as that is seen in blocks."""
    shape = one.span.info.shape
    row = one.span.info.nbytes // max(1, element_count(shape[:-1]))
    return row > 0 and first % row < BLOCK and -last % row < BLOCK


def _tails(subject: Context, judged: list[Judged]) -> Iterator[Finding]:
    """Zeros from inside a weight to the end of its file, through whatever tensors come after it."""
    files: dict[str, list[Judged]] = {}
    for one in judged:
        files.setdefault(one.span.info.file, []).append(one)
    for file, spans in files.items():
        zeros = 0
        for one in reversed(spans):
            if one.statistics.zero:
                zeros += one.span.nbytes
                continue
            runs = [start for start, stop in one.statistics.runs if stop == one.span.nbytes]
            if runs and len(one.span.info.shape) > 1 and one.component not in (EMBEDDING, HEAD):
                zeros += one.span.nbytes - runs[0]
                offset = one.span.start - one.span.info.start
                rows = _whole_rows(one, offset + runs[0], offset + one.span.nbytes)  # else _stretches says so
                if rows and zeros >= SHORTEST_RUN:
                    message = f"{one.where}it is zero to its end, as is the rest of the file: {zeros:,} bytes"
                    yield finding("V05", message, file, one.span.info.name, hint=_WRITTEN_PARTLY)
            break


def _twins(subject: Context, judged: list[Judged]) -> Iterator[Finding]:
    """Experts of one layer that are the same, byte for byte. Equal fingerprints are compared in full."""
    spans: dict[tuple[str, int], list[Judged]] = {}
    shard_of = {member.name: block.where for block in subject.whole_blocks for member in block.members}
    for one in judged:
        if one.member is not None and one.member.part is not None and one.member.stem.main:
            number = one.span.expert if one.span.expert is not None else one.member.expert
            if number is not None:
                spans.setdefault((shard_of[one.span.info.name], number), []).append(one)
    layers: dict[str, dict[tuple[object, ...], list[int]]] = {}
    for (where, number), parts in spans.items():
        parts.sort(key=lambda one: (one.member.part.path, one.member.stem.suffix))  # type: ignore[union-attr]
        mark = tuple(one.statistics.fingerprint for one in parts)
        layers.setdefault(where, {}).setdefault(mark, []).append(number)
    for where, marks in layers.items():
        for numbers in marks.values():
            first = spans[where, numbers[0]]
            if all(one.statistics.zero for one in first):
                continue  # V02 says so
            same = [n for n in numbers[1:] if _equal(subject, first, spans[where, n])]
            if same:
                shown = ", ".join(map(str, [numbers[0], *same][:12]))
                yield finding("V03", f"{where}: experts {shown} are identical" + (", …" if len(same) > 11 else ""))


def _same_layers(subject: Context, judged: list[Judged]) -> Iterator[Finding]:
    """Layers that hold the same weights, as when a writer takes one for another."""
    layers: dict[tuple[str, int], list[Judged]] = {}
    for one in judged:
        name = one.span.info.name
        if (number := subject.anatomy.layer.get(name)) is not None:
            layers.setdefault((name.partition(f".{number}.")[0], number), []).append(one)
    marks: dict[tuple[object, ...], list[tuple[str, int]]] = {}
    for (stack, number), parts in layers.items():
        if not all(one.statistics.zero for one in parts):
            parts.sort(key=lambda one: (_within(one, number), one.span.start))
            contents = ((_within(one, number), one.statistics.fingerprint) for one in parts)
            marks.setdefault((stack, *contents), []).append((stack, number))
    for found in marks.values():
        first = layers[found[0]]
        same = [n for _, n in found[1:] if _equal(subject, first, layers[found[0][0], n])]
        if same:
            yield finding("V07", f"{found[0][0]}: layers {ranges([found[0][1], *same])} are identical")


def _within(one: Judged, layer: int) -> str:
    """Return the name of a tensor in its layer."""
    return one.span.info.name.partition(f".{layer}.")[2]


def _equal(subject: Context, first: list[Judged], second: list[Judged]) -> bool:
    return len(first) == len(second) and all(
        same_bytes(subject, a.span, b.span) for a, b in zip(first, second, strict=True)
    )


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


def _strange(subject: Context, judged: list[Judged]) -> Iterator[Finding]:
    """Root mean square and largest value, against the median of the siblings."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        name = one.span.info.name
        if not subject.anatomy.parameters[name] and not _is_scale(one):
            continue
        limit = NEAR_OVERFLOW.get(one.span.info.dtype)
        if limit is not None and one.statistics.largest > limit:
            message = f"{one.where}its largest value is {one.statistics.largest:.4g}, close to the end of the type"
            yield finding("V04", message, tensor=name)
        template, numbers = name_template(name)
        expert = one.component == ROUTED and numbers
        groups.setdefault(f"{template} {numbers[0] if expert else one.span.info.shape}", []).append(one)
    for group in groups.values():
        far = FAR if group[0].component in (ROUTED, ROUTER) and len(group[0].span.info.shape) > 1 else VERY_FAR
        if len(group) < 3:
            continue
        for what, of, bound in (("root mean square", _rms, far), ("largest value", _largest, 10 * far)):
            middle = median(of(one) for one in group)
            if middle <= 0:
                continue
            odd = [one for one in group if of(one) and not 1 / bound <= of(one) / middle <= bound]
            if odd:
                one, names = odd[0], [o.span.info.name for o in odd]
                message = f"{one.where}its {what} is {of(one):.3g}, the median of its siblings {middle:.3g}"
                yield finding("V04", message + and_more(names), tensor=one.span.info.name)
                break


def _is_scale(one: Judged) -> bool:
    """Whether it is the scale of an expert's quantised weight."""
    companion = one.member.stem.companion if one.member is not None else None
    return companion is not None and companion.kind in ("scale", "divisor")


def _rms(one: Judged) -> float:
    return one.statistics.rms


def _largest(one: Judged) -> float:
    return one.statistics.largest


@check("V06")
def tied_head(subject: Context) -> Outcome:
    """A stored head beside tied embeddings is the embedding."""
    embedding, output = embedding_of(subject), head_of(subject)
    if is_tied(subject) is not True or embedding is None or output is None:
        return
    a, b = subject.tensors[embedding], subject.tensors[output]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return  # C08 says so
    spans = (Span(info, None, info.start, info.nbytes) for info in (a, b))
    if not same_bytes(subject, *spans):
        message = "differs from the embedding that it is tied to: loaders keep one of the two and say nothing"
        yield finding("V06", message, tensor=output)
