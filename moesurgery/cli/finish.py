"""`moesurgery finish`: publish an output that was written in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._common_options import Force, Json, Quiet
from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._writer_flags import Checksums, Jobs, ShareWith, group_id
from moesurgery.plan.rounding import rounding_lines
from moesurgery.write.parts import finish_parts
from moesurgery.write.write_plan import WriteOptions


def finish_command(
    output: Annotated[Path, typer.Argument(help="The output that was named when its parts were written.")],
    force: Force = False,
    checksums: Checksums = False,
    jobs: Jobs = None,
    share_with: ShareWith = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that all parts of an output are written (`--part I/N`), and give it its name.

    Needs neither the model nor the recipe. An output that lacks shards stays unpublished.
    """
    console.quiet = quiet
    group = None if share_with is None else group_id(share_with)
    written = finish_parts(output, WriteOptions(jobs=jobs, force=force, checksums=checksums), group=group)
    if as_json:
        document = {"output": str(written.path), "shards": written.shards, "bytes": written.nbytes}
        more = {"rounding": written.rounding} if written.rounding else {}
        console.json({"schema_version": 1, **document, **more})
    else:
        for line in rounding_lines(written.rounding):
            console.result(line)
        console.result(f"published {output} ({human_bytes(written.nbytes)} in {written.shards} shards)")
