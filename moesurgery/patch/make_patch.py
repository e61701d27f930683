"""Make a patch of an edited model: its recipe, the files that the recipe reads, and digests of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moesurgery._version import __version__
from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.digest import whole_digest
from moesurgery.checkpoint.filenames import CARD, CONFIG, INDEX, PROVENANCE
from moesurgery.checkpoint.scan import read_object
from moesurgery.checkpoint.source import LocalSource, Source, read_in_parts
from moesurgery.checkpoint.source_address import open_source
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.patch.patch_file import PATCH, Patch, PatchedFile
from moesurgery.patch.run_patch import check_plan, opened_model, parents_given, plan_of_record
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import operations
from moesurgery.validate.parent_models import Given, recorded_models
from moesurgery.validate.replay_recipe import MERGE_OPERATION, Steps, steps_of
from moesurgery.write.expected_output import expected_output
from moesurgery.write.shard_layout import output_tasks

Contents = dict[str, Iterable[bytes]]
_MOST_RECORD = 1 << 28


def make_patch(
    output: str,
    models: Sequence[str],
    files: Sequence[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Patch, Contents]:
    """Return a patch that makes the edited model `output` out of `models`, and its files by name.

    `models`: MODEL or NAME=MODEL for each that its provenance names. `files`: PATH or NAME=PATH of statistics, repairs
    and plans that its recipe reads; those that lie beside the output, or here, are found. Reads every byte of all
    models. Raises CheckpointError where something is missing, RefusedError where the recipe does not make the output.
    """
    source = open_source(output)
    record = _record_of(source)
    read = {name: _found(name, files, source) for name in _names_of_files(steps_of(record))}
    parents = parents_given(record, [*map(Given, models), *(Given(f"{n}={p}") for n, p in read.items())])
    plan = plan_of_record(record, parents)
    sizes = source.files()
    check_plan(plan, sizes)
    outputs = tuple(_digested(source, file, sizes[file], progress) for file in _made_by(plan, sizes))
    inputs = {}
    for entry in recorded_models(record):
        model = opened_model(parents.where[entry.name])
        read_of = _read_of(model, outputs)
        inputs[entry.name] = tuple(_digested(model.source, f, model.file_sizes[f], progress) for f in read_of)
    kept: dict[str, tuple[PatchedFile, ...]] = {}
    contents: Contents = {}
    for name, path in read.items():
        place = LocalSource(path if path.is_dir() else path.parent)
        inside = place.files() if path.is_dir() else {path.name: path.stat().st_size}
        names = {file: f"files/{path.name}/{file}" if path.is_dir() else f"files/{name}" for file in inside}
        kept[name] = tuple(_kept(place, file, size, names[file], contents) for file, size in inside.items())
    for name in (PROVENANCE, CARD):
        if name in sizes:
            kept[name] = (_kept(source, name, sizes[name], name, contents),)
    patch = Patch(__version__, record, inputs, outputs, kept)
    contents[PATCH] = [patch.to_json().encode()]
    return patch, contents


def _made_by(plan: Plan, sizes: Mapping[str, int]) -> list[str]:
    """Return the files of an output that its plan makes, without those that were added to the folder later."""
    made = {shard.name for shard in expected_output(plan, output_tasks(plan)).shards}
    made |= {CONFIG, INDEX, CARD, PROVENANCE, *plan.checkpoint.side_files, *plan.files}
    return sorted(made & sizes.keys())


def _record_of(source: Source) -> dict[str, object]:
    sizes = source.files()
    if PROVENANCE not in sizes:
        raise CheckpointError(
            f"{source.identity} has no {PROVENANCE}, which says how it was made", "pack an output of this program"
        )
    try:
        return read_object(source, PROVENANCE, sizes[PROVENANCE], _MOST_RECORD)
    except ValueError as error:
        raise CheckpointError(f"{source.identity}/{PROVENANCE} {error}") from None


def _names_of_files(steps: Steps) -> Iterator[str]:
    for operation, values in steps:
        if operation != MERGE_OPERATION:
            yield from (text for _, text, reads in operations()[operation].named(values) if reads == "file")


def _found(name: str, given: Sequence[str], output: Source) -> Path:
    """Return where a file is that a recipe reads."""
    for text in given:
        stated, sign, path = text.rpartition("=")
        if (stated if sign else Path(path).name) == name and Path(path).exists():
            return Path(path)
    beside = output.root.resolve().parent if isinstance(output, LocalSource) else Path()
    for place in (beside / name, Path(name)):
        if place.exists():
            return place
    raise CheckpointError(
        f"the recipe of {output.identity} reads {name}, which is neither beside it nor here",
        f"say where it is: --file {name}=PATH",
    )


def _read_of(checkpoint: Checkpoint, outputs: Sequence[PatchedFile]) -> list[str]:
    """Return the files of an input that decide the output: weights, config, and what is handed on unchanged."""
    handed_on = {each.file for each in outputs} - {CARD, PROVENANCE}
    beside = (file for file in checkpoint.side_files if file in handed_on)
    return [*checkpoint.shards, *((CONFIG,) if CONFIG in checkpoint.file_sizes else ()), *beside]


def _digested(source: Source, file: str, size: int, progress: Callable[[int], None]) -> PatchedFile:
    return PatchedFile(file, size, whole_digest(source, file, size, progress))


def _kept(source: Source, file: str, size: int, name: str, contents: Contents) -> PatchedFile:
    """Put a file into the patch under `name`, and return it under that name."""
    if name in contents:
        raise RefusedError(f"two files of the recipe are called {file}", "rename one of them, and edit again")
    contents[name] = read_in_parts(source, file, size)
    return replace(_digested(source, file, size, lambda count: None), file=name)
