"""Keep some of the neurons of every expert: rows of gate and up, columns of down, one number in config.json.

A neuron's output adds to that of its expert, so leaving out the least of every expert costs less than leaving out whole
experts of the same size where experts are many and small (docs/measure.md). Experts need not keep the same neurons, only
as many. The class builds shared experts, and in some families dense FFNs, from the same number: those follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.config_keys import keys_present, with_value
from moesurgery.moe.expert_axis import refuse_strays
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import neuron_count, neurons_together, with_neurons
from moesurgery.plan.plan import Plan, Step
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.text_needs import NeededStatistics, TextNeeds, Values
from moesurgery.stats.statistics_file import Stats, load_stats
from moesurgery.surgery.choose_neurons import Kept, NeuronCriterion, by_statistics, by_weights, highest

_NAME = "slim-experts"
DEFAULT: NeuronCriterion = "obs"


def _needed_statistics(plan: Plan, values: Values) -> NeededStatistics | None:
    """Return what text is asked for; what is refused whatever it says is refused first."""
    slim_experts(plan, **{**values, "by": "weights", "stats": None})
    return None if "stats" in values or values.get("by") == "weights" else NeededStatistics(neurons=True)


@operation(_NAME, text=TextNeeds(_needed_statistics))
def slim_experts(
    plan: Plan,
    *,
    width: Annotated[int, Param("how many neurons each routed expert keeps", minimum=1)],
    by: Annotated[
        NeuronCriterion | None,
        Param(
            "which neurons stay: by statistics, obs (optimal brain surgery, the default with them) or saliency; or"
            " weights (the default without)"
        ),
    ] = None,
    stats: Annotated[
        str | None,
        Param("statistics from `moesurgery collect --neurons`, for obs and saliency", metavar="FILE", reads="file"),
    ] = None,
) -> Plan:
    """Keep `width` neurons of every routed expert.

    Shared experts that are as wide as so many routed ones follow, and so do dense FFNs where config.json has one number
    for both. Gate and up are copied by byte ranges, down by columns.
    """
    anatomy = plan.anatomy
    anatomy.require_family(_NAME)
    statistics = load_stats(stats) if stats is not None else None
    by = by or ("weights" if statistics is None else DEFAULT)
    if by != "weights" and statistics is None:
        raise RecipeError(
            f"{_NAME}: --by {by} needs statistics",
            "give --text FILE to collect them, or --stats FILE from `moesurgery collect --neurons`",
        )
    if statistics is not None:
        statistics.check(anatomy, _NAME)
    blocks = {block.where: block for block in anatomy.blocks if block.of is None}
    old = _one_width(plan, blocks)
    if width > old:
        raise RefusedError(f"{_NAME}: each expert has {old} neurons, fewer than {width}", "choose a lower --width")
    config = plan.config if width == old else _with_width(anatomy, old, width)
    wanted = dict.fromkeys(blocks, width)
    if width != old:
        for module, ffn in _following(plan, old).items():
            blocks[module], wanted[module] = ffn, neuron_count(ffn, plan.tensors) // old * width
    kept = {where: _chosen(plan, where, block, wanted[where], by, statistics) for where, block in blocks.items()}
    changed = {}
    for where, block in blocks.items():
        if width != old:
            refuse_strays(block, plan.tensors, renumbered=False)
            changed |= with_neurons(block, plan.tensors, kept[where])
    parameters: dict[str, Any] = {"width": width, "by": by} | ({"stats": stats} if stats is not None else {})
    step = Step(
        _NAME,
        parameters,
        f"{width} of {old} neurons kept in every expert of {len(anatomy.blocks)} layers",
        report={"width": width, "old_width": old, "by": by}
        | ({"statistics": {"sha256": statistics.sha256, **statistics.about}} if statistics else {}),
    )
    return plan.edited(step, tensors=plan.with_tensors(changed), config=config)


def _one_width(plan: Plan, blocks: Mapping[str, MoeBlock]) -> int:
    """Return the number of neurons of each expert of all layers; raise RefusedError where they differ."""
    widths = {where: neuron_count(block, plan.tensors) for where, block in blocks.items()}
    if len(set(widths.values())) > 1:
        raise RefusedError(f"{_NAME}: the layers have experts of different widths: {widths}")
    return next(iter(widths.values()))


def _with_width(anatomy: Anatomy, old: int, width: int) -> dict[str, Any]:
    """Return the config with the new width. Raises RefusedError where it does not have the old one."""
    settings = anatomy.settings
    keys = next(((key,) for key in settings.family.width_keys if settings.first((key,)) is not None), ())
    value = settings.first(keys) if keys else None
    first = value[0] if isinstance(value, list) and value else value
    if first != old:
        said = f"{keys[0]} is {value!r}" if keys else f"it has none of {', '.join(settings.family.width_keys)}"
        raise RefusedError(f"{_NAME}: config.json does not say that experts are {old} wide: {said}")
    return with_value(settings, keys, width, keys[0])


def _following(plan: Plan, width: int) -> dict[str, MoeBlock]:
    """Return the shared experts and dense FFNs, by module, that the class builds from the width of the experts."""
    anatomy = plan.anatomy
    following = {} if anatomy.settings.family.shared_width else shared_experts(anatomy, plan.tensors)
    for module, block in following.items():
        if neuron_count(block, plan.tensors) % width:
            raise RefusedError(f"{_NAME}: {module} is not so many times as wide as an expert, {width}")
    return following


def _chosen(
    plan: Plan, where: str, block: MoeBlock, width: int, by: NeuronCriterion, statistics: Stats | None
) -> Kept:
    """Return the neurons that each expert of a block keeps."""
    neurons = neuron_count(block, plan.tensors)
    if width == neurons:
        return [list(range(neurons))] * block.experts
    size = neurons_together(block, plan.tensors)
    if neurons % size or width % size:
        raise RefusedError(
            f"{_NAME}: {where}: {size} neurons share a scale or a word, so only whole blocks of {size} can go",
            f"choose a multiple of {size}" if neurons % size == 0 else "dequantise first with `moesurgery convert --dequantize`",
        )
    if statistics is not None and where in statistics.blocks and by != "weights":
        return by_statistics(statistics.blocks[where], by, width, neurons, size)
    return highest(by_weights(plan, block), width, size)
