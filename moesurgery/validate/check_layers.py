"""C07, C11, C12: the layers of the tensors and those of the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.families.layer_keys import DEPTH_LISTS, KEYED, LISTS
from moesurgery.families.moe_layers import moe_layers, positions, ranges
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.context import Context
from moesurgery.validate.prediction_layers import language_and_prediction_layers

TIES = "layer_tie_map"
_MOST_LAYERS = 100_000


@check("C07", "C11")
def layers(subject: Context) -> Outcome:
    """No layer is missing, none is left over."""
    if problem := subject.malformed("layers"):
        yield finding("C07", problem, CONFIG)
        return
    stated = subject.setting("layers")
    if stated is None:
        yield NotChecked(("C07",), "config.json names no number of layers")
        return
    yield from _described(subject, stated)
    predicting = language_and_prediction_layers(subject)
    plain, mtp = predicting.plain, predicting.numbers
    if not plain:
        yield NotChecked(("C07",), "the layers cannot be told from the tensors' names")
        return
    if stated > _MOST_LAYERS:
        yield finding("C07", f"config.json says {stated} layers; the tensors hold {len(plain)}", CONFIG)
        return
    check_ties = subject.config.get(TIES)
    wanted = {n for n in check_ties if type(n) is int} if isinstance(check_ties, list) else set(range(stated))
    if missing := sorted(wanted - plain - mtp):
        yield finding("C07", f"config.json says {stated} layers; there is no tensor of {ranges(missing)}", CONFIG)
    if extra := sorted(n for n in plain if n >= stated):
        yield finding("C07", f"config.json says {stated} layers; the tensors hold also {ranges(extra)}", CONFIG)
    settings = subject.anatomy.settings
    sparse, stored = moe_layers(settings), positions(settings, {block.layer for block in subject.anatomy.main_blocks})
    if sparse is not None and stored and sparse & plain != stored & plain:
        yield finding("C07", f"config.json makes layers {ranges(sparse)} MoE, the tensors {ranges(stored)}", CONFIG)
    behind = sorted(n for n in mtp if n >= stated)
    lacking = predicting.declared - len(behind)
    if lacking > 0 and not predicting.own_module:
        held = f"the tensors hold {ranges(behind)}" if behind else "no tensor belongs to one"
        message = f"names {predicting.declared} layers for multi-token prediction; {held}"
        hint = "`moesurgery mtp drop` makes the config true; `moesurgery mtp graft MODEL --from BASE` brings them back"
        yield finding("C07", message, CONFIG, hint=hint)
    if leftover := behind[max(predicting.declared, 0) :]:
        message = f"holds layers for multi-token prediction that {CONFIG} does not name: {ranges(leftover)}"
        yield finding("C11", message, hint="`moesurgery mtp drop`, or set num_nextn_predict_layers")
    elif predicting.own_module and predicting.declared <= 0:
        message = f"holds a module for multi-token prediction, `mtp`, that {CONFIG} does not name"
        yield finding("C11", message, hint="`moesurgery mtp drop`, or set num_nextn_predict_layers")


def _described(subject: Context, stated: int) -> Iterator[Finding]:
    """Lists that say what kind each layer is of must do so for all, objects keyed by layer for none that is not."""
    for part in subject.anatomy.settings.sections():
        for key in sorted(part.keys() & (LISTS | KEYED)):
            value = part[key]
            kinds = key in DEPTH_LISTS or key.endswith("layer_types")
            if isinstance(value, Mapping):
                beyond = [n for n in value if isinstance(n, str) and n.isdecimal() and int(n) >= stated]
                if beyond:
                    yield finding("C07", f"{key} speaks of layer {beyond[0]}; there are {stated} layers", CONFIG)
            elif kinds and isinstance(value, (list, str)) and 0 < len(value) < stated:
                yield finding("C07", f"{key} says of {len(value)} layers what they are; there are {stated}", CONFIG)


@check("C12")
def check_ties(subject: Context) -> Outcome:
    """`layer_tie_map` gives every position a source block, sources are their own, and only they are stored."""
    ties = subject.config.get(TIES)
    if ties is None:
        return
    if not isinstance(ties, list) or not ties or not all(type(n) is int and 0 <= n < len(ties) for n in ties):
        yield finding("C12", f"{TIES} is not a list of layer numbers", CONFIG)
        return
    stated = subject.setting("layers")
    if stated is not None and len(ties) != stated:
        yield finding("C12", f"{TIES} has {len(ties)} entries for {stated} layers", CONFIG)
    for position, source in enumerate(ties):
        if ties[source] != source:
            yield finding("C12", f"{TIES}: position {position} takes {source}, which takes {ties[source]}", CONFIG)
    excluded = subject.config.get("layer_tie_exclude")
    own = [word for word in excluded if isinstance(word, str)] if isinstance(excluded, list) else []
    twice = [
        name
        for name, layer in subject.anatomy.layer.items()
        if layer < len(ties) and layer not in ties and not any(word in name for word in own)
    ]
    if twice:
        message = "is stored although its layer is tied to another: loaders untie them" + and_more(twice)
        yield finding("C12", message, tensor=twice[0])
