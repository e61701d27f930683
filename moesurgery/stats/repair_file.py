"""A repair on disk: what `refit` found for each MoE block, ready to be written into a checkpoint.

A folder with `refit.json` (what was fitted, on what, and how well) and, where weights were fitted, a safetensors file
per block: "e.down" [H, I] is expert e's down-projection, "e.gate" and "e.up" [I, H] its others. Blocks are written one
by one, so that none stays in memory; `refit.json` comes last, so a folder without it is half a repair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.scan import MAX_CONFIG_BYTES
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError, OutputError
from moesurgery.expr.nodes import Expr, Stored
from moesurgery.stats import entry_rules
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    from moesurgery.fitting.layer_fit import FittedBlock

INDEX = "refit.json"
FORMAT = "moesurgery refit 1"
_MATRIX = re.compile(r"(0|[1-9][0-9]{0,6})\.(gate|up|down)")
_ABOUT = {
    "format": entry_rules.TEXT,
    "kind": entry_rules.TEXT,
    "tokens": entry_rules.COUNT,
    "layers": entry_rules.Rule("a list", lambda v: isinstance(v, list)),
}
_ALSO = {"text": entry_rules.FILES}
_LAYER = {
    "layer": entry_rules.TEXT,
    "factors": entry_rules.maybe(entry_rules.listed(entry_rules.NUMBER)),
    "file": entry_rules.maybe(entry_rules.TEXT),
    "tokens": entry_rules.listed(entry_rules.COUNT),
    "skipped": entry_rules.listed(entry_rules.COUNT),
    "error_before": entry_rules.NUMBER,
    "error_after": entry_rules.NUMBER,
}


class RepairWriter:
    """Writes a repair, block by block. Half a repair is begun again, a whole one with `force`.

    Raises OutputError where the folder holds anything else.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        if folder.is_symlink():
            raise OutputError(f"{folder} is a symbolic link, and no repair", "move it away, or use another -o")
        if folder.exists():
            ours = [folder / INDEX, folder / f"{INDEX}.partial"]
            ours += [file for end in ("", ".partial") for file in folder.glob(f"layer-*.safetensors{end}")]
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
            with whole_file(self.folder / file) as new:
                save_file({name: w.contiguous().cpu() for name, w in tensors.items()}, new)
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
        with whole_file(self.folder / INDEX) as new:
            new.write_text(json.dumps(document, indent=2) + "\n")


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
            match = _MATRIX.fullmatch(info.name)
            if match is None or len(info.shape) != 2 or info.dtype not in PLAIN_FLOATS:
                what = f"{info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{self.source.identity}/{file}: {info.name} ({what}) is no matrix of an expert",
                    "make the repair again",
                )
            found.setdefault(int(match[1]), {})[match[2]] = Stored(self.source, info)
        return found


def open_repair(folder: str | Path) -> Repair:
    """Read a repair. Raises CheckpointError where the folder holds none."""
    path = Path(folder) / INDEX
    hint = "make one with `moesurgery … --refit down --text FILE`"
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes, and a repair at most {MAX_CONFIG_BYTES:,}")
        document = entry_rules.read_document(path.read_bytes(), _ABOUT, _ALSO)
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path} is no repair", hint)
        layers: dict[str, dict[str, Any]] = {}
        for i, entry in enumerate(document.pop("layers")):
            entry_rules.check_entries(
                entry, _LAYER, {"error_held_out": entry_rules.maybe(entry_rules.NUMBER)}, f"layer {i}: "
            )
            layers[entry["layer"]] = entry
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read as a repair: {reason}", hint) from None
    return Repair(LocalSource(Path(folder).absolute()), document, layers)
