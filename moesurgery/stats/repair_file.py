"""A repair on disk: what `refit` found for each MoE block, ready to be written into a checkpoint.

A folder with `refit.json` (what was fitted, on what, and how well) and, where weights were fitted, a safetensors file
per block: "e.down" [H, I] is expert e's down-projection, "e.gate" and "e.up" [I, H] its others, "e.kept" [I] the
neurons that it keeps where the repair is that of `slim-experts`, "router" the block's router as it is stored, and
"bias" the bias by which it selects.
Blocks are written one by one, so that none stays in memory; `refit.json` comes last, so a folder without it is an
incomplete repair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.file_mode import follow_umask
from moesurgery.checkpoint.filenames import REPAIR_INDEX
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.scan import MAX_CONFIG_BYTES
from moesurgery.checkpoint.source import LocalSource
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.errors import CheckpointError, OutputError, RefusedError
from moesurgery.expr.nodes import Expr, Stored
from moesurgery.moe.scaling import check_factors
from moesurgery.stats import entry_rules
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    import torch

_FORMAT = "moesurgery refit 1"
ROUTER_ENTRY, BIAS_ENTRY = "router", "bias"
_MATRIX = re.compile(r"(0|[1-9][0-9]{0,6})\.(gate|up|down|kept)")
_ABOUT = {
    "format": entry_rules.A_TEXT,
    "kind": entry_rules.A_TEXT,
    "tokens": entry_rules.COUNT,
    "layers": entry_rules.EntryRule("a list", lambda v: isinstance(v, list)),
}
_ALSO = {"text": entry_rules.FILES}
_LAYER = {
    "layer": entry_rules.A_TEXT,
    "factors": entry_rules.maybe(entry_rules.listed(entry_rules.ANY_NUMBER)),
    "file": entry_rules.maybe(entry_rules.A_TEXT),
    "tokens": entry_rules.listed(entry_rules.COUNT),
    "skipped": entry_rules.listed(entry_rules.COUNT),
    "error_before": entry_rules.NUMBER,
    "error_after": entry_rules.NUMBER,
}


# By role, as they are stored: "down" [H, I], "gate" and "up" [I, H]; "kept" [I] are the neurons that stay.
Matrices = dict[str, "torch.Tensor"]


@dataclass
class FittedBlock:
    """The repair of one block: factors [E] (scalar, expert), or the new matrices of experts and of the router, and the
    bias by which it selects.

    `error_before` and `error_after` are sum |y - y'|^2 over the calibration tokens, y' being the edited block's routed
    output, over the sum of squares of the original's; `error_held_out` is the cross-validation error by which the ridge
    was chosen: that of each half of the windows under the solution of the other half. `ridges` has the ridge of each
    solution, None for no change.
    """

    where: str
    factors: list[float] | None = None
    matrices: dict[int, Matrices] = field(default_factory=dict)
    router: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    ridges: list[float | None] = field(default_factory=list)
    error_before: float = 0.0
    error_after: float = 0.0
    error_held_out: float | None = None


class RepairWriter:
    """Writes a repair, block by block. An incomplete repair is started again, a complete one with `force`; with `kept`,
    the entries in `layers` of an incomplete one, it goes on after those.

    Raises OutputError where the folder holds anything else.
    """

    def __init__(self, folder: Path, *, force: bool = False, kept: Sequence[dict[str, Any]] = ()) -> None:
        if folder.is_symlink():
            raise OutputError(f"{folder} is a symbolic link, and no repair", "move it away, or use another -o")
        if folder.exists():
            ours = [folder / REPAIR_INDEX, folder / f"{REPAIR_INDEX}.partial"]
            ours += [file for end in ("", ".partial") for file in folder.glob(f"layer-*.safetensors{end}")]
            if not folder.is_dir() or set(folder.iterdir()) - set(ours):
                raise OutputError(f"{folder} exists, and is no repair", "move it away, or use another -o")
            if ours[0].exists() and not force:
                raise OutputError(f"{folder} exists", "use --force to replace a repair, or another -o")
            for file in set(ours) - {folder / str(entry["file"]) for entry in kept}:
                file.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.layers: list[dict[str, Any]] = list(kept)

    def add(self, fitted: FittedBlock) -> None:
        """Write the fit of a block. Raises RefusedError where it is not finite."""
        from safetensors.torch import save_file

        _check_finite(fitted)
        file = None
        tensors = {f"{e}.{role}": w for e, of_expert in fitted.matrices.items() for role, w in of_expert.items()}
        if fitted.router is not None:
            tensors[ROUTER_ENTRY] = fitted.router
        if fitted.bias is not None:
            tensors[BIAS_ENTRY] = fitted.bias
        if tensors:
            file = f"layer-{len(self.layers):03}.safetensors"
            with whole_file(self.folder / file) as new:
                save_file({name: w.contiguous().cpu() for name, w in tensors.items()}, new)
                follow_umask(new)
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
        document = {"format": _FORMAT, **about, "layers": self.layers}
        with whole_file(self.folder / REPAIR_INDEX) as new:
            new.write_text(write_json(document))


def _check_finite(fitted: FittedBlock) -> None:
    numbers = [*(fitted.factors or ()), fitted.error_before, fitted.error_after, fitted.error_held_out]
    matrices = [w for of_expert in fitted.matrices.values() for w in of_expert.values()]
    matrices += [w for w in (fitted.router, fitted.bias) if w is not None]
    if all(n is None or math.isfinite(n) for n in numbers) and all(bool(w.isfinite().all()) for w in matrices):
        return
    raise RefusedError(
        f"refit: what is fitted for {fitted.where} is not finite: a model computes NaN or infinity on this text",
        "`moesurgery validate --level values` finds bad weights",
    )


@dataclass(frozen=True)
class Repair:
    """A repair as it was read: `about` it, and its entries by block. Weights are opened when asked for."""

    source: LocalSource
    about: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]

    def matrices(self, where: str) -> dict[int, dict[str, Expr]]:
        """Return the fitted matrices [out, in] of a block, by expert and role; none where none was fitted.

        Under "kept" are the numbers [I] of the neurons that an expert keeps.
        """
        by_expert: dict[int, dict[str, Expr]] = {}
        for name, stored in self._stored(where).items():
            if match := _MATRIX.fullmatch(name):
                by_expert.setdefault(int(match[1]), {})[match[2]] = stored
        return by_expert

    def router(self, where: str) -> Expr | None:
        """Return the fitted router of a block as it is stored; None where it was not fitted."""
        return self._stored(where).get(ROUTER_ENTRY)

    def bias(self, where: str) -> Expr | None:
        """Return the fitted selection bias of a block as it is stored; None where it was not fitted."""
        return self._stored(where).get(BIAS_ENTRY)

    def _stored(self, where: str) -> dict[str, Expr]:
        """Return what the file of a block holds, by name. Raises CheckpointError for anything that is no matrix."""
        file = self.layers[where]["file"]
        if file is None:
            return {}
        size = self.source.files().get(file)
        if size is None:
            raise CheckpointError(f"{self.source.identity}/{file} is missing", "make the repair again")
        header = read_header(file, size, lambda start, length: self.source.read(file, start, length))
        for info in header.tensors:
            match = _MATRIX.fullmatch(info.name)
            kept = match is not None and match[2] == "kept"
            vector = kept or info.name == BIAS_ENTRY
            known = match is not None or info.name in (ROUTER_ENTRY, BIAS_ENTRY)
            fits = info.dtype == "I64" and len(info.shape) == 1 if kept else info.dtype in PLAIN_FLOATS
            if not known or not fits or (not vector and len(info.shape) != 2):
                what = f"{info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{self.source.identity}/{file}: {info.name} ({what}) is no matrix of an expert",
                    "make the repair again",
                )
        return {info.name: Stored(self.source, info) for info in header.tensors}


def open_repair(folder: str | Path) -> Repair:
    """Read a repair.

    Raises CheckpointError where the folder holds none, RefusedError where a factor is not finite and positive.
    """
    path = Path(folder) / REPAIR_INDEX
    hint = "make one with `moesurgery … --refit down --text FILE`"
    source = LocalSource(Path(folder).absolute())
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes, and a repair at most {MAX_CONFIG_BYTES:,}")
        sizes = source.files()  # records their states too: none may change from here on
        document = entry_rules.read_document(source.read(REPAIR_INDEX, 0, sizes[REPAIR_INDEX]), _ABOUT, _ALSO)
        if document["format"] != _FORMAT:
            raise CheckpointError(f"{path} is no repair", hint)
        layers: dict[str, dict[str, Any]] = {}
        for i, entry in enumerate(document.pop("layers")):
            entry_rules.check_entries(
                entry, _LAYER, {"error_held_out": entry_rules.maybe(entry_rules.NUMBER)}, f"layer {i}: "
            )
            layers[entry["layer"]] = entry
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read as a repair: {reason}", hint) from None
    again = "`moesurgery validate --level values` finds NaN and infinity in the model; then make the repair again"
    for where, entry in layers.items():
        check_factors(f"{path}: {where}", entry["factors"] or (), again)
    return Repair(source, document, layers)
