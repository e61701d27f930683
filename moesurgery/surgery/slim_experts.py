"""Keep some of the neurons of every expert: rows of gate and up, columns of down, one number in config.json.

A neuron adds to the output of its expert. Where experts are many and small, leaving out the least neurons of each costs
less than leaving out whole experts of the same size (docs/measure.md). Each expert keeps neurons of its own, as many as
every other. The class builds shared experts, and in some families dense FFNs, from the same number: those follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Expr
from moesurgery.moe.expert_axis import refuse_strays
from moesurgery.moe.neuron_axis import neuron_count, with_neurons
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.text_needs import TextNeeds, Values
from moesurgery.stats.plan_file import load_plan_file
from moesurgery.stats.repair_file import Repair, open_repair
from moesurgery.stats.statistics_file import Stats, load_stats
from moesurgery.surgery.choose_neurons import (
    Kept,
    NeuronChoice,
    NeuronCriterion,
    Slimmed,
    by_statistics,
    by_weights,
    highest,
    in_whole_blocks,
)
from moesurgery.surgery.ffn_widths import slimmed_blocks
from moesurgery.surgery.planned_experts import PlanOption
from moesurgery.surgery.planned_neurons import PlannedNeurons, planned_neurons
from moesurgery.surgery.refit import with_matrices

_NAME = "slim-experts"
DEFAULT: NeuronCriterion = "obs"  # where there is text: docs/measure.md has the table
_WIDTHS = ("width", "shared", "dense")


class _Wanted(NamedTuple):
    """The blocks that lose neurons, the config that says so, and the plan file that decides which, if one does."""

    slimmed: dict[str, Slimmed]
    config: dict[str, Any]
    planned: PlannedNeurons | None

    def kept(self, plan: Plan) -> dict[str, Kept]:
        """Return the neurons that stay as far as a plan file decides it."""
        return self.planned.of(plan, self.slimmed) if self.planned else {}


def _wanted(plan: Plan, values: Values) -> _Wanted:
    """Return what is to be slimmed. Raises RecipeError for a plan beside what chooses, RefusedError as it says."""
    plan.anatomy.require_family(_NAME)
    widths = {name: values.get(name) for name in _WIDTHS}
    if values.get("plan_file") is None:
        return _Wanted(*slimmed_blocks(plan, **widths), None)
    stated = [name for name in (*_WIDTHS, "by", "stats") if values.get(name) is not None]
    if stated:
        raise RecipeError(
            f"{_NAME}: {' and '.join(stated)} and plan_file are given: a plan says which neurons stay", "leave one out"
        )
    planned = planned_neurons(plan, load_plan_file(values["plan_file"]))
    return _Wanted(*slimmed_blocks(plan, planned.width, planned.shared, planned.dense), planned)


def _refused_early(plan: Plan, values: Values) -> None:
    """Raise what is refused whatever the text says. No statistics are asked for: the fit chooses by itself."""
    _wanted(plan, values).kept(plan)


def _neurons_to_fit(plan: Plan, values: Values) -> NeuronChoice | None:
    """Return the neurons that need a fit; None where there is one, or none of them go."""
    wanted = _wanted(plan, values)
    slimmed = wanted.slimmed
    if "fit" in values or not slimmed:
        return None
    if wanted.planned is not None:
        kept = wanted.kept(plan)
        kept |= _chosen(plan, {w: entry for w, entry in slimmed.items() if w not in kept}, "weights", None)
        return NeuronChoice(
            slimmed, "weights", kept, {"kind": "neurons", "by": "plan", "plan": wanted.planned.file.sha256}
        )
    statistics = _statistics(plan, values.get("stats"))
    by: NeuronCriterion = values.get("by") or DEFAULT
    chosen = _chosen(plan, slimmed, by, statistics) if by == "weights" or statistics else {}
    described = {"kind": "neurons", "by": by, **{name: values.get(name) for name in _WIDTHS}}
    return NeuronChoice(slimmed, by, chosen, described | ({"statistics": statistics.sha256} if statistics else {}))


@operation(_NAME, text=TextNeeds(_refused_early, neurons=_neurons_to_fit), chooses=_WIDTHS)
def slim_experts(
    plan: Plan,
    *,
    width: Annotated[
        int | str | None, Param("how many neurons each routed expert keeps, as 512 or 75%", minimum=1)
    ] = None,
    shared: Annotated[
        int | str | None,
        Param("how many neurons the shared experts keep, where they have a width of their own", minimum=1),
    ] = None,
    dense: Annotated[
        int | str | None,
        Param("how many neurons the FFNs of layers without experts keep, likewise", minimum=1),
    ] = None,
    by: Annotated[
        NeuronCriterion | None,
        Param(
            "which neurons stay: by text or statistics, obs (optimal brain surgery, the default with them) or saliency;"
            " or weights (the default without)"
        ),
    ] = None,
    stats: Annotated[
        str | None,
        Param("statistics from `moesurgery collect --neurons`, for obs and saliency", metavar="FILE", reads="file"),
    ] = None,
    fit: Annotated[
        str | None,
        Param("neurons and down-projections that --text made", metavar="FOLDER", reads="file"),
    ] = None,
    plan_file: PlanOption = None,
) -> Plan:
    """Keep some of the neurons of every expert.

    Give one of `width`, `shared` and `dense` at least, or a plan. With text, the down-projections of the neurons that
    stay are solved for what goes. Shared experts that are so many times as wide as a routed one follow, and so do dense
    FFNs where config.json has one number for both. Gate and up are copied by byte ranges, down by columns.
    """
    widths = {"width": width, "shared": shared, "dense": dense}
    if plan_file is None and all(count is None for count in widths.values()):
        raise RecipeError(
            f"{_NAME} needs one of width, shared, dense and plan_file: how many neurons stay, or which",
            "as in `--width 512`",
        )
    wanted = _wanted(plan, {**widths, "by": by, "stats": stats, "plan_file": plan_file})
    slimmed, config, planned = wanted
    statistics = _statistics(plan, stats)
    fitted = open_repair(fit) if fit is not None else None
    if fitted is not None and fitted.about["kind"] != "neurons":
        raise RefusedError(f"{_NAME}: {fit} is a repair, no choice of neurons", "apply it with `moesurgery refit`")
    criterion: NeuronCriterion = "weights" if statistics is None or planned else DEFAULT
    criterion = by or (fitted.about.get("by", DEFAULT) if fitted and not planned else criterion)
    chosen_by = "plan" if planned else criterion
    if criterion != "weights" and statistics is None and fitted is None:
        raise RecipeError(
            f"{_NAME}: --by {criterion} needs to see the model run",
            "give --text FILE, or --stats FILE from `moesurgery collect --neurons`",
        )
    read = {where: fitted.matrices(where) for where in slimmed.keys() & fitted.layers.keys()} if fitted else {}
    kept = {where: _kept_by_fit(where, slimmed[where], plan, matrices) for where, matrices in read.items()}
    for where, neurons in wanted.kept(plan).items():
        if kept.setdefault(where, neurons) != neurons:
            raise RefusedError(
                f"{_NAME}: {fit} keeps other neurons of {where} than {plan_file}", "leave one of them out"
            )
    left = {where: entry for where, entry in slimmed.items() if where not in kept}
    kept |= _chosen(plan, left, criterion, statistics)
    known = {m.name for block in (*plan.anatomy.blocks, *(s.block for s in slimmed.values())) for m in block.members}
    others = {name: expr for name, expr in plan.tensors.items() if name not in known}
    changed: dict[str, Expr] = {}
    for where, (block, _, _) in slimmed.items():
        refuse_strays(block, others)
        mine = with_neurons(block, plan.tensors, kept[where])
        solved = {expert: {"down": m["down"]} for expert, m in read.get(where, {}).items() if "down" in m}
        changed |= mine | (with_matrices(block, {**plan.tensors, **mine}, solved) if solved else {})
    parameters: dict[str, Any] = {name: count for name, count in widths.items() if count is not None}
    parameters |= {} if planned else {"by": criterion}
    files = {"stats": stats, "fit": fit, "plan_file": plan_file}
    parameters |= {name: file for name, file in files.items() if file is not None}
    return plan.edited(
        Step(
            _NAME,
            parameters,
            _summary(plan, slimmed),
            report=_report(plan, slimmed, chosen_by, statistics, fitted) | ({"plan": planned.about} if planned else {}),
            notes=_notes(slimmed, planned.kept if planned else (), chosen_by, statistics, fitted),
            warnings=planned.warnings if planned else (),
            neurons=kept,
            tables=_tables(slimmed, fitted),
        ),
        tensors=plan.with_tensors(changed),
        config=config,
    )


def _statistics(plan: Plan, stats: str | None) -> Stats | None:
    """Return the statistics of neurons. Raises RefusedError where they are of another model, or have none."""
    if stats is None:
        return None
    statistics = load_stats(stats)
    statistics.check(plan.anatomy, _NAME)
    if not statistics.neurons:
        raise RefusedError(
            f"{_NAME}: {stats} says nothing of neurons", "collect again with `moesurgery collect --neurons`"
        )
    return statistics


def _chosen(
    plan: Plan, slimmed: Mapping[str, Slimmed], by: NeuronCriterion, statistics: Stats | None
) -> dict[str, Kept]:
    """Return the neurons that stay by statistics, or by their weights where those have nothing of a block."""
    measured = {**statistics.blocks, **statistics.ffns} if statistics and by != "weights" else {}
    return {
        where: by_statistics(measured[where], by, width, neuron_count(block, plan.tensors), size)
        if where in measured
        else highest(by_weights(plan, block), width, size)
        for where, (block, width, size) in slimmed.items()
    }


def _kept_by_fit(where: str, slimmed: Slimmed, plan: Plan, matrices: Mapping[int, Mapping[str, Expr]]) -> Kept:
    """Return the neurons that a fit keeps of a block. Raises RefusedError where it is that of another edit."""
    block, width, size = slimmed
    neurons, kept = neuron_count(block, plan.tensors), []
    for expert in range(block.experts):
        fit = matrices.get(expert, {})
        own = values_of(fit["kept"]).astype(int).tolist() if "kept" in fit else []
        if len(own) != width or not in_whole_blocks(own, size) or not 0 <= own[0] <= own[-1] < neurons:
            raise RefusedError(
                f"{_NAME}: {where}: expert {expert} is to keep {width} of {neurons}, the fit says otherwise",
                "the fit is that of another edit: make it again with --text",
            )
        kept.append(own)
    return kept


def _summary(plan: Plan, slimmed: Mapping[str, Slimmed]) -> str:
    counts: dict[tuple[int, int], int] = {}
    for block, width, _ in slimmed.values():
        change = (neuron_count(block, plan.tensors), width)
        counts[change] = counts.get(change, 0) + block.experts
    named = ", ".join(f"{width} of {old} in {count:,} experts" for (old, width), count in counts.items())
    return f"neurons kept: {named or 'all'}"


def _report(
    plan: Plan, slimmed: Mapping[str, Slimmed], by: str, statistics: Stats | None, fitted: Repair | None
) -> dict[str, Any]:
    blocks = [
        {"layer": where, "neurons": width, "old_neurons": neuron_count(block, plan.tensors)}
        for where, (block, width, _) in slimmed.items()
    ]
    report: dict[str, Any] = {"by": by, "blocks": blocks}
    if statistics is not None:
        report["statistics"] = {"sha256": statistics.sha256, **statistics.about}
    if fitted is not None:
        report["fit"] = {**fitted.about, "layers": list(fitted.layers.values())}
    return report


def _notes(
    slimmed: Mapping[str, Slimmed], planned: Collection[str], by: str, statistics: Stats | None, fitted: Repair | None
) -> tuple[str, ...]:
    notes = []
    seen = {*planned, *(fitted.layers if fitted else ()), *(statistics.blocks | statistics.ffns if statistics else ())}
    if by != "weights" and (others := [where for where in slimmed if where not in seen]):
        notes.append(
            f"{', '.join(others)}: not {'in the plan' if planned else 'run'}, so neurons were chosen by their weights"
        )
    if slimmed and fitted is None:
        notes.append(
            "the down-projections are those of before, without the columns that go; with --text they are solved"
        )
    return tuple(notes)


def _tables(slimmed: Mapping[str, Slimmed], fitted: Repair | None) -> tuple[Table, ...]:
    rows = [
        (where, str(slimmed[where].width), f"{entry['error_before']:.4f}", f"{entry['error_after']:.4f}")
        for where, entry in (fitted.layers.items() if fitted else ())
        if where in slimmed
    ]
    return (Table(("block", "neurons", "error before", "after"), tuple(rows)),) if rows else ()
