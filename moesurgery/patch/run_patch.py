"""Carry out a patch: check that the models are those that it was made from, plan, and promise the publisher's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.checkpoint.digest import whole_digest
from moesurgery.checkpoint.filenames import CARD, CONFIG, PROVENANCE
from moesurgery.checkpoint.source import LocalSource, Source, read_in_parts
from moesurgery.checkpoint.source_address import open_source
from moesurgery.errors import CheckpointError, RecipeError, RefusedError
from moesurgery.lora.apply import LoraAdapter
from moesurgery.patch.patch_file import Patch, PatchedFile, read_patch
from moesurgery.plan.plan import Plan
from moesurgery.validate.parent_models import Given, Parents, recorded_models
from moesurgery.validate.replay_recipe import parents_of, replanned, steps_of
from moesurgery.whole_file import whole_file
from moesurgery.write.expected_output import Promise, expected_output
from moesurgery.write.shard_layout import output_tasks

_Progress = Callable[[int], None]


@dataclass(frozen=True)
class OpenPatch:
    """A patch and where it is."""

    source: Source
    patch: Patch

    def to_yaml(self) -> str:
        """Return the recipe of the patch as YAML, with models and files under the names of its record."""
        import yaml

        return yaml.safe_dump(self.patch.record.get("recipe"), sort_keys=False, allow_unicode=True)

    @property
    def bytes_checked(self) -> int:
        """How many bytes of models are read to know them."""
        return sum(each.size for files in self.patch.inputs.values() for each in files)

    def plan_on(self, models: Sequence[str], folder: Path, progress: _Progress = lambda count: None) -> Plan:
        """Return the plan of the patch on `models`, MODEL or NAME=MODEL for each that it reads.

        Names, sizes and headers are compared first, then every byte, before anything is planned. Files of a remote
        patch are put into `folder`. Raises CheckpointError where a model or the patch is not what it was, RefusedError
        where this version plans something else.
        """
        named = {entry.name for entry in recorded_models(self.patch.record)}
        parents = parents_given(self.patch.record, [*map(Given, models), *self._files(folder, named)])
        opened = {name: opened_model(parents.where[name]) for name in self.patch.inputs if name in parents.where}
        for check in (_check_sizes, _check_bytes):
            for name, checkpoint in opened.items():
                check(name, checkpoint, self.patch.inputs[name], progress)
        plan = plan_of_record(self.patch.record, parents)
        outputs = {each.file: each.size for each in self.patch.outputs}
        check_plan(plan, outputs)
        extra = {file: None for file in plan.checkpoint.side_files if file not in outputs}
        return replace(plan, files={**plan.files, **extra})

    @property
    def promise(self) -> Promise:
        """The publisher's files: those that only the patch has, and the digests of all."""
        files = {}
        for name in (PROVENANCE, CARD):
            for each in self.patch.files.get(name, ()):
                files[name] = self._content(each)
        return Promise({each.file: each.sha256 for each in self.patch.outputs}, files)

    def _files(self, folder: Path, models: set[str]) -> list[Given]:
        """Return what the recipe reads beside models, on this machine."""
        given = []
        for name, files in self.patch.files.items():
            if name in (PROVENANCE, CARD) or name in models:
                continue
            for each in files:
                self._content_at(each, folder)
            root = self.source.root if isinstance(self.source, LocalSource) else folder
            first = Path(files[0].file)
            given.append(Given(f"{name}={root.joinpath(*first.parts[:2])}"))
        return given

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """The files of the patch, listed once."""
        return self.source.files()

    def _content(self, each: PatchedFile) -> bytes:
        content = self.source.read(each.file, 0, each.size)
        if self._sizes.get(each.file) != each.size or hashlib.sha256(content).hexdigest() != each.sha256:
            raise self._changed(each)
        return content

    def _check(self, each: PatchedFile) -> None:
        if self._sizes.get(each.file) != each.size or whole_digest(self.source, each.file, each.size) != each.sha256:
            raise self._changed(each)

    def _changed(self, each: PatchedFile) -> CheckpointError:
        return CheckpointError(
            f"{self.source.identity}/{each.file} is not the file that the patch was made with", "download it again"
        )

    def _content_at(self, each: PatchedFile, folder: Path) -> None:
        """Check a file of the patch; put it into `folder` where the patch is not on this machine."""
        if isinstance(self.source, LocalSource):
            self._check(each)
            return
        place = folder / each.file
        kept = LocalSource(folder)
        there = place.is_file() and place.stat().st_size == each.size
        if there and whole_digest(kept, each.file, each.size) == each.sha256:
            return
        with whole_file(place) as new, open(new, "wb") as file:
            file.writelines(read_in_parts(self.source, each.file, each.size))
        if whole_digest(kept, each.file, each.size) != each.sha256:
            raise CheckpointError(f"{self.source.identity}/{each.file} came damaged", "run the same command again")


