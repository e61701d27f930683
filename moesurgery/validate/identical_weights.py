"""V03 and V07: experts of one layer, and layers, that hold the same weights, found by their fingerprints."""

from __future__ import annotations

from collections.abc import Iterator

from moesurgery.checkpoint.finding import Finding
from moesurgery.families.moe_layers import ranges
from moesurgery.validate.check import finding
from moesurgery.validate.context import Context
from moesurgery.validate.measured_spans import MeasuredSpan, same_bytes


def twin_experts(subject: Context, measured: list[MeasuredSpan]) -> Iterator[Finding]:
    """Experts of one layer that are the same, byte for byte. Equal fingerprints are compared in full."""
    spans: dict[tuple[str, int], list[MeasuredSpan]] = {}
    block_of = {member.name: block.where for block in subject.whole_blocks for member in block.members}
    for one in measured:
        if one.member is not None and one.member.part is not None and one.member.stem.main:
            number = one.span.expert if one.span.expert is not None else one.member.expert
            if number is not None:
                spans.setdefault((block_of[one.span.info.name], number), []).append(one)
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


def same_layers(subject: Context, measured: list[MeasuredSpan]) -> Iterator[Finding]:
    """Layers that hold the same weights, as when a writer takes one for another."""
    layers: dict[tuple[str, int], list[MeasuredSpan]] = {}
    for one in measured:
        name = one.span.info.name
        if (number := subject.anatomy.layer.get(name)) is not None:
            layers.setdefault((name.partition(f".{number}.")[0], number), []).append(one)
    marks: dict[tuple[object, ...], list[tuple[str, int]]] = {}
    for (stack, number), parts in layers.items():
        if not all(one.statistics.zero for one in parts):
            parts.sort(key=lambda one: (_within(one, number), one.span.start))
            contents = ((_within(one, number), one.statistics.fingerprint) for one in parts)
            marks.setdefault((stack, *contents), []).append((stack, number))
    for alike in marks.values():
        first = layers[alike[0]]
        same = [n for _, n in alike[1:] if _equal(subject, first, layers[alike[0][0], n])]
        if same:
            yield finding("V07", f"{alike[0][0]}: layers {ranges([alike[0][1], *same])} are identical")


def _within(one: MeasuredSpan, layer: int) -> str:
    """Return the name of a tensor in its layer."""
    return one.span.info.name.partition(f".{layer}.")[2]


def _equal(subject: Context, first: list[MeasuredSpan], second: list[MeasuredSpan]) -> bool:
    return len(first) == len(second) and all(
        same_bytes(subject, a.span, b.span) for a, b in zip(first, second, strict=True)
    )
