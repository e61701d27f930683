"""What the checks look at: one checkpoint, read as far as it can be, each part at most once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint, checkpoint_of
from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.gguf_header import GgufHeader
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.checkpoint.scan import MAX_CONFIG_BYTES, Scan, read_object
from moesurgery.checkpoint.source import Source
from moesurgery.errors import CheckpointError
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.recognition import recognise


@dataclass
class Context:
    """One checkpoint under examination.

    `against` are the models that its provenance is replayed on; `tolerance` (nats) bounds F02; `client` is the program
    that is to read it; `progress` is told the bytes of weights that were read.
    """

    scan: Scan
    against: tuple[str, ...] = ()
    tolerance: float | None = None
    client: str | None = None
    progress: Callable[[int], None] = field(default=lambda count: None)
    # Facts that are no findings, such as the distance to the reference's logits: they go into the report.
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        return self.scan.source

    @property
    def files(self) -> dict[str, int]:
        return self.scan.sizes

    @property
    def config(self) -> dict[str, Any]:
        return self.scan.config or {}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint; only where `sound`."""
        return checkpoint_of(self.scan)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.checkpoint.tensors

    @property
    def is_gguf(self) -> bool:
        return any(isinstance(header, GgufHeader) for header in self.scan.headers)

    @property
    def sound(self) -> bool:
        """Whether config, index and headers are good enough for what they describe to be looked at."""
        return not any(problem.fatal for problem in self.scan.problems)

    @property
    def broken_blocks(self) -> list[tuple[MoeBlock, CheckpointError]]:
        """The MoE blocks that do not add up, with what is wrong with each."""
        return self._recognised[1]

    @property
    def whole_blocks(self) -> list[MoeBlock]:
        """All other MoE blocks."""
        broken = {id(block) for block, _ in self.broken_blocks}
        return [block for block in self.anatomy.blocks if id(block) not in broken]

    @property
    def anatomy(self) -> Anatomy:
        return self._recognised[0]

    @cached_property
    def _recognised(self) -> tuple[Anatomy, list[tuple[MoeBlock, CheckpointError]]]:
        broken: list[tuple[MoeBlock, CheckpointError]] = []
        return recognise(self.config, self.tensors, broken), broken

    def setting(self, name: str) -> int | None:
        """Return a count of the family's settings; None where the config has none, or gives something else."""
        try:
            count: int | None = getattr(self.anatomy.settings, name)
        except CheckpointError:
            return None  # `malformed` says so
        return count

    def malformed(self, name: str) -> str | None:
        """Say what is wrong with a count of the family's settings."""
        try:
            getattr(self.anatomy.settings, name)
        except CheckpointError as error:
            return error.message.removeprefix(f"{CONFIG}: ")
        return None

    def object(self, file: str) -> dict[str, Any] | None:
        """Return a JSON object that lies beside the weights, None where it is not there.

        Raises ValueError where it is no object, CheckpointError where it cannot be read.
        """
        if file not in self.files:
            return None
        if file not in self._objects:
            try:
                self._objects[file] = read_object(self.source, file, self.files[file], max(MAX_CONFIG_BYTES, 200 << 20))
            except ValueError as error:
                self._objects[file] = error
        parsed = self._objects[file]
        if isinstance(parsed, ValueError):
            raise parsed
        return parsed

    @cached_property
    def _objects(self) -> dict[str, dict[str, Any] | ValueError]:
        return {}

    def object_or_none(self, file: str) -> dict[str, Any] | None:
        """Return a JSON object where there is a readable one: other checks say what is wrong with it."""
        try:
            return self.object(file)
        except (ValueError, CheckpointError):
            return None
