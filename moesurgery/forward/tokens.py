"""Token windows: the input of every measurement."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids [N, S]. `mask` [N, S] is True for real tokens; None where all are.

    Padding must be on the right, so that real tokens never attend to it. `counted` [N, S] are the tokens that sums and
    losses are computed over, all real ones where it is None: the others only serve as context.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @property
    def counts(self) -> torch.Tensor | None:
        """The tokens that count [N, S]; None where all do."""
        return self.counted if self.counted is not None else self.mask

    @property
    def count(self) -> int:
        """The number of tokens that count."""
        return int(self.counts.sum()) if self.counts is not None else self.ids.numel()

    @property
    def predicted(self) -> int:
        """The number of tokens in a loss: all that count but the first of each window."""
        if self.counts is not None:
            return int(self.counts[:, 1:].sum())
        return len(self) * (self.length - 1)

    @property
    def digest(self) -> str:
        """A SHA-256 of the ids without padding: equal windows have equal digests, wherever they come from."""
        ids = self.ids if self.mask is None else self.ids.masked_fill(~self.mask, -1)
        value = hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.cpu().numpy().tobytes())
        if self.counted is not None:
            value.update(self.counted.cpu().numpy().tobytes())
        return value.hexdigest()

    def rows(self, start: int, stop: int) -> Tokens:
        """Return windows `start:stop`, as long as the longest of them."""
        mask, counted = (None if part is None else part[start:stop] for part in (self.mask, self.counted))
        longest = self.length
        if mask is not None and len(mask):
            longest = max(1, int(mask.any(dim=0).sum()))
        ids = self.ids[start:stop, :longest]
        return Tokens(
            ids,
            None if mask is None or bool(mask[:, :longest].all()) else mask[:, :longest],
            None if counted is None else counted[:, :longest],
        )

    def of(self, windows: Sequence[int]) -> Tokens:
        """Return windows by their numbers."""
        rows = list(windows)
        mask, counted = (None if part is None else part[rows] for part in (self.mask, self.counted))
        return Tokens(self.ids[rows], mask, counted)

    def batches(self, windows: int) -> Iterator[tuple[int, Tokens]]:
        """Yield (first window, windows) in runs of at most `windows`, and as many more as are shorter."""
        limit, start = windows * self.length, 0
        lengths = [self.length] * len(self) if self.mask is None else self.mask.sum(dim=1).tolist()
        while start < len(self):
            stop, longest = start + 1, lengths[start]
            while stop < len(self) and (stop + 1 - start) * max(longest, lengths[stop]) <= limit:
                longest = max(longest, lengths[stop])
                stop += 1
            yield start, self.rows(start, stop)
            start = stop


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Return the windows of all parts, one after the other, the shorter padded on the right."""
    import torch

    if len(parts) == 1:
        return parts[0]
    longest = max(part.length for part in parts)

    def wide(values: torch.Tensor) -> torch.Tensor:
        return values if values.shape[1] == longest else torch.nn.functional.pad(values, (0, longest - values.shape[1]))

    masks = [torch.ones_like(p.ids, dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    mask = None
    if any(p.mask is not None or p.length < longest for p in parts):
        mask = torch.cat([wide(m) for m in masks])
    counted = None
    if any(p.counted is not None for p in parts):
        counted = torch.cat([wide(m if p.counted is None else p.counted) for p, m in zip(parts, masks, strict=True)])
    return Tokens(torch.cat([wide(p.ids) for p in parts]), mask, counted)


def shared_out(tokens: Tokens, count: int) -> list[Tokens]:
    """Return windows in up to `count` parts, each of an even number of windows, so that the halves are unchanged."""
    pairs = -(-len(tokens) // 2)
    cuts = [2 * (pairs * i // count) for i in range(count)] + [len(tokens)]
    return [tokens.rows(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def mixed(parts: Sequence[Tokens]) -> Tokens:
    """Return windows of several sources in turn, two of each: so even and odd windows hold the same mixture.

    Where windows are padded, the longest first, two neighbours at a time.
    """
    whole = joined(parts)
    starts = [sum(len(p) for p in parts[:i]) for i in range(len(parts))]
    longest = max(map(len, parts))
    order = [
        start + i + j
        for i in range(0, longest, 2)
        for start, part in zip(starts, parts, strict=True)
        for j in range(2)
        if i + j < len(part)
    ]
    if whole.mask is not None:
        lengths = whole.mask.sum(dim=1).tolist()
        pairs = sorted((order[i : i + 2] for i in range(0, len(order), 2)), key=lambda pair: -lengths[pair[0]])
        order = [window for pair in pairs for window in pair]
    return whole.of(order)


def padded(sequences: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]] = ()) -> Tokens:
    """Return sequences of any length as windows padded on the right; `counted` of each where not all tokens do."""
    import torch

    longest = max(map(len, sequences), default=0)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    counts = torch.zeros_like(mask) if counted else None
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = True
        if counts is not None:
            counts[row, : len(sequence)] = torch.tensor(counted[row], dtype=torch.bool)
    return Tokens(ids, None if bool(mask.all()) else mask, counts)
