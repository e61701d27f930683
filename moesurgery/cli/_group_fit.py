"""What `merge-experts` with text does beyond other commands: a second run for its groups, and the drop beside it.

`merge-experts MODEL --to 6 --text F` is `collect MODEL --text F -o S`, a run that looks at the groups which these
statistics give (`fitting.group_fit`), and `merge-experts MODEL --to 6 --stats S --fit FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgery.cli._cache import CalibrationCache, about_differences, check_same
from moesurgery.cli._console import console
from moesurgery.cli.collect import SUFFIX
from moesurgery.errors import SurgeryError
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import apply
from moesurgery.surgery.group_experts import DEFAULT_GROUP, EVERY_EXPERT, NAME, merger


def check_merge(plan: Plan, values: Mapping[str, Any]) -> None:
    """Raise what the merge would be refused for whatever the text says, before anything is run."""
    apply(plan, NAME, **_given(values, "groups", "to"))
    merger(plan, **_given(values, "groups", "to", "router"))


def compares_all(values: Mapping[str, Any]) -> bool:
    """Whether the groups are made by what every expert says to every token."""
    return "to" in values and values.get("group", DEFAULT_GROUP) in EVERY_EXPERT


def with_fit(beside: CalibrationCache, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a merge with the fit that it needs, made now or by an earlier run of the same.

    Raises OutputError where the fit beside the output is of something else.
    """
    from moesurgery.fitting.group_fit import fit_groups
    from moesurgery.stats.group_fit_file import open_group_fits, save_group_fits

    merge = merger(beside.plan, **{name: value for name, value in values.items() if name != "fit"}, fitted=True)
    if "fit" in values or not merge.needs_fit:
        return dict(values)
    target = beside.output.with_name(f"{beside.output.name}.fit{SUFFIX}")
    if target.exists() and not beside.force:
        fits = open_group_fits(target)
        differs = about_differences(fits.about, beside.about) or fits.differences(merge)
        check_same(target, "a fit", differs, "fit again,")
        console.note(f"how the experts of each group go together is used again from {target}")
        return {**values, "fit": str(target)}
    engine = beside.run.engine(beside.plan)
    with console.progress("fitting groups", engine.work(beside.windows), of_bytes=False) as watch:
        found = fit_groups(engine, beside.windows, merge, watch.progress)
    save_group_fits(target, found, merge, beside.about)
    console.note(f"how the experts of each group go together is in {target}")
    return {**values, "fit": str(target)}


def the_drop(plan: Plan, values: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the plan that drops as many experts as a merge takes away, by the same statistics, where it can be had."""
    if "to" not in values or "stats" not in values:
        return {}
    count = plan.anatomy.experts - values["to"]
    try:
        return {"drop-experts": apply(plan, "drop-experts", count=count, stats=values["stats"])}
    except SurgeryError as error:
        console.note(f"dropping {count} experts is not measured: {error.message}")
        return {}


def _given(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}
