"""The router of an upcycled layer: one row per group of experts, repeated for the slices of the group."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.nodes import Expr, Slice, concat
from moesurgery.expr.random import Normal, Uniform, random_key
from moesurgery.expr.tensors import Constant, Full
from moesurgery.plan.plan import Table
from moesurgery.recipe.registry import did_you_mean
from moesurgery.surgery.upcycle.dense_model import DenseModel
from moesurgery.surgery.upcycle.dense_sources import DenseSource
from moesurgery.surgery.upcycle.design import Design

if TYPE_CHECKING:
    import torch

WITHOUT_DATA = ("random", "uniform", "zero")
FROM_PROMPTS = ("hidden", "hidden_avg", "cheap_embed")


@dataclass(frozen=True)
class KnownRows:
    """Router rows [groups, H] of each layer; from prompts, the load that they would give each source's experts."""

    layers: list[torch.Tensor]
    table: Table | None = None
    loads: list[list[float]] | None = None


def random_rows(name: str, design: Design, hidden: int, std: float, seed: int) -> Expr:
    """Return N(0, std^2) rows."""
    return repeated(Normal(std, random_key(seed, name), "F32", (distinct(design), hidden)), design)


def uniform_rows(name: str, design: Design, hidden: int, seed: int) -> Expr:
    """Return rows uniform in ±1/sqrt(H), as `torch.nn.Linear` begins."""
    bound = math.sqrt(1.0 / hidden)
    return repeated(Uniform(bound, random_key(seed, name), "F32", (distinct(design), hidden)), design)


def zero_rows(design: Design, hidden: int) -> Expr:
    """Return rows of zeros: all gates are equal, and every token goes to the same experts."""
    return Full(0.0, "F32", (design.experts, hidden))


def given_rows(rows: torch.Tensor, design: Design) -> Expr:
    """Return known float32 rows, one per group."""
    return repeated(Constant(rows.contiguous().numpy().tobytes(), "F32", tuple(rows.shape)), design)


def distinct(design: Design) -> int:
    """Return how many router rows differ: one per group, or per part of a split FFN."""
    return design.experts if design.split else design.groups


def repeated(rows: Expr, design: Design) -> Expr:
    """Give all slices of a group the group's row."""
    times = design.experts // rows.shape[0]
    if times == 1:
        return rows
    return concat([Slice(rows, group, group + 1) for group in range(rows.shape[0]) for _ in range(times)])


def known_rows(kind: str, base: DenseModel, sources: Sequence[DenseSource], design: Design) -> KnownRows | None:
    """Return router rows from prompts or from a file; None where the kind of router needs neither.

    Raises RecipeError or RefusedError where prompts or file do not fit the design.
    """
    if kind in WITHOUT_DATA:
        return None
    if kind not in FROM_PROMPTS:
        return KnownRows(_rows_from_file(kind, base, design))
    from moesurgery.surgery.upcycle.prompts import rows_from_prompts

    if not sources or not all(source.prompts.positive for source in sources):
        raise RecipeError(
            f"upcycle: router {kind} needs prompts for every source", "give `prompts` in each entry of `sources`"
        )
    if len({source.prompts for source in sources}) == 1 and len(sources) > 1:
        raise RefusedError("upcycle: all sources have the same prompts, so no token could tell them apart")
    needed = distinct(design)
    if design.split or len(sources) != needed:
        raise RefusedError(
            f"upcycle: {needed} router rows are needed, and there are prompts for {len(sources)}: equal rows would tie",
            "give an entry with prompts for each, or --router random",
        )
    sets = min(max(1, design.top_k // design.granularity), len(sources))
    from_prompts = rows_from_prompts(base, [source.prompts for source in sources], kind, sets)  # type: ignore[arg-type]
    by_source = list(zip(*from_prompts.loads, strict=True))
    table = Table(
        (f"load on {from_prompts.tokens}, source", "mean", "least layer", "most layer"),
        tuple(
            (str(e), f"{sum(load) / len(load):.3f}", f"{min(load):.3f}", f"{max(load):.3f}")
            for e, load in enumerate(by_source)
        ),
    )
    return KnownRows(list(from_prompts.rows), table, from_prompts.loads)


def _rows_from_file(path: str, base: DenseModel, design: Design) -> list[torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        known = (*WITHOUT_DATA, *FROM_PROMPTS)
        hint = did_you_mean(path, known) or f"known: {', '.join(known)}"
        raise RecipeError(f"upcycle: router {path!r} is neither a kind of router nor a file", hint)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"upcycle: {path} cannot be read as router rows: {error}", "it should be a safetensors file"
        ) from None
    shape = (distinct(design), base.layers[0].hidden)
    by_layer = []
    for i in range(len(base.layers)):
        rows = tensors.get(f"layers.{i}")
        if rows is None or tuple(rows.shape) != shape:
            what = "is missing" if rows is None else f"has shape {list(rows.shape)}"
            raise RecipeError(
                f"upcycle: {path}: layers.{i} {what}",
                f"it should hold layers.0 … layers.{len(base.layers) - 1}, each {list(shape)}",
            )
        by_layer.append(rows.float())
    return by_layer
