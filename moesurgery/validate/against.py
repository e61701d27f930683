"""R: what the provenance says was done to the reference is what was done.

The recipe in `moesurgery.json` is planned again on the reference. Then every tensor is compared, byte by byte and
streamed, with the reference's own (untouched) or with what its expression computes (edited).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.checkpoint import PROVENANCE, open_checkpoint
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.scan import CONFIG
from moesurgery.errors import CheckpointError, SurgeryError
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipes import Recipe, RecipeStep
from moesurgery.surgery.operation import operations, problems
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.subject import Subject
from moesurgery.write.card import differences
from moesurgery.write.recompute import Recomputer


@check("R01", "R02", "R03", "R04", "R05")
def replay(subject: Subject) -> Outcome:
    """Plan the recipe again on the reference, and compare everything."""
    assert subject.against is not None
    reference = plan_of(open_checkpoint(subject.against))
    record = subject.object_or_none(PROVENANCE)
    if record is None:
        reason = f"there is no readable {PROVENANCE}: nothing says what was done, so nothing may differ"
        yield NotChecked(("R01", "R03"), reason)
        plan = reference
    else:
        yield from _same_input(record, reference)
        planned = _replan(record, reference)
        if isinstance(planned, Finding):
            yield planned
            return
        plan = planned
    yield from _tensors(subject, plan)
    for key, theirs, mine in differences(plan.config, subject.config):
        yield finding("R05", f"{key} is {mine!r}; the recipe leaves {theirs!r}", CONFIG)


def _same_input(record: Mapping[str, Any], reference: Plan) -> Iterator[Finding]:
    """The reference is the model that was edited, by the digests of its headers."""
    inputs = record.get("inputs")
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    shards = first.get("shards")
    stated = {s.get("header_sha256") for s in shards if isinstance(s, dict)} if isinstance(shards, list) else set()
    headers = {header.digest for header in reference.checkpoint.headers}
    if stated and stated != headers:
        message = "the headers of the reference are not those of the model that was edited"
        hint = "it may be the same model in other shards; else give the model that moesurgery.json names"
        yield finding("R01", message, PROVENANCE, severity="warning", hint=hint)


def _replan(record: Mapping[str, Any], reference: Plan) -> Plan | Finding:
    recipe = record.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    if not isinstance(steps, list):
        return finding("R01", "holds no recipe", PROVENANCE)
    found = []
    known = operations()
    for entry in steps:
        name, values = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", None)
        if name == "merge":
            message = "a merge of several models is not replayed"
            hint = "run its recipe again, and compare the two with `moesurgery diff`"
            return finding("R01", message, PROVENANCE, severity="warning", hint=hint)
        if name not in known or not isinstance(values, dict):
            return finding("R01", f"the step {entry!r} is none of an operation that is known here", PROVENANCE)
        if wrong := problems(known[name], values):
            return finding("R01", wrong[0].message, PROVENANCE, hint=_other_version(record))
        found.append(RecipeStep(name, values))
    try:
        return Recipe(None, tuple(found)).apply(reference)
    except SurgeryError as error:
        hint = error.hint or _other_version(record)
        return finding("R01", f"the recipe cannot be planned on the reference: {error.message}", PROVENANCE, hint=hint)


def _other_version(record: Mapping[str, Any]) -> str:
    return f"it was written by moesurgery {record.get('version')!r}"


def _tensors(subject: Subject, plan: Plan) -> Iterator[Finding]:
    for name in plan.tensors.keys() - subject.tensors.keys():
        yield finding("R04", "the recipe leaves it, and it is not there", tensor=name)
    untouched = set(plan.untouched())
    recomputer = Recomputer()
    try:
        for name, info in subject.tensors.items():
            if name not in plan.tensors:
                yield finding("R04", "the recipe does not leave it", tensor=name)
                continue
            code = "R02" if name in untouched else "R03"
            expr = plan.tensors[name]
            if (expr.dtype, expr.shape) != (info.dtype, info.shape):
                message = f"is {info.dtype} {list(info.shape)}; the recipe leaves {expr.dtype} {list(expr.shape)}"
                yield finding(code, message, info.file, name)
                continue
            for at, expected in recomputer.pieces(name, expr):
                found = subject.source.read(info.file, info.start + at, len(expected))
                subject.progress(len(found))
                if found != expected:
                    first = at + next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
                    what = "differs from the reference" if code == "R02" else "is not what the recipe computes"
                    yield finding(code, f"{what}, from byte {first:,} on", info.file, name)
                    break
    except CheckpointError as error:
        yield finding("S11", error.message, hint=error.hint)
    finally:
        recomputer.close()
