"""Token windows: what every measurement runs on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids [N, S]. `mask` [N, S] is True for real tokens; None where all are.

    Padding must stand on the right, so that real tokens never see it.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @property
    def count(self) -> int:
        """The number of real tokens."""
        return int(self.mask.sum()) if self.mask is not None else self.ids.numel()

    @property
    def digest(self) -> str:
        """A SHA-256 of the ids, padding aside: equal for equal windows however they were come by."""
        ids = self.ids if self.mask is None else self.ids.masked_fill(~self.mask, -1)
        return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.cpu().numpy().tobytes()).hexdigest()

    def rows(self, start: int, stop: int) -> Tokens:
        return Tokens(self.ids[start:stop], self.mask[start:stop] if self.mask is not None else None)

    def batches(self, windows: int) -> Iterator[tuple[int, Tokens]]:
        """Yield (first window, windows) in runs of at most `windows`."""
        for start in range(0, len(self), windows):
            yield start, self.rows(start, start + windows)


def mixed(parts: list[torch.Tensor]) -> Tokens:
    """Return windows of several sources in turn, two of each: so even and odd windows hold the same mixture."""
    import torch

    longest = max(map(len, parts))
    return Tokens(torch.cat([part[i : i + 2] for i in range(0, longest, 2) for part in parts]))


def padded(sequences: list[list[int]]) -> Tokens:
    """Return sequences of any length as windows padded on the right."""
    import torch

    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = True
    return Tokens(ids, None if bool(mask.all()) else mask)
