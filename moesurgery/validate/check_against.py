"""R: what the provenance says was done to the reference, or to several, is what was done.

The recipe in `moesurgery.json` is planned again on the models that were given. Then every tensor is compared, byte by
byte and streamed, with the base's own (untouched) or with what its expression computes (edited).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.filenames import CARD, CONFIG, PROVENANCE, TOKENIZER_FILES
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.gguf_files import METADATA
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.errors import CheckpointError, RecipeError, RefusedError, SurgeryError
from moesurgery.expr.nodes import Copy
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context
from moesurgery.validate.parent_models import Given
from moesurgery.validate.replay_recipe import device_of, parents_of, replanned, steps_of
from moesurgery.write.card import json_differences
from moesurgery.write.gguf_container import KEYS_OF_THE_WRITER
from moesurgery.write.recompute import Recomputer


@check("R01", "R02", "R03", "R04", "R05", "R06")
def replay(subject: Context) -> Outcome:
    """Plan the recipe again on what was given, and compare everything."""
    given = [Given(text) for text in subject.against]
    record = subject.object_or_none(PROVENANCE)
    computed = True
    if record is None:
        reason = f"there is no readable {PROVENANCE}: nothing says what was done, so nothing may differ"
        yield NotChecked(("R01", "R03"), reason)
        for extra in given[1:]:
            yield finding("R01", f"nothing says what {extra.reference} was used for", hint="give one --against")
        try:
            plan = plan_of(open_checkpoint(given[0].reference))
        except CheckpointError as error:
            yield finding("R01", f"the reference cannot be opened: {error.message}", hint=error.hint)
            return
    else:
        plan_and_device = yield from _replanned(record, given)
        if plan_and_device is None:
            return
        plan, device = plan_and_device
        computed = _present(device)
        if not computed:
            yield NotChecked(("R03",), f"it was merged on {device}, which is not here: its last bits are of that")
    yield from _tensors(subject, plan, computed=computed)
    yield from _files(subject, plan)
    own = {f"{METADATA}.{key}" for key in KEYS_OF_THE_WRITER} if subject.is_gguf else set()
    for key, theirs, mine in json_differences(plan.config, subject.config):
        if key in own:
            continue
        yield finding("R05", f"{key} is {mine!r}; the recipe leaves {theirs!r}", CONFIG)


def _replanned(record: Mapping[str, Any], given: list[Given]) -> Generator[Finding, None, tuple[Plan, str] | None]:
    """Yield what is wrong with the record or with what was given; return the plan, and the device that merged."""
    try:
        steps = steps_of(record)
        parents = parents_of(record, steps, given)
        yield from parents.findings
        if any(each.severity == "error" for each in parents.findings):
            return None
        plan = replanned(steps, next(iter(parents.where.values())), parents)
    except RecipeError as error:
        yield finding("R01", error.message, PROVENANCE, hint=error.hint or _other_version(record))
        return None
    except SurgeryError as error:
        message = f"the recipe cannot be planned on the reference: {error.message}"
        yield finding("R01", message, PROVENANCE, hint=error.hint or _other_version(record))
        return None
    return plan, device_of(steps)


def _other_version(record: Mapping[str, Any]) -> str:
    return f"it was written by moesurgery {record.get('version')!r}"


def _present(device: str) -> bool:
    """Whether torch can compute on a device here."""
    if device in ("", "cpu") or not device.startswith("cuda"):
        return device in ("", "cpu")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


def _tensors(subject: Context, plan: Plan, *, computed: bool) -> Iterator[Finding]:
    """Compare all tensors; those that are more than byte ranges only where they can be `computed` as they were."""
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
            if not computed and not all(isinstance(piece, Copy) for piece in expr.pieces()):
                continue
            try:
                first = _first_difference(subject, info, recomputer.pieces(name, expr))
            except RefusedError as error:
                yield finding(code, f"cannot be computed again: {error.message}", info.file, name, hint=error.hint)
                continue
            if first is not None:
                what = "differs from the reference" if code == "R02" else "is not what the recipe computes"
                yield finding(code, f"{what}, from byte {first:,} on", info.file, name)
    except CheckpointError as error:
        yield finding("S11", error.message, hint=error.hint)
    finally:
        recomputer.close()


def _first_difference(subject: Context, info: TensorInfo, pieces: Iterator[tuple[int, bytes]]) -> int | None:
    """Return the first byte of a tensor that is not what was expected, None where all are."""
    for at, expected in pieces:
        actual = subject.source.read(info.file, info.start + at, len(expected))
        subject.progress(len(actual))
        if actual != expected:
            return at + next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), 0)
    return None


def _files(subject: Context, plan: Plan) -> Iterator[Finding]:
    """Compare the side files that the recipe makes, and those of the tokenizer that it leaves as they are."""
    source, sizes = plan.checkpoint.source, plan.checkpoint.file_sizes
    for file in set(TOKENIZER_FILES).intersection(sizes) - plan.files.keys():
        if file not in subject.files or subject.source.read(file, 0, subject.files[file]) != source.read(
            file, 0, sizes[file]
        ):
            yield finding("R06", "is not the reference's, and no step changes it", file, severity="warning")
    for file, content in plan.files.items():
        if file == CARD:
            continue  # every output has one of its own
        size = subject.files.get(file)
        if content is None:
            if size is not None:
                yield finding("R06", "the recipe leaves it out", file)
        elif size is None:
            yield finding("R06", "the recipe writes it, and it is not there", file)
        elif size != len(content) or subject.source.read(file, 0, size) != content:
            yield finding("R06", "is not what the recipe writes", file)