def open_patch(reference: str) -> OpenPatch:
    """Open a patch: a folder or `hf://org/name`. Raises CheckpointError where there is none."""
    source = open_source(reference)
    return OpenPatch(source, read_patch(source))


def parents_given(record: Mapping[str, Any], given: list[Given]) -> Parents:
    """Find the models and files that a provenance record names among those given.

    Raises CheckpointError where one is missing or is another one, RecipeError where the record holds no recipe.
    """
    parents = parents_of(record, steps_of(record), given)
    for wrong in parents.findings:
        raise CheckpointError(wrong.message, (wrong.hint or "").replace("--against", "--model") or None)
    return parents


def plan_of_record(record: Mapping[str, Any], parents: Parents) -> Plan:
    """Plan the recipe of a provenance record again. Raises SurgeryError where it cannot be."""
    plan = replanned(steps_of(record), next(iter(parents.where.values())), parents)
    size = record.get("recipe", {}).get("max_shard_size")
    if size is None:
        return plan
    if type(size) is not int or size <= 0:
        raise RecipeError(f"the record's max_shard_size is {size!r}, expected a number of bytes")
    return replace(plan, max_shard_size=size)


def check_plan(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Raise RefusedError where a plan does not make the shards of an output, as far as names and sizes tell.

    `sizes` in bytes of the output's files.
    """
    expected = expected_output(plan, output_tasks(plan))
    for shard in expected.shards:
        size = sizes.get(shard.name)
        if size != shard.size:
            stated = "no such file" if size is None else f"{size:,} bytes"
            raise RefusedError(
                f"the recipe makes {shard.name} of {shard.size:,} bytes, and the published model has {stated}",
                "use the version of moesurgery that made it: see `version` in its record",
            )


def opened_model(reference: str) -> Checkpoint:
    """Open a model, or an adapter."""
    source = open_source(reference)
    return LoraAdapter(reference).checkpoint if CONFIG not in source.files() else open_checkpoint(reference)


def _check_sizes(name: str, checkpoint: Checkpoint, files: Sequence[PatchedFile], progress: _Progress) -> None:
    for each in files:
        size = checkpoint.file_sizes.get(each.file)
        if size != each.size:
            what = "is missing" if size is None else f"has {size:,} bytes, and had {each.size:,}"
            raise _another(name, checkpoint, f"{each.file} {what}")


def _check_bytes(name: str, checkpoint: Checkpoint, files: Sequence[PatchedFile], progress: _Progress) -> None:
    for each in sorted(files, key=lambda each: each.size):
        digest = whole_digest(checkpoint.source, each.file, each.size, progress)
        if digest != each.sha256:
            raise _another(name, checkpoint, f"the SHA-256 of {each.file} is {digest}, and was {each.sha256}")


def _another(name: str, checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.source.identity} is not the {name.removeprefix('./')} that was patched: {what}",
        "download that model again, at the revision that the patch names",
    )
