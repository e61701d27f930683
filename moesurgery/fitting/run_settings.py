"""How models are run over text: what `--window`, `--limit`, `--seed`, `--device`, `--dtype` etc. set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.dtypes import COMMON_DTYPES
from moesurgery.errors import RecipeError
from moesurgery.forward.memory_budget import parse_bytes
from moesurgery.forward.text_documents import Text
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.text_windows import Domain
    from moesurgery.forward.tokens import Tokens

WINDOW = 512
TOKENS = 49_152  # of calibration text
AUTO = "auto"


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
class RunSettings:
    """`limit` is windows per file at most; with `seed` they are a random sample, without it the first ones. `skip`
    leaves out those of a limit of as many.

    `device` is one, or "cuda" for all GPUs that are visible; `dtype` one of float32, bfloat16 and float16, or "auto".
    `memory` bounds the memory used on each device, as 40GB. With `apart` documents have windows of their own, with
    `assistant_only` only the assistant's tokens count.
    """

    window: int = WINDOW
    limit: int | None = None
    seed: int | None = None
    device: str = "cpu"
    dtype: str = AUTO
    memory: str = ""
    apart: bool = False
    assistant_only: bool = False
    skip: int = 0

    def check(self) -> None:
        """Raise RecipeError for a dtype or device that is not there, and for `memory` that is no amount."""
        if self.dtype not in (AUTO, *COMMON_DTYPES):
            raise RecipeError(f"--dtype {self.dtype}: expected {', '.join((AUTO, *COMMON_DTYPES))}")
        check_device(self.device)
        if self.memory:
            parse_bytes(self.memory)

    @property
    def devices(self) -> list[str]:
        """The devices that windows, or the layers of a model that one of them does not hold, are split among."""
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

    def engine(self, plan: Plan, tokens: Tokens) -> Engine:
        """Return one engine for a plan's model: on the first device where that holds it, else over all of them."""
        return self._one(plan, tokens, self.devices)

    def engines(self, plan: Plan, tokens: Tokens) -> list[Engine]:
        """Return engines for a plan's model to share the windows `tokens`: one on each device where each holds the
        model, else one over all devices."""
        return [group[0] for group in self.groups([plan], tokens)]

    def groups(self, plans: Sequence[Plan], tokens: Tokens) -> list[list[Engine]]:
        """Return engines for several models in groups that share the windows `tokens`: all models on each device where
        they fit together, else one group with each model over all devices."""
        devices = self.devices
        first = [self._on(plan, devices[:1]) for plan in plans]
        if len(devices) == 1:
            return [first]
        if all(engine.fits(tokens) for engine in first):
            return [first, *([self._on(plan, [device]) for plan in plans] for device in devices[1:])]
        del first
        return [[self._on(plan, devices) for plan in plans]]

    def edits(self, plans: Sequence[Plan], tokens: Tokens) -> list[list[Engine]]:
        """Return engines for a model and edits of it, in groups that share the windows `tokens` as `engines` does for
        the first; the others use what it has loaded."""
        return [[engine, *(engine.sharing(plan) for plan in plans[1:])] for engine in self.engines(plans[0], tokens)]

    def pair(self, original: Plan, edited: Plan, tokens: Tokens) -> tuple[Engine, Engine]:
        """Return engines for two models that run side by side, each on half of the devices where there are several."""
        devices, half = self.devices, len(self.devices) // 2
        return self._one(original, tokens, devices[:half] or devices), self._one(edited, tokens, devices[half:])

    def _one(self, plan: Plan, tokens: Tokens, devices: Sequence[str]) -> Engine:
        engine = self._on(plan, devices[:1])
        return engine if len(devices) == 1 or engine.fits(tokens) else self._on(plan, devices)

    def _on(self, plan: Plan, devices: Sequence[str]) -> Engine:
        from moesurgery.forward.engine import Engine

        memory = parse_bytes(self.memory) if self.memory else 0
        return Engine(plan, device=devices, dtype=self.computed_in, memory=memory)

    def domains(self, checkpoint: Checkpoint, texts: Sequence[str | Path]) -> list[Domain]:
        """Read the text files as windows of the model's tokens."""
        return [self.domain(checkpoint, Text(str(text))) for text in texts]

    def domain(self, checkpoint: Checkpoint, text: Text) -> Domain:
        """Read one text file as windows of the model's tokens."""
        from moesurgery.forward.loss import context_limit
        from moesurgery.forward.text_windows import Reading, read_domain

        longest = context_limit(checkpoint)
        if longest is not None and self.window > longest:
            raise RecipeError(
                f"--window {self.window} is longer than the model's {longest} positions", f"use --window {longest}"
            )
        reading = Reading(checkpoint, self.assistant_only)
        return read_domain(text, reading, self.window, self.limit, self.seed, skip=self.skip, apart=self.apart)
