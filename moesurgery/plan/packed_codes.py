"""Codes of a few bits packed into words along the last axis, and taken out again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import BITS
from moesurgery.expr.nodes import Expr, Reader, Unary, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedCodes(Unary):
    """Codes (U8) of `bits` each in words of `to`, the first of a word in its lowest bits, or in the order of `order`.

    `order[i]` is the code in the i-th group of bits. The last axis is filled up with zeros.
    """

    bits: int
    to: str
    order: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.to

    @property
    def _lanes(self) -> int:
        return BITS[self.to] // self.bits

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.of.shape[:-1], -(-self.of.shape[-1] // self._lanes))

    @property
    def chunk_multiple(self) -> int:
        if self.of.shape[-1] % self._lanes == 0 and self.of.chunk_multiple % self._lanes == 0:
            return self.of.chunk_multiple // self._lanes
        return max(self.numel, 1)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        lanes, width = self._lanes, self.of.shape[-1]
        if width % lanes:
            codes = self.of.evaluate(0, self.of.numel, reader).view(-1, width)
            codes = torch.nn.functional.pad(codes, (0, self.shape[-1] * lanes - width))
        else:
            codes = self.of.evaluate(start * lanes, stop * lanes, reader)
        codes = codes.view(-1, lanes)
        if self.order:
            codes = codes[:, list(self.order)]
        bytes_ = _joined(codes.contiguous(), self.bits)
        words = bytes_.view(torch_dtype(self.to)).view(-1)
        return words[start:stop].clone() if width % lanes else words


def _joined(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [n, lanes] as bytes, lowest bits first: of 4 bits two to a byte."""
    import torch

    while bits < 8:
        pairs = codes.view(torch.int16)
        codes = (pairs | (pairs >> (8 - bits))).to(torch.uint8)
        bits *= 2
    return codes


@dataclass(frozen=True)
class UnpackedCodes(Unary):
    """The codes of `bits` each, as U8, in words packed along the last axis: the inverse of `PackedCodes`."""

    bits: int
    order: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return "U8"

    @property
    def _lanes(self) -> int:
        return BITS[self.of.dtype] // self.bits

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.of.shape[:-1], self.of.shape[-1] * self._lanes)

    @property
    def chunk_multiple(self) -> int:
        return self.of.chunk_multiple * self._lanes

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        lanes = self._lanes
        codes = self.of.evaluate(start // lanes, stop // lanes, reader).view(torch.uint8)
        bits = 8
        while bits > self.bits:
            bits //= 2
            codes = torch.stack([codes & ((1 << bits) - 1), codes >> bits], dim=-1).view(-1)
        if self.order:
            places = [self.order.index(lane) for lane in range(lanes)]
            codes = codes.view(-1, lanes)[:, places].reshape(-1)
        return codes


def packed_codes(of: Expr, bits: int, to: str, order: tuple[int, ...] = ()) -> Expr:
    """Return codes packed along the last axis; what was unpacked in the same way is what it was unpacked from."""
    if isinstance(of, UnpackedCodes) and (of.bits, of.order, of.of.dtype) == (bits, order, to):
        return of.of
    return PackedCodes(of, bits, to, order)
