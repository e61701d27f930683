"""What the commands that run models share: options, the model or recipe to run, and the text to run it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.cli._console import console
from moesurgery.errors import RecipeError
from moesurgery.forward.documents import Text, text_of
from moesurgery.forward.memory_budget import parse_bytes
from moesurgery.plan.fingerprint import fingerprint
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.reader import load_any_recipe

if TYPE_CHECKING:
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import Tokens

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"

ModelOrRecipe = Annotated[
    str, typer.Argument(help="A checkpoint (folder, hf://, URL), or a recipe of one never written.")
]
FORMS = "text, JSONL or Parquet (messages, prompt and completion, text, input_ids), also hf://datasets/org/name/file"
Texts = Annotated[list[str], typer.Option("--text", help=f"What to measure on: {FORMS}; repeat for more.")]
WeightedTexts = Annotated[
    list[str],
    typer.Option("--text", help=f"{FORMS[0].upper()}{FORMS[1:]}; FILE=3 for three times the tokens; repeat for more."),
]
Apart = Annotated[
    bool, typer.Option("--apart", help="Each document in windows of its own, so that none attends to another.")
]
AssistantOnly = Annotated[
    bool, typer.Option("--assistant-only", help="Only the assistant's tokens count in what is measured.")
]
Memory = Annotated[
    str,
    typer.Option("--memory", help="What to take of the device's memory: 40GB. By default what is free on a GPU."),
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Windows per file at most.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Draw the windows at random by this seed instead of the first ones.")
]
TOKENS = 49_152
CalibrationTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens to run over, in parts from each file as its weight says.")
]
CalibrationSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sample of windows.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="What to compute in: float32, bfloat16, float16; auto is bfloat16 on a GPU.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu; cuda for all GPUs that are visible; cuda:1 for one of them.")
]
Scratch = Annotated[
    Path | None,
    typer.Option("--scratch", help="Folder for the state between layers, where a killed run goes on. [OUT.scratch]"),
]


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
    dtype: str = AUTO
    memory: str = ""
    apart: bool = False
    assistant: bool = False

    def check(self) -> None:
        """Raise RecipeError for a dtype or device that is not there."""
        if self.dtype not in (AUTO, *DTYPES):
            raise RecipeError(f"--dtype {self.dtype}: expected {', '.join(DTYPES)}")
        check_device(self.device)
        if self.memory:
            parse_bytes(self.memory)

    @property
    def devices(self) -> list[str]:
        """The devices that windows are shared out among."""
        if self.device != "cuda":
            return [self.device]
        import torch

        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]

    @property
    def computed_in(self) -> str:
        """The dtype: bfloat16 on GPUs and float32 on the processor, unless it is named."""
        if self.dtype != AUTO:
            return self.dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"

    def engine(self, plan: Plan) -> Engine:
        """Return an engine on the first of the devices."""
        return self.engines(plan, 1)[0]

    def engines(self, plan: Plan, most: int | None = None) -> list[Engine]:
        """Return an engine for each device."""
        from moesurgery.forward.engine import Engine

        memory = parse_bytes(self.memory) if self.memory else 0
        dtype = self.computed_in
        return [Engine(plan, device=device, dtype=dtype, memory=memory) for device in self.devices[:most]]

    def calibration(
        self, checkpoint: Checkpoint, texts: Sequence[str], tokens: int, hold_out: int = 0
    ) -> tuple[Tokens, list[Domain]]:
        """Read windows of all files, drawn by the seed and mixed, so that every part of them is balanced.

        With `hold_out`, one window in so many of each file is kept out and returned by itself.
        """
        from moesurgery.forward.tokens import mixed

        files = [text_of(text) for text in texts]
        whole = sum(file.weight for file in files)
        least = 2 if hold_out else 1
        found = [
            replace(self, limit=max(least, int(tokens * file.weight / whole / self.window))).domain(checkpoint, file)
            for file in files
        ]
        if not hold_out:
            return mixed([d.as_tokens for d in found]), []
        kept = [d.each(hold_out) for d in found]
        return mixed([rest.as_tokens for rest, _ in kept if len(rest.windows)]), [out for _, out in kept]

    def domains(self, checkpoint: Checkpoint, texts: Sequence[str]) -> list[Domain]:
        """Read the text files as windows of the model's tokens."""
        return [self.domain(checkpoint, Text(text)) for text in texts]

    def domain(self, checkpoint: Checkpoint, text: Text) -> Domain:
        from moesurgery.forward.loss import context_limit
        from moesurgery.forward.text_windows import Reading, read_domain

        longest = context_limit(checkpoint)
        if longest is not None and self.window > longest:
            raise RecipeError(
                f"--window {self.window} is longer than the model's {longest} positions", f"use --window {longest}"
            )
        reading = Reading(checkpoint, self.assistant)
        return read_domain(text, reading, self.window, self.limit, self.seed, apart=self.apart)


def calibrated_on(plan: Plan, windows: Tokens, run: Run, texts: Sequence[str]) -> dict[str, Any]:
    """Return all that decides what is measured on calibration text, for provenance: see `beside.differences`."""
    return {
        "model": plan.checkpoint.source.identity,
        "fingerprint": fingerprint(plan),
        "text": described(texts),
        "tokens": windows.count,
        "window": run.window,
        "seed": run.seed,
        "dtype": run.computed_in,
        "token_ids": windows.digest,
        **({"apart": True} if run.apart else {}),
        **({"assistant_only": True} if run.assistant else {}),
    }


def described(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return name and SHA-256 of text files, for provenance; and the weight, where it is not 1."""
    files = [text_of(text) for text in texts]
    weights = [{"weight": file.weight} if file.weight != 1 else {} for file in files]
    return [{"file": f.name, "sha256": f.digest, **weight} for f, weight in zip(files, weights, strict=True)]


def subject(reference: str) -> Plan:
    """Return the plan of a checkpoint, or of a recipe file, which is not written."""
    if reference.endswith((".yaml", ".yml")) and Path(reference).is_file():
        plan = load_any_recipe(reference).plan()
        for step in plan.steps:
            console.note(f"{reference}: {step.operation}: {step.summary}")
        return plan
    return plan_of(open_checkpoint(reference))
