"""`moesurgery extract-lora`: a LoRA adapter out of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli import _writing
from moesurgery.cli._console import console, human_bytes


def extract_lora_command(
    base: Annotated[str, typer.Argument(help="The model that the adapter will be for.")],
    tuned: Annotated[str, typer.Argument(help="The model whose differences to it are wanted.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of each pair of factors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    as_json: _writing.Json = False,
    quiet: _writing.Quiet = False,
) -> None:
    """Write the LoRA adapter that brings a model nearest to another, experts included.

    Each matrix gets the best approximation of its difference of the given rank (truncated SVD), in PEFT's format.
    """
    from moesurgery.lora.extract import extract_lora
    from moesurgery.merge.references import Models
    from moesurgery.write.new_folder import new_folder

    console.quiet = quiet
    models = Models(own=True)
    first, second = models.parts(base, plain=True), models.parts(tuned, plain=True)
    progress = console.progress(f"extracting {output.name}", first.plan.nbytes)
    with new_folder(output, "extract-lora") as files, progress as watch:
        found = extract_lora(first, second, rank, progress=watch.progress)
        files.update(found.files)
    if found.left:
        shown = ", ".join(found.left[:3]) + (f" and {len(found.left) - 3} more" if len(found.left) > 3 else "")
        console.warning(f"these differ and are not in the adapter, which holds matrices of layers only: {shown}")
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "output": str(output),
                "rank": rank,
                "bytes": found.nbytes,
                "shares": dict(found.shares),
                "left": list(found.left),
                "readers": found.readers,
            }
        )
        return
    lowest = sorted(found.shares.items(), key=lambda item: item[1])[:5]
    console.table(
        ("least covered", "share of the change"), [(name, f"{share:.1%}") for name, share in lowest], right=(1,)
    )
    console.result(f"wrote {output} ({len(found.shares)} pairs of factors, {human_bytes(found.nbytes)})")
    console.note(found.readers)
