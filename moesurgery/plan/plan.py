"""A plan: the output checkpoint before it exists.

An ordered map from tensor name to expression, the edited config, the files to carry over, and a log of
what was done. Operations take a plan and return another; nothing is read but headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.strict_json import not_finite
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Expr, Stored
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.quantised import holds_quantised
from moesurgery.families.recognition import recognise
from moesurgery.plan.side_files import without_quantisation_files


@dataclass(frozen=True)
class Table:
    """Rows to print; the same data is in a step's `report`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Step:
    """One operation as it was applied. `report` holds what it decided, as data; `warnings` go to stderr too.

    Parameters name models as the user did, and `parents` identifies those: for a model with an adapter on it both,
    for an earlier stage of a merge its name. `places` are the paths in `parameters` where they occur, with the
    values there; None where the operation's declaration gives them. `origin` is the recipe file that
    warnings begin with. `neurons` has, by block, those that stay in each expert where some go: for plan files alone, as
    they are too many for records.
    """

    operation: str
    parameters: Mapping[str, Any]
    summary: str
    details: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[str, ...] = ()
    parents: Mapping[str, tuple[Checkpoint | str, ...]] = field(default_factory=dict)
    places: Mapping[tuple[str | int, ...], str] | None = None
    origin: str = ""
    neurons: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Plan:
    """The checkpoint that will be written.

    `shard_of` names, for each tensor, the source shard that it is written to; shard boundaries follow it unless
    `max_shard_size` (bytes) is set. `sources` are all checkpoints that were opened, the first being the
    one whose side files are carried over. `files` are more side files, by path in the output: their content, or
    None for one that is not carried over. `companions` are safetensors files that are no part of the model (an
    adapter beside it), by path.
    """

    sources: tuple[Checkpoint, ...]
    tensors: Mapping[str, Expr]
    shard_of: Mapping[str, str]
    config: Mapping[str, Any]
    steps: tuple[Step, ...] = ()
    max_shard_size: int | None = None
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    companions: Mapping[str, Mapping[str, Expr]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.sources[0]

    @cached_property
    def anatomy(self) -> Anatomy:
        """The anatomy of the planned model."""
        return recognise(self.config, self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(expr.nbytes for expr in self.tensors.values())

    @property
    def companion_nbytes(self) -> int:
        return sum(expr.nbytes for tensors in self.companions.values() for expr in tensors.values())

    def edited(
        self,
        step: Step,
        *,
        tensors: Mapping[str, Expr] | None = None,
        config: Mapping[str, Any] | None = None,
        shard_of: Mapping[str, str] | None = None,
        files: Mapping[str, bytes | None] | None = None,
        companions: Mapping[str, Mapping[str, Expr]] | None = None,
    ) -> Plan:
        """Return the plan after `step`, with what it changed; `files` and `companions` are added to those there are.

        Files that describe quantised weights are removed where none is left. Raises RefusedError where weights change
        for which a companion has been planned: it would not fit them; and for a config with NaN, or with an infinity
        that it did not have.
        """
        if self.companions and tensors is not None and tensors != self.tensors:
            raise RefusedError(
                f"{step.operation}: {', '.join(self.companions)} was planned for the weights before this step",
                f"put `- {step.operation}: …` before `- {self.steps[-1].operation}: …`",
            )
        for key, number in not_finite(config or {}):
            if number != number or (key, number) not in set(not_finite(self.config)):
                raise RefusedError(
                    f"{step.operation}: {key} in config.json would be {number}, which is no number of JSON",
                    f"give {key} a number in config.json, and look at the values with `moesurgery validate`",
                )
        stale: Mapping[str, bytes | None] = {}
        if tensors is not None and holds_quantised(self.tensors) and not holds_quantised(tensors):
            stale = without_quantisation_files(self.checkpoint, self.files)
        return replace(
            self,
            tensors=self.tensors if tensors is None else tensors,
            config=self.config if config is None else config,
            shard_of=self.shard_of if shard_of is None else shard_of,
            files={**self.files, **stale, **(files or {})},
            companions={**self.companions, **(companions or {})},
            steps=(*self.steps, step),
        )

    def with_tensors(self, changed: Mapping[str, Expr]) -> dict[str, Expr]:
        """Return the tensors with those in `changed` replaced, in the same order."""
        return {name: changed.get(name, expr) for name, expr in self.tensors.items()}

    def substituted(self, changes: Mapping[str, Sequence[tuple[str, Expr]]]) -> tuple[dict[str, Expr], dict[str, str]]:
        """Return tensors and homes with each name in `changes` replaced, in its place, by the entries given for it.

        No entries means that the tensor is removed. Names may be exchanged freely; two tensors of one name are a bug.
        """
        tensors: dict[str, Expr] = {}
        shard_of: dict[str, str] = {}
        for old, expr in self.tensors.items():
            for name, value in changes.get(old, ((old, expr),)):
                if name in tensors:
                    raise AssertionError(f"{name} would be written twice")
                tensors[name], shard_of[name] = value, self.shard_of[old]
        return tensors, shard_of

    def untouched(self) -> Iterable[str]:
        """Yield the names whose bytes are those of the source tensor of the same name."""
        for name, expr in self.tensors.items():
            if isinstance(expr, Stored) and expr.info.name == name:
                yield name


def plan_of(checkpoint: Checkpoint) -> Plan:
    """Return the plan that copies `checkpoint` as it is. Raises CheckpointError if only headers are there."""
    if checkpoint.headers_only:
        raise CheckpointError(
            f"{checkpoint.source.identity} holds headers only, no weights", "count-params and inspect work on it"
        )
    tensors: dict[str, Expr] = {name: Stored(checkpoint.source, info) for name, info in checkpoint.tensors.items()}
    shard_of = {name: info.file for name, info in checkpoint.tensors.items()}
    return Plan((checkpoint,), tensors, shard_of, checkpoint.config)
