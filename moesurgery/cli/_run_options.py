"""What the commands that run models share: options, the model or recipe to run, and the text to run it on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.cli._console import console
from moesurgery.errors import RecipeError
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.reader import load_any_recipe

if TYPE_CHECKING:
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import Tokens

DTYPES = ("float32", "bfloat16", "float16")

ModelOrRecipe = Annotated[
    str, typer.Argument(help="A checkpoint (folder, hf://, URL), or a recipe of one never written.")
]
Texts = Annotated[
    list[Path], typer.Option("--text", help="Text or JSONL (text, or input_ids) to measure on; repeat for more.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Windows per file at most.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Draw the windows at random by this seed instead of the first ones.")
]
TOKENS = 49_152
CalibrationTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens to run over, in equal parts from each file.")
]
CalibrationSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample of windows.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="What to compute in: float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, or cuda where there is a GPU.")]


def check_device(name: str) -> None:
    """Raise RecipeError for a device that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: {error}".splitlines()[0], "use cpu or cuda") from None
    if device.type != "cpu" and (device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"--device {name}: torch sees no such device here", "use --device cpu")


@dataclass(frozen=True)
class Run:
    """How a command is to run models."""

    window: int = 512
    limit: int | None = None
    seed: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise RecipeError for a dtype or device that is not there."""
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype {self.dtype}: expected {', '.join(DTYPES)}")
        check_device(self.device)

    def engine(self, plan: Plan) -> Engine:
        from moesurgery.forward.engine import Engine

        return Engine(plan, device=self.device, dtype=self.dtype)

    def calibration(
        self, checkpoint: Checkpoint, texts: list[Path], tokens: int, hold_out: int = 0
    ) -> tuple[Tokens, list[Domain]]:
        """Read windows of all files, drawn by the seed and mixed, so that every part of them is balanced.

        With `hold_out`, one window in so many of each file is kept out and returned by itself.
        """
        from moesurgery.forward.text_windows import Domain
        from moesurgery.forward.tokens import mixed

        limit = max(2 if hold_out else 1, tokens // self.window // len(texts))
        found = replace(self, limit=limit).domains(checkpoint, texts)
        if not hold_out:
            return mixed([d.windows for d in found]), []
        cuts = [len(d.windows) - max(1, len(d.windows) // hold_out) for d in found]
        kept = [Domain(d.name, d.windows[cut:]) for d, cut in zip(found, cuts, strict=True)]
        return mixed([d.windows[:cut] for d, cut in zip(found, cuts, strict=True) if cut]), kept

    def domains(self, checkpoint: Checkpoint, texts: list[Path]) -> list[Domain]:
        """Read the text files as windows of the model's tokens."""
        from moesurgery.forward.loss import context_limit
        from moesurgery.forward.text_windows import load_tokenizer, read_domain, start_token, token_count

        longest = context_limit(checkpoint)
        if longest is not None and self.window > longest:
            raise RecipeError(
                f"--window {self.window} is longer than the model's {longest} positions", f"use --window {longest}"
            )

        @cache
        def tokenizer() -> Any:
            return load_tokenizer(checkpoint)

        start, count = start_token(checkpoint.config), token_count(checkpoint.config)
        return [read_domain(path, tokenizer, start, self.window, self.limit, self.seed, count) for path in texts]


def calibrated_on(plan: Plan, windows: Tokens, run: Run, texts: list[Path]) -> dict[str, Any]:
    """Return all that decides what is measured on calibration text, for provenance: see `beside.differences`."""
    return {
        "model": plan.checkpoint.source.identity,
        "fingerprint": fingerprint(plan),
        "text": described(texts),
        "tokens": windows.count,
        "window": run.window,
        "seed": run.seed,
        "dtype": run.dtype,
        "token_ids": windows.digest,
    }


def described(texts: list[Path]) -> list[dict[str, str]]:
    """Return name and SHA-256 of text files, for provenance."""
    from moesurgery.stats.statistics_file import digest

    return [{"file": path.name, "sha256": digest(path)} for path in texts]


def subject(reference: str) -> Plan:
    """Return the plan of a checkpoint, or of a recipe file, which is not written."""
    if reference.endswith((".yaml", ".yml")) and os.path.isfile(reference):
        plan = load_any_recipe(reference).plan()
        for step in plan.steps:
            console.note(f"{reference}: {step.operation}: {step.summary}")
        return plan
    return plan_of(open_checkpoint(reference))
