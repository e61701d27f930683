"""A repair on disk: what `refit` found for each MoE block, ready to be written into a checkpoint.

A folder with `refit.json` (what was fitted, on what, and how well) and, where weights were fitted, a safetensors file
per block: "e.down" [H, I] is expert e's down-projection, "e.gate" and "e.up" [I, H] its others. Blocks are written one
by one, so that none stays in memory; `refit.json` comes last, so a folder without it is half a repair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.file_mode import follow_umask
from moesurgery.checkpoint.filenames import REPAIR_INDEX
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError, OutputError
from moesurgery.expr.nodes import Expr, Stored

if TYPE_CHECKING:
    import torch

FORMAT = "moesurgery refit 1"


Matrices = dict[str, "torch.Tensor"]  # by role, as they are stored: "down" [H, I], "gate" and "up" [I, H]


@dataclass
class FittedBlock:
    """The repair of one block: factors [E] (scalar, expert), or the new matrices of experts.

    `error_before` and `error_after` are sum |y - y'|^2 over the calibration tokens, y' being what the edited block
    adds, over the sum of squares of what the original block added; `error_held_out` is what the ridge was found by,
    the error of each half of the windows under what the other half gives. `ridges` has the ridge of each solution,
    None for no change.
    """

    where: str
    factors: list[float] | None = None
    matrices: dict[int, Matrices] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    ridges: list[float | None] = field(default_factory=list)
    error_before: float = 0.0
    error_after: float = 0.0
    error_held_out: float | None = None


class RepairWriter:
    """Writes a repair, block by block. Half a repair is begun again, a whole one with `force`.

    Raises OutputError where the folder holds anything else.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        if folder.exists():
            ours = [folder / REPAIR_INDEX, *folder.glob("layer-*.safetensors")]
            if not folder.is_dir() or set(folder.iterdir()) - set(ours):
                raise OutputError(f"{folder} exists, and is no repair", "move it away, or use another -o")
            if ours[0].exists() and not force:
                raise OutputError(f"{folder} exists", "use --force to replace a repair, or another -o")
            for file in ours:
                file.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.layers: list[dict[str, Any]] = []

    def add(self, fitted: FittedBlock) -> None:
        from safetensors.torch import save_file

        file = None
        if fitted.matrices:
            file = f"layer-{len(self.layers):03}.safetensors"
            tensors = {f"{e}.{role}": w for e, of_expert in fitted.matrices.items() for role, w in of_expert.items()}
            save_file({name: w.contiguous().cpu() for name, w in tensors.items()}, self.folder / file)
            follow_umask(self.folder / file)
        self.layers.append(
            {
                "layer": fitted.where,
                "factors": fitted.factors,
                "file": file,
                "tokens": fitted.tokens,
                "skipped": fitted.skipped,
                "ridges": fitted.ridges,
                "error_before": fitted.error_before,
                "error_after": fitted.error_after,
                "error_held_out": fitted.error_held_out,
            }
        )

    def close(self, about: Mapping[str, Any]) -> None:
        document = {"format": FORMAT, **about, "layers": self.layers}
        (self.folder / REPAIR_INDEX).write_text(json.dumps(document, indent=2) + "\n")


@dataclass(frozen=True)
class Repair:
    """A repair as it was read: `about` it, and its entries by block. Weights are opened when asked for."""

    source: LocalSource
    about: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]

    def matrices(self, where: str) -> dict[int, dict[str, Expr]]:
        """Return the fitted matrices [out, in] of a block, by expert and role; none where only factors were fitted."""
        file = self.layers[where]["file"]
        if file is None:
            return {}
        size = self.source.files().get(file)
        if size is None:
            raise CheckpointError(f"{self.source.identity}/{file} is missing", "make the repair again")
        header = read_header(file, size, lambda start, length: self.source.read(file, start, length))
        found: dict[int, dict[str, Expr]] = {}
        for info in header.tensors:
            expert, _, role = info.name.partition(".")
            found.setdefault(int(expert), {})[role] = Stored(self.source, info)
        return found


def open_repair(folder: str | Path) -> Repair:
    """Read a repair. Raises CheckpointError where the folder holds none."""
    path = Path(folder) / REPAIR_INDEX
    hint = "make one with `moesurgery … --refit down --text FILE`"
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path} is no repair", hint)
        layers = {str(entry["layer"]): entry for entry in document.pop("layers")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a repair: {error}", hint) from None
    return Repair(LocalSource(Path(folder).absolute()), document, layers)
