"""`moesurgery pack`: an edit as a patch of a few megabytes, which `moesurgery run` applies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._common_options import Json, Quiet
from moesurgery.cli._console import console, human_bytes


def pack_command(
    edited: Annotated[str, typer.Argument(help="A model that this program wrote: a folder or hf://org/name.")],
    model: Annotated[
        list[str],
        typer.Option("--model", metavar="[NAME=]MODEL", help="A model that it was made from; repeat for a merge."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the patch to.")],
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file", metavar="[NAME=]PATH", help="Statistics or a repair that its recipe reads; found beside EDITED."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a patch of an edited model. Others apply it to the base: `moesurgery run PATCH --model BASE`.

    It holds the recipe, what the recipe reads, and the SHA-256 of every file before and after.
    """
    from moesurgery.patch.make_patch import make_patch
    from moesurgery.write.new_folder import new_folder

    console.quiet = quiet
    with new_folder(output, "pack") as files, console.progress(f"reading {edited}", 0) as watch:
        patch, contents = make_patch(edited, model, file or (), watch.progress)
        files.update(contents)
    kept = sum(each.size for of_name in patch.files.values() for each in of_name) + len(patch.to_json())
    whole = sum(each.size for each in patch.outputs)
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "output": str(output),
                "bytes": kept,
                "bytes_of_model": whole,
                "inputs": list(patch.inputs),
                "files": list(patch.files),
            }
        )
        return
    console.result(f"wrote {output} ({human_bytes(kept)} for a model of {human_bytes(whole)})")
    names = " ".join(f"--model {name.removeprefix('./')}" for name in patch.inputs)
    console.result(f"others apply it: moesurgery run {output} {names} -o OUT")
