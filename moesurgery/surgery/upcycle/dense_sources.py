"""The models whose FFNs become experts: opened, checked to be of one shape with the base, and combined.

With one source or none this is sparse upcycling; with several it is branch-train-mix (Sukhbaatar et al., arXiv
2403.07816): FFNs of the branches become experts, everything else is the base's or the branches' average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import mean
from moesurgery.plan.plan import plan_of
from moesurgery.recipe.parameters import Param
from moesurgery.surgery.upcycle.dense_model import DenseModel, FfnTensors, dense_model_of
from moesurgery.surgery.upcycle.expert_tensors import Ingredient
from moesurgery.surgery.upcycle.prompts import Prompts


class ExpertSource(TypedDict, total=False):
    """Where a group of experts comes from, and what it should be chosen for."""

    model: Annotated[
        str, Param("the dense model whose FFNs these experts get; the base model without it", reads="model")
    ]
    prompts: Annotated[list[str], Param("what these experts should be chosen for")]
    negative_prompts: Annotated[list[str], Param("what they should not be chosen for")]
    residual_scale: Annotated[float, Param("factor on what they add")]
    noise_scale: Annotated[float, Param("standard deviation of noise on their weights", minimum=0)]


@dataclass(frozen=True)
class DenseSource:
    """One entry, opened. `base` says whether its FFNs are the base model's."""

    dense: DenseModel
    base: bool
    prompts: Prompts
    scale: float
    noise: float

    def ingredient(self, layer: int, noise: float) -> Ingredient:
        """Return its FFN of one layer; `noise` (relative) is the recipe's for all experts."""
        ffn = self.dense.layers[layer]
        if self.noise:
            return Ingredient(ffn, self.scale, self.noise)
        return Ingredient(ffn, self.scale, noise, relative=True)


def open_sources(base: DenseModel, entries: Sequence[str | ExpertSource]) -> list[DenseSource]:
    """Open every entry, each model once. Raises RefusedError where one does not fit the base."""
    opened: dict[str, DenseModel] = {}
    sources = []
    for given in entries:
        entry: ExpertSource = {"model": given} if isinstance(given, str) else given
        reference = entry.get("model")
        if reference is None:
            dense = base
        else:
            if reference not in opened:
                opened[reference] = _open(base, reference)
            dense = opened[reference]
        sources.append(
            DenseSource(
                dense,
                dense is base,
                Prompts(tuple(entry.get("prompts", ())), tuple(entry.get("negative_prompts", ()))),
                float(entry.get("residual_scale", 1.0)),
                float(entry.get("noise_scale", 0.0)),
            )
        )
    return sources


def _open(base: DenseModel, reference: str) -> DenseModel:
    checkpoint = open_checkpoint(reference)
    checkpoint.refuse_gguf("upcycling is of safetensors")
    if checkpoint.source == base.plan.checkpoint.source and not base.plan.steps:
        return base
    model_type = checkpoint.config.get("model_type")
    if model_type != base.architecture.model_type:
        raise RefusedError(
            f"upcycle: {reference} is a {model_type}, the base model a {base.architecture.model_type}",
            "experts must come from models of one type",
        )
    dense = dense_model_of(plan_of(checkpoint), base.architecture)
    _check_shape(base, dense, reference)
    return dense


def _check_shape(base: DenseModel, other: DenseModel, reference: str) -> None:
    if len(other.layers) != len(base.layers):
        raise RefusedError(f"upcycle: {reference} has {len(other.layers)} layers, the base model {len(base.layers)}")
    for i, (mine, theirs) in enumerate(zip(base.layers, other.layers, strict=True)):
        if mine.gate.shape != theirs.gate.shape:
            raise RefusedError(
                f"upcycle: {reference}, layer {i}: its FFN is {list(theirs.gate.shape)},"
                f" the base model's {list(mine.gate.shape)}",
                "experts must be of one shape",
            )
    if other.traits["hidden_act"] != base.traits["hidden_act"]:
        raise RefusedError(
            f"upcycle: {reference} uses {other.traits['hidden_act']}, the base model {base.traits['hidden_act']}",
            "a mixture has one activation",
        )


def in_dtype(ffn: FfnTensors, of: FfnTensors) -> FfnTensors:
    """Return `ffn` in the dtypes of `of`, so that all experts of a layer have one."""
    return FfnTensors(cast(ffn.gate, of.gate.dtype), cast(ffn.up, of.up.dtype), cast(ffn.down, of.down.dtype))


def branches(base: DenseModel, sources: Sequence[DenseSource]) -> list[DenseModel]:
    """Return the different models among the sources, in order."""
    models: list[DenseModel] = []
    for source in sources:
        if all(source.dense is not known for known in models):
            models.append(source.dense)
    return models or [base]


def averaged(base: DenseModel, models: Sequence[DenseModel]) -> dict[str, Expr]:
    """Return the base's tensors besides FFNs, each the mean over `models`. Raises RefusedError where shapes differ."""
    means = {}
    for name, expr in base.others.items():
        parts = []
        for model in models:
            other = model.others.get(name)
            if other is None or other.shape != expr.shape or expr.dtype not in PLAIN_FLOATS:
                raise RefusedError(
                    f"upcycle: {name} cannot be averaged: "
                    + (f"{model.name} lacks it" if other is None else f"{model.name} has it as {list(other.shape)}"),
                    "keep the base model's: leave out `rest: average`",
                )
            parts.append(cast(other, expr.dtype))
        means[name] = mean(parts)
    return means


def different_traits(base: DenseModel, models: Sequence[DenseModel]) -> list[str]:
    """Return the traits in which some model differs from the base: what its attention was trained with."""
    different: list[str] = []
    for model in models:
        for name, value in base.traits.items():
            if model.traits.get(name) != value and name not in (*different, "pad", "bos", "eos", "initializer_range"):
                different.append(name)
    return different


def parents(
    given: Mapping[str, Any], sources: Sequence[DenseSource], shared: DenseSource | None
) -> dict[str, tuple[Checkpoint]]:
    """Return the checkpoint of every model that the parameters name."""
    entries = [*(given["sources"] or ()), *([given["shared_source"]] if shared is not None else ())]
    checkpoints = {}
    for entry, source in zip(entries, [*sources, *([shared] if shared is not None else ())], strict=True):
        reference = entry if isinstance(entry, str) else entry.get("model")
        if reference is not None:
            checkpoints[reference] = (source.dense.plan.checkpoint,)
    return checkpoints
