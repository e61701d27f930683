"""`moesurgery push`: a finished checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._common_options import Json, Quiet
from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._writing import hide_bars_of_the_hub


def push_command(
    folder: Annotated[Path, typer.Argument(help="A finished checkpoint.")],
    repository: Annotated[str, typer.Argument(help="The repository, org/name; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to commit to; made where there is none. [main]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is there; the Hub's history keeps it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; no request is made.")] = False,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Send it though its headers and config do not agree.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a checkpoint to the Hub in one commit, with a card that names licence and base model.

    An interrupted upload goes on with the same command. A model larger than the disk is written straight to the Hub:
    any writer with -o hf://org/name.
    """
    from moesurgery.write.hub_upload import prepare_upload, push, repository_of, same_as_bases

    console.quiet = quiet
    to = repository_of(repository, revision)
    upload = prepare_upload(folder)
    if not no_validate:
        _check(folder)
    if upload.left_out:
        console.warning(f"stays here, no part of a checkpoint: {', '.join(upload.left_out[:5])}")
    document = {
        "schema_version": 1,
        "repository": to.url,
        "private": private,
        "files": upload.files,
        "bytes": upload.nbytes,
        "card_changes": list(upload.changes),
    }
    verb = "would send" if dry_run else "sent"
    if not dry_run:
        if quiet or as_json:
            hide_bars_of_the_hub()
        document["commit"] = push(upload, to, private=private, force=force)
        same = same_as_bases(upload, to)
        document["same_as_base"] = same and {"files": same[0], "bytes": same[1]}
    if as_json:
        console.json(document)
        return
    if dry_run:
        console.table(("file", "bytes"), [(name, f"{size:,}") for name, size in upload.files.items()], right=(1,))
    for change in upload.changes:
        console.result(f"README.md: {change}")
    console.result(f"{verb} {human_bytes(upload.nbytes)} in {len(upload.files)} files to {to.url}")
    if not dry_run:
        console.result(str(document["commit"]))
        if same is not None:
            shared = f"{same[0]} of the files, {human_bytes(same[1])}, are those of the base, byte for byte"
            console.result(f"{shared}: stored once (parts of other files that Xet stores once are not told)")


def _check(folder: Path) -> None:
    """Refuse a checkpoint whose headers, config or provenance are wrong."""
    from moesurgery.errors import OutputError
    from moesurgery.validate.run_checks import validate_checkpoint

    report = validate_checkpoint(folder, level="config")
    wrong = [finding for finding in report.findings if finding.severity == "error"]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise OutputError(
            f"{folder} is not right: {wrong[0].code} {wrong[0].message}{more}",
            f"see them all: moesurgery validate {folder}; --no-validate sends it all the same",
        )
