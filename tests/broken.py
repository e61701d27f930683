"""A copy of a good checkpoint, and what breaks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class BrokenCheckpoint:
    """A checkpoint in `folder`, to be broken in one way and otherwise kept right. `origin` is the good one."""

    folder: Path
    origin: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def json(self, file: str, edit: Callable[[dict[str, Any]], Any]) -> None:
        """Edit a JSON object in place; `edit` may return another value to write."""
        path = self.folder / file
        value = json.loads(path.read_text())
        changed = edit(value)
        path.write_text(json.dumps(value if changed is None or not isinstance(changed, dict | list) else changed))

    def config(self, *without: str, **changes: Any) -> None:
        def edit(config: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in {**config, **changes}.items() if k not in without}

        self.json("config.json", edit)

    def text(self, file: str, text: str | bytes) -> Path:
        path = self.folder / file
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for shard in self.shards for name, tensor in load_file(shard).items()}

    def put(self, **changes: torch.Tensor | None) -> None:
        """Replace, add or (None) remove tensors; the index stays right."""
        self.update(changes)

    def update(self, changes: dict[str, torch.Tensor | None]) -> None:
        shard_of = {name: shard for shard in self.shards for name in load_file(shard)}
        for shard in self.shards:
            mine = {n: t for n, t in changes.items() if shard_of.get(n, self.shards[-1]) == shard}
            if mine:
                kept = {**load_file(shard), **mine}
                save_file(
                    {n: t.contiguous().clone() for n, t in kept.items() if t is not None},
                    shard,
                    metadata={"format": "pt"},
                )
        self.reindex()

    def edit(self, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Replace one tensor by what `edit` makes of it; None where it was changed in place."""
        tensor = self.tensors()[name]
        changed = edit(tensor)
        self.update({name: tensor if changed is None else changed})

    def rename(self, edit: Callable[[str], str]) -> None:
        for shard in self.shards:
            save_file({edit(n): t for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
        self.reindex()

    def reindex(self) -> None:
        if (self.folder / INDEX).exists():
            held = {shard.name: load_file(shard) for shard in self.shards}
            total = sum(t.numel() * t.element_size() for tensors in held.values() for t in tensors.values())
            weight_map = {name: file for file, tensors in held.items() for name in tensors}
            self.text(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))

    def header(self, edit: Callable[[dict[str, Any]], Any], shard: int = 0) -> None:
        """Edit the header of a shard as data, or return the bytes that take its place."""
        path = self.shards[shard]
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        changed = edit(table)
        text = changed if isinstance(changed, bytes) else json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    def bytes(self, edit: Callable[[bytearray], Any], shard: int = 0) -> None:
        """Edit the bytes of a shard, or return those that take their place."""
        path = self.shards[shard]
        raw = bytearray(path.read_bytes())
        changed = edit(raw)
        path.write_bytes(changed if isinstance(changed, bytes | bytearray) else raw)

    def single(self) -> None:
        """Put all tensors into one file without an index."""
        tensors = self.tensors()
        for path in (*self.shards, self.folder / INDEX):
            path.unlink(missing_ok=True)
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})


def make_broken(origin: Path, folder: Path) -> BrokenCheckpoint:
    shutil.copytree(origin, folder, symlinks=True)
    return BrokenCheckpoint(folder, origin)
