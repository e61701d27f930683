"""One thing that is wrong with a checkpoint: what the strict readers find and what `validate` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesurgery.errors import CheckpointError

Severity = Literal["error", "warning", "note"]

DAMAGED = "download or copy the file again; `moesurgery validate` lists everything that is wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `code` is stable: docs/codes.md lists them all.

    `file` is relative to the checkpoint. `fatal`: no command may use a checkpoint of which this is true.
    """

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None
    severity: Severity = "error"
    fatal: bool = False

    @property
    def where(self) -> str:
        """Name the file and the tensor that it is about, as far as it is about one."""
        tensor = f"tensor {self.tensor!r}" if self.tensor is not None else None
        return ": ".join(part for part in (self.file, tensor) if part)

    def as_error(self, root: str | None = None) -> CheckpointError:
        """Return the error with which a command refuses the checkpoint `root`."""
        where = self.where
        if root and where:  # what is about no file names the checkpoint itself
            where = f"{root}/{where}" if self.file else f"{root}: {where}"
        return CheckpointError(f"{where}: {self.message}" if where else self.message, self.hint or DAMAGED)
