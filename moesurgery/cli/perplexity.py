"""`moesurgery perplexity`: held-out loss of a checkpoint on text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.cli.console import console
from moesurgery.cli.writing import Json, Quiet
from moesurgery.errors import CheckpointError, RecipeError


def perplexity_command(
    model: Annotated[str, typer.Argument(help="A checkpoint folder.")],
    text: Annotated[list[Path], typer.Argument(help="Text files, one domain each; form feeds separate documents.")],
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Windows per file at most.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's loss and perplexity on text it was not trained on."""
    console.quiet = quiet
    if dtype not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint.source, LocalSource):
        raise CheckpointError(f"{model} is remote", "download it first: hf download org/name --local-dir DIR")

    from moesurgery.measure.perplexity import context_limit, load_model, losses, mean
    from moesurgery.measure.text import load_tokenizer, read_domain, start_token

    longest = context_limit(checkpoint)
    if longest is not None and window > longest:
        raise RecipeError(
            f"--window {window} is longer than the model's {longest} positions", f"use --window {longest}"
        )
    tokenizer = load_tokenizer(checkpoint.source.root)
    domains = [read_domain(path, tokenizer, start_token(checkpoint.config), window, limit) for path in text]
    loaded = load_model(checkpoint.source.root, dtype)
    with console.progress("evaluating", sum(d.windows.numel() for d in domains)) as watch:
        found = losses(loaded, domains, watch.progress)
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "model": checkpoint.source.identity,
                "window": window,
                "dtype": dtype,
                "domains": [
                    {"name": f.domain, "tokens": f.tokens, "nats": f.nats, "perplexity": f.perplexity}
                    for f in (*found, mean(found))
                ],
            }
        )
        return
    shown = found if len(found) == 1 else [*found, mean(found)]
    rows = [(f.domain, f"{f.tokens:,}", f"{f.nats:.4f}", f"{f.perplexity:.3f}") for f in shown]
    console.table(("text", "tokens", "nats/token", "perplexity"), rows, right=(1, 2, 3))
