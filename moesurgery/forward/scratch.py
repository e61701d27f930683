"""Saved state of passes between two layers, in a folder, so that a killed process can be resumed.

    state.json                   what identifies the passes, the next layer, how windows were batched; written last
    layer-NNN.R.B.safetensors    what the layer before NNN returned in pass R for batch B: hidden states
    sums-NNN.safetensors         sums of the blocks that were passed since the last time

Every file is written under a temporary name and renamed, so a folder is always in a consistent state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.forward.batch_passes import BatchPasses
from moesurgery.forward.unit_runner import Resume, UnitRunner

if TYPE_CHECKING:
    import torch

SAVE_SECONDS = 60.0  # a layer that takes less is not worth writing its hidden states
STATE = "state.json"

Sums = dict[str, dict[str, Any]]  # by block, then by name, as torch tensors


@dataclass(frozen=True)
class ScratchState:
    """What was kept: the next layer, the windows per batch, the sums (on the processor), the entries, and for each
    pass the outputs of all batches."""

    layer: int
    batch: int
    sums: Sums
    entries: list[Any]
    outputs: list[list[Any]]

    def resume(self, number: int) -> Resume:
        """Return where a pass goes on."""
        return Resume(self.layer, self.outputs[number])


@dataclass
class Scratch:
    """Where passes keep their state. `about` is their inputs and settings: a state with another `about` is discarded.

    `entries` are plain data that are kept with it, such as what was written elsewhere of the layers so far.
    """

    folder: Path
    about: Mapping[str, Any]
    note: Any = None  # a function that is called with the reason why no state is kept
    entries: list[Any] = field(default_factory=list)
    state: ScratchState | None = None  # what `load` found
    _saved: float = field(default_factory=time.monotonic)
    _blocks: set[str] = field(default_factory=set)
    _layer: int = 0  # the next layer of the state that is kept
    _off: bool = False

    def load(self, runners: Sequence[UnitRunner]) -> ScratchState | None:
        """Return the state of passes by these models; None where nothing of them is kept: then the folder is emptied of
        what others kept."""
        from safetensors import SafetensorError

        try:
            state = json.loads((self.folder / STATE).read_text())
            if state["about"] != json.loads(json.dumps(self.about)):
                raise ValueError("of something else")
            layer = int(state["layer"])
            sums: Sums = {}
            for file in state["sums"]:
                for name, value in self._read(file).items():
                    where, _, key = name.rpartition("/")
                    sums.setdefault(where, {})[key] = value
            outputs = []
            for number, (runner, shapes) in enumerate(zip(runners, state["outputs"], strict=True)):
                device = runner.meta_model.devices[runner.layers[layer - 1].stage]
                outputs.append([self._output(layer, number, i, shape, device) for i, shape in enumerate(shapes)])
            found = ScratchState(layer, int(state["batch"]), sums, list(state["entries"]), outputs)
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError):
            self.remove()
            return None
        self._blocks, self._layer, self.state = set(sums), layer, found
        return found

    def keep(
        self, passes: Sequence[BatchPasses], batch: int, sums: Sums, outputs: Sequence[Sequence[Any]] | None = None
    ) -> None:
        """Write the state of passes before the layer that the last of them has reached, unless the last state was
        written less than SAVE_SECONDS ago. `outputs` are what the layer before returned, where a pass is further."""
        layer = passes[-1].passed
        if self._off or not self._layer < layer < len(passes[-1].runner.layers):
            return
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        if not all(each.resumable for each in passes):
            return self._stop("layers hand each other more than hidden states")
        try:
            self._write([each.outputs for each in passes] if outputs is None else outputs, layer, batch, sums)
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

    def _write(self, outputs: Sequence[Sequence[Any]], layer: int, batch: int, sums: Sums) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before: dict[str, Any] = {"sums": []}
        if self._blocks and (self.folder / STATE).exists():
            before = json.loads((self.folder / STATE).read_text())
        new = {f"{w}/{n}": v for w, named in sums.items() if w not in self._blocks for n, v in named.items()}
        files = [*before["sums"], self._save(f"sums-{layer:03}.safetensors", new)]
        shapes: list[Any] = []
        for number, of_pass in enumerate(outputs):
            shapes.append([])
            for i, output in enumerate(of_pass):
                parts = _parts(output)
                self._save(f"layer-{layer:03}.{number}.{i}.safetensors", {str(n): part for n, part in parts})
                shapes[-1].append([len(output) if isinstance(output, tuple) else None, [n for n, _ in parts]])
        state = {"about": self.about, "layer": layer, "batch": batch, "outputs": shapes, "sums": files}
        (self.folder / f"{STATE}.new").write_text(json.dumps(state | {"entries": self.entries}))
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

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name)

    def _output(self, layer: int, number: int, batch: int, shape: Any, device: torch.device) -> Any:
        """Return what a layer returned: a tensor, or a tuple of `shape[0]` of which those at `shape[1]` are tensors."""
        parts = {n: v.to(device) for n, v in self._read(f"layer-{layer:03}.{number}.{batch}.safetensors").items()}
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
