"""The router of an upcycled layer: one row per group of experts, repeated for the slices of the group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moesurgery.plan.expr import Expr, Rows, concat
from moesurgery.plan.tensors import Filled, Normal, Uniform, Values, random_key
from moesurgery.surgery.upcycling.design import Design

if TYPE_CHECKING:
    import torch


def random_rows(name: str, design: Design, hidden: int, std: float, seed: int) -> Expr:
    """Return N(0, std^2) rows."""
    return repeated(Normal(std, random_key(seed, name), "F32", (distinct(design), hidden)), design)


def uniform_rows(name: str, design: Design, hidden: int, seed: int) -> Expr:
    """Return rows uniform in ±1/sqrt(H), as `torch.nn.Linear` begins."""
    bound = math.sqrt(1.0 / hidden)
    return repeated(Uniform(bound, random_key(seed, name), "F32", (distinct(design), hidden)), design)


def zero_rows(design: Design, hidden: int) -> Expr:
    """Return rows of zeros: all gates are equal, and every token goes to the same experts."""
    return Filled(0.0, "F32", (design.experts, hidden))


def given_rows(rows: torch.Tensor, design: Design) -> Expr:
    """Return known float32 rows, one per group or one per expert."""
    values = Values(rows.contiguous().numpy().tobytes(), "F32", tuple(rows.shape))
    return values if len(rows) == design.experts else repeated(values, design)


def distinct(design: Design) -> int:
    """Return how many router rows differ: one per group, or per part of a split FFN."""
    return design.experts if design.split else design.groups


def repeated(rows: Expr, design: Design) -> Expr:
    """Give all slices of a group the group's row."""
    times = design.experts // rows.shape[0]
    if times == 1:
        return rows
    return concat([Rows(rows, group, group + 1) for group in range(rows.shape[0]) for _ in range(times)])
