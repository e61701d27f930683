"""Files beside a checkpoint that describe its quantisation: updated with the weights, or removed.

vLLM and SGLang read them where config.json has no quantization_config, and so would take plain weights for packed
ones, or look for modules under old names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.scan import read_object
from moesurgery.checkpoint.strict_json import parse_json, write_json
from moesurgery.errors import RefusedError
from moesurgery.families.quantisation_settings import QUANTISATION_FILES, names_layers, with_renamed_modules

Files = Mapping[str, bytes | None]  # those of a plan: the content of each that differs from the source's, None if gone


def quantisation_files(checkpoint: Checkpoint, files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files that describe how a plan's weights are quantised, with their content.

    Raises RefusedError for one that holds no JSON object: it could not follow an edit.
    """
    for file in QUANTISATION_FILES:
        content = files.get(file, b"")
        if content is None or (not content and file not in checkpoint.side_files):
            continue
        try:
            settings = (
                parse_json(content) if content else read_object(checkpoint.source, file, checkpoint.file_sizes[file])
            )
        except ValueError as error:
            raise RefusedError(
                f"{file} describes how the weights are quantised, and {error}",
                "mend or remove it; `moesurgery validate` looks at it too",
            ) from None
        yield file, settings


def without_quantisation_files(checkpoint: Checkpoint, files: Files) -> dict[str, bytes | None]:
    """Return the removal of the files that describe quantised weights, for a plan without any."""
    there = {*checkpoint.side_files, *files}
    return {file: None for file in QUANTISATION_FILES if file in there and files.get(file, b"") is not None}


def renamed_files(checkpoint: Checkpoint, files: Files, modules: Mapping[str, str | None]) -> dict[str, bytes | None]:
    """Return the files that name modules by old names, with the new ones; `modules` as for `with_renamed_modules`.

    Raises RefusedError where one matches expert numbers by a regular expression.
    """
    if not modules:
        return {}
    return changed_files(checkpoint, files, lambda content, file: with_renamed_modules(content, modules, file))


def changed_files(
    checkpoint: Checkpoint, files: Files, change: Callable[[Mapping[str, Any], str], Any]
) -> dict[str, bytes | None]:
    """Return the files that describe quantisation that `change`, given content and name, makes others of."""
    changed: dict[str, bytes | None] = {}
    for file, content in quantisation_files(checkpoint, files):
        new = change(content, file)
        if new != content:
            changed[file] = write_json(new).encode()
    return changed


def refuse_named_layers(checkpoint: Checkpoint, files: Files) -> None:
    """Raise RefusedError where a file that describes quantisation names layers, for an edit that renumbers layers."""
    for file, content in quantisation_files(checkpoint, files):
        if (listed := names_layers(content)) is not None:
            raise RefusedError(
                f"{file} names {listed}: it cannot follow a new order of layers",
                "dequantise first with `moesurgery convert --dequantize`",
            )
