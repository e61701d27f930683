"""Options of commands that look as well as of those that write: light, so that a short command starts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A checkpoint folder, a GGUF file, hf://org/name[@revision], a URL, or a recipe.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
SchedulerAddress = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Use the workers of a Dask cluster, tcp://HOST:8786; or local:N processes.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture", metavar="FILE", help="Draw what was decided or measured: .svg, .html, or .png (matplotlib)."
    ),
]
