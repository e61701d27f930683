"""Models as merge recipes name them: a folder, a Hub id with or without revision, an earlier stage."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME
from moesurgery.checkpoint.protocols import refuse_unlisted
from moesurgery.errors import RecipeError
from moesurgery.families.config_keys import DTYPE_KEYS
from moesurgery.families.quantised import method as quantisation_method
from moesurgery.lora.apply import adapted
from moesurgery.moe.canonical_names import CanonicalTensors
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.plan.requantise import opened

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Models:
    """The models of a recipe, each opened once. `stages` are the plans of earlier stages by name.

    `where`: what to open for every name that the recipe has, for one that is replayed from a record: what it does not
    list is not opened. `own`: the references are from a command line, and may be of any protocol.
    """

    def __init__(self, where: Mapping[str, str] | None = None, *, own: bool = False) -> None:
        self.stages: dict[str, Plan] = {}
        self._where = where
        self._own = own
        self._parts: dict[tuple[str, bool], CanonicalTensors] = {}
        self._parents: dict[str, tuple[Checkpoint | str, ...]] = {}

    def parts(self, reference: str, *, plain: bool) -> CanonicalTensors:
        """Return a model taken apart; with `plain`, quantised weights as the numbers that they stand for.

        Raises CheckpointError where it cannot be opened, RefusedError for quantised forms that are not known.
        """
        if (reference, plain) not in self._parts:
            model, adapter = self._split(reference)
            staged = self.stages.get(model)
            plan = staged or plan_of(open_checkpoint(self._located(model)))
            plan.checkpoint.refuse_gguf("merges are of safetensors")
            parents: tuple[Checkpoint | str, ...] = (model if staged else plan.checkpoint,)
            quantised = plain and quantisation_method(plan.config) is not None
            stated = _stated_dtype(plan) if quantised else None
            plan = opened(plan) if quantised else plan  # as float32, which is rounded only once it is merged
            if adapter is not None:
                plan = adapted(plan, self._located(adapter))
                parents = (*parents, plan.sources[-1])
            self._parents[reference] = parents
            self._parts[reference, plain] = CanonicalTensors(plan, label(reference), stated)
        return self._parts[reference, plain]

    def parents(self, reference: str) -> tuple[Checkpoint | str, ...]:
        """Return the checkpoint, or the name of the stage, that a reference was opened as, and the adapter on it."""
        return self._parents[reference]

    def _split(self, reference: str) -> tuple[str, str | None]:
        if reference in self.stages or reference in (self._where or ()):
            return reference, None
        if self._where is None:
            return split(reference)
        model, _, adapter = reference.rpartition("+")
        return (model, adapter) if model else (reference, None)

    def _located(self, reference: str) -> str:
        if self._where is None:
            if not self._own:
                refuse_unlisted(reference)
            return located(reference)
        if reference not in self._where:
            raise RecipeError(f"the recipe names {reference}, and nothing says where that is")
        return located(self._where[reference])


def _stated_dtype(plan: Plan) -> str:
    """Return the dtype that config.json gives a quantised model's weights; bf16 where it does not say."""
    sections = [plan.config, *(v for v in plan.config.values() if isinstance(v, dict))]
    names = (section.get(key) for section in sections for key in DTYPE_KEYS)
    return next((BY_CONFIG_NAME[name] for name in names if isinstance(name, str) and name in BY_CONFIG_NAME), "BF16")


def located(reference: str) -> str:
    """Return what `open_checkpoint` takes: what looks like a Hub id and is no folder here is one."""
    here = os.path.expanduser(reference)
    if "://" in reference or os.path.exists(here):
        return here if reference.startswith("~") else reference
    return f"hf://{reference}" if _HUB_ID.fullmatch(reference) else reference


def split(reference: str) -> tuple[str, str | None]:
    """Split `model+adapter`; a folder whose own name has a plus is one model."""
    model, plus, adapter = reference.rpartition("+")
    return (model, adapter) if plus and not os.path.exists(os.path.expanduser(reference)) else (reference, None)


def label(reference: str) -> str:
    """Return what a model is called in a card: a Hub id, or the name of a folder, never a local path."""
    model, adapter = split(reference)
    if adapter is not None:
        return f"{label(model)}+{label(adapter)}"
    path = located(reference)
    return path.removeprefix("hf://") if path.startswith("hf://") else Path(path).name
