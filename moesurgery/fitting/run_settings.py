"""How models are run over text: what `--window`, `--limit`, `--seed`, `--device` and `--dtype` say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.dtypes import COMMON_DTYPES
from moesurgery.errors import RecipeError
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    from moesurgery.forward.engine import Engine
    from moesurgery.forward.text_windows import Domain

WINDOW = 512
TOKENS = 49_152  # of calibration text


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
    """`limit` is windows per file at most; `seed` draws them at random, where the first ones are taken without."""

    window: int = WINDOW
    limit: int | None = None
    seed: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise RecipeError for a dtype or device that is not there."""
        if self.dtype not in COMMON_DTYPES:
            raise RecipeError(f"--dtype {self.dtype}: expected {', '.join(COMMON_DTYPES)}")
        check_device(self.device)

    def engine(self, plan: Plan) -> Engine:
        """Return what runs a plan's model."""
        from moesurgery.forward.engine import Engine

        return Engine(plan, device=self.device, dtype=self.dtype)

    def domains(self, checkpoint: Checkpoint, texts: Sequence[str | Path]) -> list[Domain]:
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
