"""S09: the files are those that `moesurgery.json` says were written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.digest import sampled_digest, whole_digest
from moesurgery.checkpoint.filenames import CONFIG, PROVENANCE
from moesurgery.checkpoint.finding import Finding
from moesurgery.errors import CheckpointError
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context

_HINT = "edit checkpoints with moesurgery, or remove moesurgery.json, which no longer tells the truth"


@check("S09")
def outputs(subject: Context) -> Outcome:
    """Sizes, headers and a sample of blocks agree with the record; so do the names of the shards."""
    try:
        record = subject.object(PROVENANCE)
    except (ValueError, CheckpointError) as error:
        yield finding("S09", str(error), PROVENANCE)
        return
    if record is None:
        yield NotChecked(("S09",), f"there is no {PROVENANCE}")
        return
    written = _outputs(record)
    if not written:
        yield NotChecked(("S09",), f"{PROVENANCE} holds no digests of what was written")
        return
    headers = {header.file: header for header in subject.scan.headers}
    for file in headers.keys() - written.keys():
        yield finding("S09", f"is no file that {PROVENANCE} says was written", file, hint=_HINT)
    for file, entry in written.items():
        if file not in subject.files:
            yield finding("S09", f"was written, says {PROVENANCE}, and is not there", file)
        elif file == CONFIG:
            yield from _config(subject, entry)
        elif entry.get("size") != subject.files[file]:
            message = f"has {subject.files[file]:,} bytes; {entry.get('size')!r} were written"
            yield finding("S09", message, file, hint=_HINT)
        elif file in headers and entry.get("header_sha256") != headers[file].digest:
            yield finding("S09", "its header is not the one that was written", file, hint=_HINT)
        elif (stated := entry.get("sampled_sha256")) is not None:
            try:
                digest = sampled_digest(subject.source, file, subject.files[file])
            except CheckpointError as error:
                yield finding("S11", error.message, file, hint=error.hint)
                continue
            if digest != stated:
                yield finding("S09", "its weights are not those that were written", file, hint=_HINT)


def _config(subject: Context, entry: Mapping[str, Any]) -> Iterator[Finding]:
    """A config may be edited by hand and still be right: a warning."""
    data = subject.source.read(CONFIG, 0, subject.files[CONFIG])
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        yield finding("S09", "was changed after it was written", CONFIG, severity="warning", hint=_HINT)


@check("S09", level="values")
def checksums(subject: Context) -> Outcome:
    """Where the writer was asked for them, the SHA-256 of whole shards."""
    record = subject.object_or_none(PROVENANCE) or {}
    for file, entry in _outputs(record).items():
        stated = entry.get("sha256")
        if stated is None or file == CONFIG or file not in subject.files or subject.files[file] != entry.get("size"):
            continue
        if whole_digest(subject.source, file, subject.files[file], subject.progress) != stated:
            yield finding("S09", "its SHA-256 is not that of the file that was written", file, hint=_HINT)


def _outputs(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    listed = record.get("outputs")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    return {e["file"]: e for e in entries if isinstance(e.get("file"), str)}


def recorded_steps(subject: Context) -> list[str]:
    """Return the operations that the provenance says made this checkpoint."""
    recipe = (subject.object_or_none(PROVENANCE) or {}).get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    return [str(name) for step in steps if isinstance(step, dict) for name in step] if isinstance(steps, list) else []
