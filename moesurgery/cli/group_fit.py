"""What `merge-experts` with text does beyond other commands: a second run for its groups, and the drop beside it.

`merge-experts MODEL --to 6 --text F` is `collect MODEL --text F -o S`, a run that looks at the groups which these
statistics give (`measure.group_fit`), and `merge-experts MODEL --to 6 --stats S --fit FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.cli import measuring
from moesurgery.cli.collect import output_file
from moesurgery.cli.console import console
from moesurgery.errors import SurgeryError
from moesurgery.plan.plan import Plan
from moesurgery.surgery.grouping import DEFAULT_GROUP, EVERY_EXPERT, NAME, merger
from moesurgery.surgery.operation import apply

if TYPE_CHECKING:
    from moesurgery.measure.tokens import Tokens


def check_merge(plan: Plan, values: Mapping[str, Any]) -> None:
    """Raise what the merge would be refused for whatever the text says, before anything is run."""
    apply(plan, NAME, **_given(values, "groups", "to"))
    merger(plan, **_given(values, "groups", "to", "router"))


def compares_all(values: Mapping[str, Any]) -> bool:
    """Whether the groups are made by what every expert says to every token."""
    return "to" in values and values.get("group", DEFAULT_GROUP) in EVERY_EXPERT


def with_fit(
    plan: Plan,
    values: Mapping[str, Any],
    windows: Tokens,
    run: measuring.Run,
    texts: list[Path],
    output: Path,
    *,
    force: bool,
) -> dict[str, Any]:
    """Return the parameters of a merge with the fit that it needs, which is made and left in a file."""
    from moesurgery.measure.fits import save_fits
    from moesurgery.measure.group_fit import fit_groups

    merge = merger(plan, **_without(values, "fit"), fitted=True)
    if "fit" in values or not merge.needs_fit:
        return dict(values)
    target = output_file(output, force=force)
    engine = run.engine(plan)
    with console.progress("fitting groups", engine.work(windows), of_bytes=False) as watch:
        fits = fit_groups(engine, windows, merge, watch.progress)
    about = {"model": plan.checkpoint.source.identity, "tokens": windows.count, **run.about(texts)}
    save_fits(target, fits, merge, about)
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


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
