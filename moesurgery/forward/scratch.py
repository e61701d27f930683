"""Saved state of a pass between two layers, in a folder, so that a killed process can be resumed.

    state.json                 what identifies the pass, the next layer, how windows were batched; written last
    layer-NNN.B.safetensors    what the layer before NNN returned for batch B: hidden states
    sums-NNN.safetensors       sums of the blocks that were passed since the last time

Every file is written under a temporary name and renamed, so a folder is always in a consistent state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.forward.engine import Resume, Streams

if TYPE_CHECKING:
    import torch

SAVE_SECONDS = 60.0  # a layer that takes less is not worth writing its hidden states
STATE = "state.json"

Sums = dict[str, dict[str, Any]]  # by block, then by name, as torch tensors


@dataclass
class Scratch:
    """Where a pass keeps its state. `about` is its inputs and settings: a state with another `about` is discarded."""

    folder: Path
    about: Mapping[str, Any]
    note: Any = None  # a function that is called with the reason why no state is kept
    _saved: float = field(default_factory=time.monotonic)
    _blocks: set[str] = field(default_factory=set)
    _layer: int = 0  # the next layer of the state that is kept
    _off: bool = False

    def load(self, device: torch.device) -> tuple[Resume, int, Sums] | None:
        """Return where to go on, the windows per batch and the sums so far; None where nothing of this pass is kept."""
        from safetensors import SafetensorError

        try:
            state = json.loads((self.folder / STATE).read_text())
            if state["about"] != json.loads(json.dumps(self.about)):
                raise ValueError("of something else")
            layer = int(state["layer"])
            sums: Sums = {}
            for file in state["sums"]:
                for name, value in self._read(file, device).items():
                    where, _, key = name.rpartition("/")
                    sums.setdefault(where, {})[key] = value
            outputs = [self._output(layer, i, shape, device) for i, shape in enumerate(state["outputs"])]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        self._blocks, self._layer = set(sums), layer
        return Resume(layer, outputs), int(state["batch"]), sums

    def keep(self, streams: Streams, batch: int, sums: Sums) -> None:
        """Write the state of a pass before a layer, unless the last state was written less than SAVE_SECONDS ago."""
        layer = streams.passed
        if self._off or not self._layer < layer < len(streams.engine.layers):
            return
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        if not streams.resumable:
            return self._stop("layers hand each other more than hidden states")
        try:
            self._write(streams, layer, batch, sums)
        except OSError as error:
            self._stop(error.strerror or str(error))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove what was kept, and the folder where nothing else is in it."""
        for pattern in (STATE, f"{STATE}.new", "layer-*.safetensors*", "sums-*.safetensors*"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _stop(self, why: str) -> None:
        self._off = True
        self.remove()
        if self.note is not None:
            self.note(f"what is done is not kept in {self.folder}, and could not be resumed: {why}")

    def _write(self, streams: Streams, layer: int, batch: int, sums: Sums) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before: dict[str, Any] = {"sums": []}
        if self._blocks and (self.folder / STATE).exists():
            before = json.loads((self.folder / STATE).read_text())
        new = {f"{w}/{n}": v for w, named in sums.items() if w not in self._blocks for n, v in named.items()}
        files = [*before["sums"], self._save(f"sums-{layer:03}.safetensors", new)]
        shapes = []
        for i, stream in enumerate(streams.streams):
            parts = _parts(stream.last)
            self._save(f"layer-{layer:03}.{i}.safetensors", {str(n): part for n, part in parts})
            shapes.append([len(stream.last) if isinstance(stream.last, tuple) else None, [n for n, _ in parts]])
        state = {"about": self.about, "layer": layer, "batch": batch, "outputs": shapes, "sums": files}
        (self.folder / f"{STATE}.new").write_text(json.dumps(state))
        os.replace(self.folder / f"{STATE}.new", self.folder / STATE)
        self._blocks, self._layer = self._blocks | set(sums), layer
        for old in self.folder.glob("layer-*.safetensors"):
            if not old.name.startswith(f"layer-{layer:03}."):
                old.unlink()

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        from safetensors.torch import save_file

        path = self.folder / f"{name}.new"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, self.folder / name)
        return name

    def _read(self, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return {key: value.to(device) for key, value in load_file(self.folder / name).items()}

    def _output(self, layer: int, batch: int, shape: Any, device: torch.device) -> Any:
        """Return what a layer returned: a tensor, or a tuple of `shape[0]` of which those at `shape[1]` are tensors."""
        parts = self._read(f"layer-{layer:03}.{batch}.safetensors", device)
        count, places = shape
        if count is None:
            return parts["0"]
        return tuple(parts[str(i)] if i in places else None for i in range(count))


def _parts(output: Any) -> list[tuple[int, torch.Tensor]]:
    parts = output if isinstance(output, tuple) else (output,)
    return [(i, part) for i, part in enumerate(parts) if part is not None]


def scratch_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Return about what a pass writes at most: hidden states of two layers, for a moment."""
    return 2 * tokens * hidden * itemsize


def each_part(folder: Path, count: int) -> Iterator[Path]:
    """Yield a folder for each of several devices; the folder itself for one."""
    for i in range(count):
        yield folder if count == 1 else folder / str(i)
