"""Entries of a matrix that are packed into 32-bit words: taken out, put in another order, and packed again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moesurgery.expr.nodes import Reader, Unary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedEntries(Unary):
    """The entries `kept` along an axis of a matrix of words (I32) of which each holds `len(order)` entries.

    `order[i]` is the entry of a word in its i-th group of bits, counted from the lowest. Unused entries of the last
    word are zero. The whole matrix is read at once: it is for routers, which are small.
    """

    axis: int
    order: tuple[int, ...]
    kept: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        words = -(-len(self.kept) // len(self.order))
        return (*self.of.shape[: self.axis], words, *self.of.shape[self.axis + 1 :])

    @property
    def chunk_multiple(self) -> int:
        return max(self.numel, 1)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import numpy as np
        import torch

        lanes = len(self.order)
        bits = 32 // lanes
        shifts = np.arange(lanes, dtype=np.uint32) * np.uint32(bits)
        words = self.of.evaluate(0, self.of.numel, reader).numpy().view(np.uint32).reshape(self.of.shape)
        words = np.moveaxis(words, self.axis, -1)
        entries = np.zeros((*words.shape, lanes), np.uint32)
        entries[..., list(self.order)] = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        kept = entries.reshape(*words.shape[:-1], -1)[..., list(self.kept)]
        padded = np.zeros((*kept.shape[:-1], self.shape[self.axis] * lanes), np.uint32)
        padded[..., : kept.shape[-1]] = kept
        apart = padded.reshape(*kept.shape[:-1], -1, lanes)[..., list(self.order)]
        packed = np.bitwise_or.reduce(apart << shifts, axis=-1)
        whole = np.ascontiguousarray(np.moveaxis(packed, -1, self.axis)).view(np.int32).reshape(-1)
        return torch.from_numpy(whole[start:stop].copy())
