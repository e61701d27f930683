"""V: the weights themselves, from one streaming pass (`statistics`), and the few that must be compared in full."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from moesurgery.checkpoint.dtypes import BLOCKS, element_count
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.errors import CheckpointError
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.components import EMBEDDING, HEAD, NORM, OTHER, ROUTED, ROUTER, VISION
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.check_vocabulary import embedding_of, head_of, is_tied
from moesurgery.validate.context import Context
from moesurgery.validate.identical_weights import same_layers, twin_experts
from moesurgery.validate.measured_spans import MeasuredSpan, measured_spans, same_bytes
from moesurgery.validate.tensor_statistics import BLOCK, FLOAT_FORMATS, SHORTEST_RUN, Span

FAR = 100.0  # times the median of its siblings: what makes an expert an outlier in its layer
VERY_FAR = 1000.0  # what makes a tensor an outlier among the layers: norms and biases do vary
NEAR_OVERFLOW = {"F16": 60_000.0, "BF16": 1e30, "F32": 1e30}


@check("V01", "V02", "V03", "V04", "V05", "V07")
def values(subject: Context) -> Outcome:
    """Judge every tensor by itself and among its siblings."""
    try:
        measured = measured_spans(subject)
    except CheckpointError as error:
        yield finding("V01", f"the weights cannot be read: {error.message}", hint=error.hint)
        return
    for one in measured:
        yield from _not_finite(subject, one)
        yield from _zero(subject, one)
        yield from _stretches(subject, one)
    yield from twin_experts(subject, measured)
    yield from same_layers(subject, measured)
    yield from _outliers(subject, measured)
    yield from _tails(measured)
    parameters = subject.anatomy.parameters
    unknown = sorted(
        {j.span.info.dtype for j in measured if parameters[j.span.info.name]} - FLOAT_FORMATS.keys() - BLOCKS.keys()
    )
    unread = sorted({j.span.info.dtype for j in measured if j.statistics.unread})
    if unread:
        reason = f"the values of {', '.join(unread)} tensors: the package gguf is not there, or does not know them"
        yield NotChecked(("V04",), reason)
    if unknown:
        yield NotChecked(("V01", "V04"), f"the values of {', '.join(unknown)} tensors: packed, judged as bytes only")


def _not_finite(subject: Context, one: MeasuredSpan) -> Iterator[Finding]:
    statistics, name = one.statistics, one.span.info.name
    if statistics.nan or statistics.infinite:
        counts = [f"{n:,} {what}" for n, what in ((statistics.nan, "NaN"), (statistics.infinite, "infinities")) if n]
        severity: Severity | None = "warning" if name in subject.anatomy.buffers else None
        yield finding("V01", f"{one.where}it holds {' and '.join(counts)}", tensor=name, severity=severity)


def _zero(subject: Context, one: MeasuredSpan) -> Iterator[Finding]:
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


def _stretches(subject: Context, one: MeasuredSpan) -> Iterator[Finding]:
    """Zeros in part of a weight, unless they are whole rows: those may be meant (padding, pruning)."""
    info, statistics = one.span.info, one.statistics
    if statistics.zero or not subject.anatomy.parameters[info.name] or len(info.shape) < 2:
        return
    for start, stop in statistics.runs:
        first, last = one.span.start - info.start + start, one.span.start - info.start + stop
        if not _whole_rows(one, first, last):
            message = f"{one.where}it is zero from byte {first:,} to {last:,} of {info.nbytes:,}"
            yield finding("V05", message, info.file, info.name, hint=_WRITTEN_PARTLY)
            return


_WRITTEN_PARTLY = "copy or download the shard again: part of it was never written"


def _whole_rows(one: MeasuredSpan, first: int, last: int) -> bool:
    """Whether bytes `first:last` of a tensor are whole rows, as far as that is seen in blocks."""
    shape = one.span.info.shape
    row = one.span.info.nbytes // max(1, element_count(shape[:-1]))
    return row > 0 and first % row < BLOCK and -last % row < BLOCK


def _tails(measured: list[MeasuredSpan]) -> Iterator[Finding]:
    """Zeros from inside a weight to the end of its file, through whatever tensors come after it."""
    files: dict[str, list[MeasuredSpan]] = {}
    for one in measured:
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


def _outliers(subject: Context, measured: list[MeasuredSpan]) -> Iterator[Finding]:
    """Root mean square and largest value, against the median of the siblings."""
    groups: dict[str, list[MeasuredSpan]] = {}
    for one in measured:
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
        for what, of, bound in (("root mean square", "rms", far), ("largest value", "largest", 10 * far)):
            sized: list[tuple[MeasuredSpan, float]] = [(one, getattr(one.statistics, of)) for one in group]
            middle = median(size for _, size in sized)
            if middle <= 0:
                continue
            odd = [(one, size) for one, size in sized if size and not 1 / bound <= size / middle <= bound]
            if odd:
                (one, size), names = odd[0], [o.span.info.name for o, _ in odd]
                message = f"{one.where}its {what} is {size:.3g}, the median of its siblings {middle:.3g}"
                yield finding("V04", message + and_more(names), tensor=one.span.info.name)
                break


def _is_scale(one: MeasuredSpan) -> bool:
    """Whether it is the scale of an expert's quantised weight."""
    companion = one.member.stem.companion if one.member is not None else None
    return companion is not None and companion.kind in ("scale", "divisor")


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
