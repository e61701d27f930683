"""Which FFNs of a model get another width, and the config that says so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moesurgery.errors import RefusedError
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.config_keys import Settings, section, with_value
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import neuron_count, neurons_together
from moesurgery.plan.plan import Plan
from moesurgery.surgery.choose_experts import share_of
from moesurgery.surgery.choose_neurons import Slimmed

_NAME = "slim-experts"
Count = int | str | None  # of neurons: a number, or a share as "75%"


def slimmed_blocks(plan: Plan, width: Count, shared: Count, dense: Count) -> tuple[dict[str, Slimmed], dict[str, Any]]:
    """Return the blocks that lose neurons, by name, and the config with the new widths.

    `width`, `shared` and `dense` are how many neurons routed experts, shared experts and dense FFNs keep; None for all
    where they do not follow the others. Raises RefusedError where config.json cannot say so.
    """
    anatomy = plan.anatomy
    family, config = anatomy.settings.family, dict(plan.config)
    routed = {block.where: block for block in anatomy.blocks if block.of is None}
    beside, apart = shared_experts(anatomy, plan.tensors), dense_ffns(anatomy, plan.tensors)
    old = _common_width(plan, routed, "experts")
    kept = None if width is None else _counted(width, old, "width")
    slimmed: dict[str, Slimmed] = {}
    if kept is not None and kept != old:
        config = _with_width(anatomy.settings, family.width_keys, old, kept, "--width")
        slimmed |= _slimmed(plan, routed, old, kept)
        if family.shared_width == "" and beside:
            count = _common_width(plan, beside, "shared experts") / old
            if count != int(count):
                raise RefusedError(
                    f"{_NAME}: the shared experts are {count:g} times as wide as an expert, no whole number"
                )
            if shared is not None and _counted(shared, int(count) * old, "shared") != int(count) * kept:
                raise RefusedError(
                    f"{_NAME}: the shared experts of {family.name} are {int(count)} times as wide as a routed one",
                    "leave --shared out",
                )
            slimmed |= _slimmed(plan, beside, int(count) * old, int(count) * kept)
        if family.dense_width in family.width_keys and apart:
            slimmed |= _slimmed(plan, apart, _common_width(plan, apart, "dense FFNs"), kept)
    settings = replace(anatomy.settings, config=config)
    if shared is not None and family.shared_width != "":
        if not family.shared_width or not beside:
            raise RefusedError(
                f"{_NAME}: {family.name} has no shared experts with a width of their own", "leave --shared out"
            )
        of_shared = _common_width(plan, beside, "shared experts")
        kept = _counted(shared, of_shared, "shared")
        slimmed |= _slimmed(plan, beside, of_shared, kept)
        config = _with_width(settings, (family.shared_width,), of_shared, kept, "--shared")
    elif shared is not None and not (slimmed.keys() & beside.keys()):
        raise RefusedError(f"{_NAME}: shared experts of {family.name} have the width of the routed ones", "use --width")
    if dense is not None:
        if family.dense_width in family.width_keys or not apart:
            raise RefusedError(
                f"{_NAME}: {family.name} has no dense FFNs with a width of their own", "leave --dense out"
            )
        of_dense = _common_width(plan, apart, "dense FFNs")
        kept = _counted(dense, of_dense, "dense")
        slimmed |= _slimmed(plan, apart, of_dense, kept)
        config = _with_width(replace(settings, config=config), (family.dense_width,), of_dense, kept, "--dense")
    return slimmed, config


def _counted(count: int | str, total: int, name: str) -> int:
    """Return a number of neurons, which may be given as a share of `total`: rounded down to a multiple of 8 then.

    The grouped matrix products of transformers refuse rows that are no multiple of 16 bytes.
    """
    if not isinstance(count, str):
        return count
    wanted = share_of(count, total, name, "neurons")
    return wanted - wanted % 8 if total % 8 == 0 and wanted > 8 else wanted


def _common_width(plan: Plan, blocks: Mapping[str, MoeBlock], what: str) -> int:
    """Return the number of neurons that all of `blocks` have; raise RefusedError where they differ."""
    widths = {where: neuron_count(block, plan.tensors) for where, block in blocks.items()}
    first = next(iter(widths))
    for where, width in widths.items():
        if width != widths[first]:
            raise RefusedError(
                f"{_NAME}: the {what} of {first} have {widths[first]} neurons, those of {where} {width}; one number in"
                " config.json is edited for all"
            )
    return widths[first]


def _slimmed(plan: Plan, blocks: Mapping[str, MoeBlock], old: int, width: int) -> dict[str, Slimmed]:
    """Return how `blocks` are slimmed. Raises RefusedError where whole blocks of neurons do not make the width."""
    if width > old:
        raise RefusedError(f"{_NAME}: there are {old} neurons, fewer than {width}", f"choose {old} or fewer")
    if width == old:
        return {}
    slimmed = {}
    for where, block in blocks.items():
        size = neurons_together(block, plan.tensors)
        if width % size or old % size:
            raise RefusedError(
                f"{_NAME}: {where}: {size} neighbouring neurons share a scale or a word, so they go together:"
                f" {width if width % size else old} is no multiple of {size}",
                f"choose {max(size, width - width % size)}, or dequantise first with `moesurgery convert --dequantize`",
            )
        slimmed[where] = Slimmed(block, width, size)
    return slimmed


def _with_width(settings: Settings, keys: tuple[str, ...], old: int, width: int, option: str) -> dict[str, Any]:
    """Return the config with `width` in place of `old` under all of `keys` that it has.

    In a list for several sets of experts the first is that of the main one. Raises RefusedError for another old width.
    """
    present = tuple(key for key in keys if settings.first((key,)) is not None)
    for key in present:
        value = settings.first((key,))
        if (value[0] if isinstance(value, list) and value else value) != old:
            raise RefusedError(f"{_NAME} {option}: {key} is {value!r} in config.json, the tensors are {old} wide")
    if not present:
        raise RefusedError(
            f"{_NAME} {option}: config.json has no {' or '.join(keys)}, by which the width would be known"
        )
    config = with_value(settings, present, width, present[0])
    for path in dict.fromkeys((*settings.family.nested, ())):
        before, part = section(settings.config, path), section(config, path)
        for key in present if settings.family.sets and part is not None else ():
            if isinstance(before and before.get(key), list):
                part[key] = [width, *before[key][1:]]  # type: ignore[index]
    return copy.deepcopy(config)
