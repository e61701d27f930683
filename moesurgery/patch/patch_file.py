"""`patch.json`: what a patch holds, read strictly, for it may be a stranger's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.source import Source, is_contained
from moesurgery.checkpoint.strict_json import parse_json, write_json
from moesurgery.errors import CheckpointError

PATCH = "patch.json"
SCHEMA_VERSION = 1
_MOST_PATCH = 1 << 28
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PatchedFile:
    """A file of a model or of the patch, by its name there, with its size in bytes and its SHA-256."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Patch:
    """`record` is the provenance of the edited model, whose recipe is carried out again.

    `inputs`: the files of each model that it reads, by the name that the record has for it. `outputs`: every file of
    the edited model. `files`: what is in the patch, by the names that recipe or output have for it.
    """

    version: str
    record: dict[str, Any]
    inputs: Mapping[str, tuple[PatchedFile, ...]]
    outputs: tuple[PatchedFile, ...]
    files: Mapping[str, tuple[PatchedFile, ...]]

    def to_json(self) -> str:
        """Return the content of `patch.json`."""
        return write_json(
            {
                "schema_version": SCHEMA_VERSION,
                "tool": "moesurgery",
                "version": self.version,
                "record": self.record,
                "inputs": _named(self.inputs),
                "outputs": [asdict(file) for file in self.outputs],
                "files": _named(self.files),
            }
        )


def _named(files: Mapping[str, Iterable[PatchedFile]]) -> list[dict[str, Any]]:
    return [{"name": name, "files": [asdict(file) for file in of_name]} for name, of_name in files.items()]


def read_patch(source: Source) -> Patch:
    """Return the patch in a folder. Raises CheckpointError where its manifest is not one, or of a later version."""
    files = source.files()
    if PATCH not in files:
        raise CheckpointError(f"{source.identity} has no {PATCH}, so it is no patch", "make one with `moesurgery pack`")
    try:
        if files[PATCH] > _MOST_PATCH:
            raise ValueError(f"has {files[PATCH]:,} bytes, and may have {_MOST_PATCH:,}")
        content = parse_json(source.read(PATCH, 0, files[PATCH]))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"has schema version {content['schema_version']!r}, expected {SCHEMA_VERSION}")
        if not isinstance(content["record"], dict) or not isinstance(content["version"], str):
            raise ValueError("has no record of what was done")
        return Patch(
            content["version"],
            content["record"],
            {entry["name"]: _files(entry["files"]) for entry in content["inputs"]},
            _files(content["outputs"]),
            {entry["name"]: _files(entry["files"]) for entry in content["files"]},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error) if type(error) is ValueError else "lacks what a patch says of its files"
        raise CheckpointError(
            f"{source.identity}/{PATCH} {what}",
            f"download it again; a patch of a later version needs more than moesurgery {__version__}",
        ) from None


def _files(entries: list[dict[str, Any]]) -> tuple[PatchedFile, ...]:
    files = tuple(PatchedFile(**entry) for entry in entries)
    for each in files:
        if not isinstance(each.file, str) or not is_contained(each.file):
            raise ValueError(f"names a file {each.file!r}, which leads elsewhere")
        if type(each.size) is not int or each.size < 0 or not _DIGEST.fullmatch(each.sha256):
            raise ValueError(f"has no size and SHA-256 of {each.file}")
    return files
