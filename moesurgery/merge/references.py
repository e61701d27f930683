"""Models as merge recipes name them: a folder, a Hub id with or without revision, an earlier stage."""

from __future__ import annotations

import re
from pathlib import Path

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.merge.parts import Parts
from moesurgery.plan.plan import Plan, plan_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Models:
    """The models of a recipe, each opened once. `stages` are the plans of earlier stages by name."""

    def __init__(self) -> None:
        self.stages: dict[str, Plan] = {}
        self._parts: dict[str, Parts] = {}

    def parts(self, reference: str) -> Parts:
        """Return a model taken apart. Raises CheckpointError where it cannot be opened."""
        if reference not in self._parts:
            plan = self.stages.get(reference) or plan_of(open_checkpoint(located(reference)))
            self._parts[reference] = Parts(plan, label(reference))
        return self._parts[reference]


def located(reference: str) -> str:
    """Return what `open_checkpoint` takes: what looks like a Hub id and is no folder here is one."""
    if "://" in reference or Path(reference).expanduser().exists():
        return str(Path(reference).expanduser()) if reference.startswith("~") else reference
    return f"hf://{reference}" if _HUB_ID.fullmatch(reference) else reference


def label(reference: str) -> str:
    """Return what a model is called in a card: a Hub id, or the name of a folder, never a local path."""
    place = located(reference)
    return place.removeprefix("hf://") if place.startswith("hf://") else Path(place).name
