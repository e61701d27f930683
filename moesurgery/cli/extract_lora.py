"""`moesurgery extract-lora`: a LoRA adapter out of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._common_options import Json, Quiet
from moesurgery.cli._console import console, human_bytes


def extract_lora_command(
    base: Annotated[str, typer.Argument(help="The model that the adapter will be for.")],
    tuned: Annotated[str, typer.Argument(help="The model whose differences to it are wanted.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of each pair of factors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    as_json: Json = False,
    quiet: Quiet = False,
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
        adapter = extract_lora(first, second, rank, progress=watch.progress)
        files.update(adapter.files)
    if adapter.left:
        shown = ", ".join(adapter.left[:3]) + (f" and {len(adapter.left) - 3} more" if len(adapter.left) > 3 else "")
        console.warning(f"these differ and are not in the adapter, which holds matrices of layers only: {shown}")
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "output": str(output),
                "rank": rank,
                "bytes": adapter.nbytes,
                "shares": dict(adapter.shares),
                "left": list(adapter.left),
                "readers": adapter.readers,
            }
        )
        return
    lowest = sorted(adapter.shares.items(), key=lambda item: item[1])[:5]
    console.table(
        ("least covered", "share of the change"), [(name, f"{share:.1%}") for name, share in lowest], right=(1,)
    )
    console.result(f"wrote {output} ({len(adapter.shares)} pairs of factors, {human_bytes(adapter.nbytes)})")
    console.note(adapter.readers)
