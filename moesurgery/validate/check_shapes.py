"""C02: the shapes that follow from the config, by the family table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.components import NORM
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.check_vocabulary import embedding_of, head_of
from moesurgery.validate.context import Context

# Norms of the hidden state; those inside attention have other widths.
_HIDDEN_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
_LATENT_KEYS = ("moe_latent_size", "moe_hidden_size")


@check("C02")
def shapes(subject: Context) -> Outcome:
    """Embedding, head and norms have the hidden size; experts take it, and are as wide as the config says."""
    if problem := subject.malformed("hidden"):
        yield finding("C02", problem, CONFIG)
    hidden = subject.setting("hidden")
    if hidden is None:
        yield NotChecked(("C02",), "config.json names no hidden size")
        return
    vocabulary = (embedding_of(subject), head_of(subject))
    wrong: dict[str, list[str]] = {}
    for name, component in subject.anatomy.component.items():
        info = subject.tensors[name]
        if info.dtype not in PLAIN_FLOATS:
            continue
        if name in vocabulary:
            fits = info.shape[1] == hidden
        elif component == NORM and name.endswith(_HIDDEN_NORMS):
            fits = info.shape == (hidden,)
        else:
            continue
        if not fits:
            wrong.setdefault(name_template(name)[0], []).append(name)
    for names in wrong.values():
        shape = list(subject.tensors[names[0]].shape)
        yield finding("C02", f"has shape {shape}; the hidden size is {hidden}" + and_more(names), tensor=names[0])
    stated = set(_numbers(subject.config))
    for block in subject.whole_blocks:
        yield from _experts(subject, block, hidden, stated)


def _experts(subject: Context, block: MoeBlock, hidden: int, stated: set[int]) -> Iterator[Finding]:
    """Gate, up and down of a block fit each other and the config."""
    outer: dict[str, int] = {}  # the width of the hidden state, by projection
    inner: dict[str, int] = {}  # the width of an expert
    for member in block.members:
        info, part = subject.tensors[member.name], member.part
        if part is None or not member.stem.main or info.dtype not in PLAIN_FLOATS or len(info.shape) < 2:
            continue
        if member.expert is None and len(info.shape) == 2 and not part.rows:
            continue  # experts that are one vector each
        out, into = info.shape[-2:] if part.order == "oi" else (info.shape[-1], info.shape[-2])
        if part.rows:  # blocks of [I, H] whatever the projection does with them
            inner[part.role], outer[part.role] = info.shape[0] // block.experts, info.shape[1]
        elif part.role == "down":
            inner[part.role], outer[part.role] = into, out
        else:
            inner[part.role], outer[part.role] = out // 2 if part.role == "gate_up" else out, into
    if len(set(inner.values())) > 1 or len(set(outer.values())) > 1:
        shown = ", ".join(f"{role} {inner[role]} by {outer[role]}" for role in sorted(inner))
        yield finding("C02", f"{block.where}: the experts' projections do not fit each other: {shown}")
        return
    latent = {part.get(key) for part in subject.anatomy.settings.sections() for key in _LATENT_KEYS}
    for width in set(outer.values()) - {hidden, *latent}:
        yield finding("C02", f"{block.where}: the experts take {width} inputs; the hidden size is {hidden}")
    if "attention" in block.where:
        return  # experts of attention are as wide as heads times channels
    for width in set(inner.values()) - stated:
        yield finding("C02", f"{block.where}: the experts are {width} wide, which config.json nowhere says")


def _numbers(value: Any) -> Iterator[int]:
    """Yield every whole number in a config: the keys of an expert's width are too many to name."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif type(value) is int:
        yield value
