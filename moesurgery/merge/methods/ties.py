"""Sums of task vectors, the differences of the models to their base: `task_arithmetic`, TIES, DARE and their kin.

A method says which elements of a difference it keeps (how it is made sparse) and whether the models elect a sign at
each position, as TIES does: the table of both is at the end. What is kept is weighted, added up, and put on the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from moesurgery.merge.compute.backend import Array, namespace
from moesurgery.merge.compute.chunks import Chunk, MergeInputs
from moesurgery.merge.compute.method import merge_method
from moesurgery.recipe.parameters import Param

if TYPE_CHECKING:
    import numpy as np

Keep = Callable[[Chunk, int], "Array | None"]  # which elements of one model's difference stay; None for all

Weights = Annotated[tuple[float, ...], Param("factor on the model's difference")]
Densities = Annotated[tuple[float, ...], Param("share of the elements that stay", minimum=0, maximum=1)]
Gammas = Annotated[tuple[float, ...], Param("share of the largest elements that go", minimum=0, maximum=1)]
Epsilons = Annotated[tuple[float, ...], Param("half of the range of the probabilities", minimum=0, maximum=1)]
Normalize = Annotated[bool, Param("divide by the sum of the weights that count")]
Lambda = Annotated[float, Param("factor on the sum of all differences")]
Rescale = Annotated[bool, Param("bring what stays to the former sum of magnitudes")]
Mask = Annotated[bool, Param("accepted for mergekit's recipes: it says how masks are stored there")]
Idle = Annotated[float | bool, Param("accepted for mergekit's recipes, where it has no effect on this method either")]

_NEGLIGIBLE = 1e-8  # a sum of weights below this counts as 1


# Which elements of each difference stay. The keyword-only parameters are those of the methods that use it.


def _largest(inputs: MergeInputs, *, density: Densities = (1.0,)) -> Keep:
    """Keep the share `density` of largest magnitude of each difference, at least one element unless it is 0.

    Of equal magnitudes the later ones are kept.
    """
    counts = [max(int(share * inputs.numel), 1) if share > 0 else 0 for share in density]
    trimmed = [i for i, count in enumerate(counts) if count < inputs.numel]
    rows = inputs.thresholds(lambda chunk: [abs(chunk.deltas[i]) for i in trimmed], [[counts[i]] for i in trimmed])
    thresholds = {i: threshold for i, (threshold,) in zip(trimmed, rows, strict=True)}

    def keep(chunk: Chunk, model: int) -> Array | None:
        return thresholds[model].mask(abs(chunk.deltas[model]), chunk.start) if model in thresholds else None

    return keep


def _all_but_the_largest(inputs: MergeInputs, *, density: Densities = (1.0,), gamma: Gammas = (0.01,)) -> Keep:
    """Keep the share `density` of each difference that comes after the `gamma` largest magnitudes.

    Where less than `density` comes after them, fewer of the largest go.
    """
    stay = [int(share * inputs.numel) for share in density]
    go = [min(int(share * inputs.numel), inputs.numel - count) for share, count in zip(gamma, stay, strict=True)]
    thresholds = inputs.thresholds(
        lambda chunk: [abs(delta) for delta in chunk.deltas],
        [[top, top + count] for top, count in zip(go, stay, strict=True)],
    )

    def keep(chunk: Chunk, model: int) -> Array:
        size = abs(chunk.deltas[model])
        top, all_kept = thresholds[model]
        return all_kept.mask(size, chunk.start) & ~top.mask(size, chunk.start)

    return keep


def _at_random(inputs: MergeInputs, *, density: Densities = (1.0,)) -> Keep:
    """Keep each element with its model's probability."""

    def keep(chunk: Chunk, model: int) -> Array | None:
        return chunk.random_mask(model, float(density[model])) if density[model] < 1 else None

    return keep


def _at_random_by_rank(inputs: MergeInputs, *, density: Densities = (1.0,), epsilon: Epsilons = (0.15,)) -> Keep:
    """Keep elements with a probability that grows with their rank in the row, from density - epsilon to + epsilon."""

    def keep(chunk: Chunk, model: int) -> Array | None:
        if density[model] >= 1:
            return None
        size = abs(chunk.deltas[model])
        width = size.shape[-1]
        steps = max(width - 1, 1)
        lowest = density[model] - (epsilon[model] if width > 1 else 0)
        return chunk.random_mask(model, _ranks(size) * (2 * epsilon[model] / steps) + lowest)

    return keep


def _ranks(rows: Array) -> Array:
    """Return the rank of each element in its row, 0 for the smallest, as floats; equal ones in their order."""
    xp = namespace(rows)
    ranks = xp.empty_like(rows)
    if xp.__name__ == "numpy":
        order = xp.argsort(rows, kind="stable")
        xp.put_along_axis(ranks, order, xp.zeros_like(rows) + xp.arange(rows.shape[-1], dtype=rows.dtype), -1)
        return ranks
    order = xp.argsort(rows, stable=True)
    numbers = xp.zeros_like(rows) + xp.arange(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return ranks.scatter_(-1, order, numbers)


def _out_of_range(values: Mapping[str, Any]) -> str | None:
    for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return f"density {density:g} and epsilon {epsilon:g}: their sum and difference must lie between 0 and 1"
    return None


# The weighted sum of what stays.


def _weighted_sum(
    inputs: MergeInputs,
    keep: Keep,
    weight: Sequence[float],
    *,
    normalize: bool,
    lambda_: float,
    rescale: bool = False,
    elect: bool = False,
) -> Callable[[Chunk], Array]:
    """Return the action `base + lambda * sum(weight_i * kept(d_i))`.

    `normalize` divides by the sum of the weights; with `elect`, only elements whose sign is that of the weighted sum
    count, in the sum and in its divisor (TIES).
    """
    factors = list(weight)
    if rescale:
        before, after = inputs.total(lambda chunk: _magnitudes(chunk, keep))
        factors = [w * b / a if a else w for w, b, a in zip(weight, before, after, strict=True)]

    def merge(chunk: Chunk) -> Array:
        parts = chunk.deltas  # made for this, and changed in place
        for i, delta in enumerate(parts):
            kept = keep(chunk, i)
            if kept is not None:
                delta *= kept
            delta *= float(factors[i])
        total = _elected(parts, weight, normalize) if elect else _total(parts)
        if normalize and not elect:
            total /= _divisor(sum(weight))
        if lambda_ != 1:
            total *= lambda_
        total += chunk.base
        return total

    return merge


def _magnitudes(chunk: Chunk, keep: Keep) -> np.ndarray:
    """Return the sums of the magnitudes of all differences, and of what is kept of them: [2, models]."""
    import numpy as np

    sums = np.zeros((2, len(chunk.deltas)))
    for i, delta in enumerate(chunk.deltas):
        size = abs(delta)
        kept = keep(chunk, i)
        sums[0, i] = float(size.sum())
        if kept is not None:
            size *= kept
        sums[1, i] = sums[0, i] if kept is None else float(size.sum())
    return sums


def _total(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _divisor(total: float) -> float:
    return total if abs(total) >= _NEGLIGIBLE else 1.0


def _elected(parts: Sequence[Array], weight: Sequence[float], normalize: bool) -> Array:
    """Return the sum of the parts that have the sign of their whole sum; a sum of 0 counts as positive."""
    if len(parts) == 1:
        return parts[0] / _divisor(weight[0]) if normalize else parts[0]
    return sum_of_agreeing(parts, weight, _total(parts) >= 0, normalize)


def sum_of_agreeing(parts: Sequence[Array], weight: Sequence[float], positive: Array, normalize: bool) -> Array:
    """Return the sum of the elements with the elected sign, over the sum of their weights where `normalize` says so."""
    xp = namespace(positive)
    kind = parts[0].dtype
    sign = xp.asarray(positive, dtype=kind) * 2 - 1
    total, divisor = None, None
    for part, share in zip(parts, weight, strict=True):
        agrees = part * sign
        counts = agrees > 0
        agrees *= counts
        total = agrees if total is None else total + agrees
        if normalize:
            counted = xp.asarray(counts, dtype=kind) * share
            divisor = counted if divisor is None else divisor + counted
    total = total * sign
    if divisor is None:
        return total
    divisor[abs(divisor) < _NEGLIGIBLE] = 1
    return total / divisor


# The methods.


@merge_method("task_arithmetic", kind="streamed", models=(0, None), base="required")
def task_arithmetic(
    inputs: MergeInputs,
    *,
    weight: Weights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Idle = 1.0,
    rescale: Idle = False,
    int8_mask: Mask = False,
) -> Callable[[Chunk], Array]:
    """`base + lambda * sum(weight_i * (w_i - base))`.

    Task arithmetic (arXiv 2212.04089).
    """
    return _weighted_sum(inputs, lambda chunk, model: None, weight, normalize=normalize, lambda_=lambda_)


def _register(
    name: str,
    sparsify: Callable[..., Keep],
    *,
    elect: bool,
    normalize: bool,
    rescale: bool,
    doc: str,
    **options: Any,
) -> None:
    """Register the method that keeps what `sparsify` says of each difference; `normalize` and `rescale` are defaults.

    Its parameters, and so its schema, are those below with the keyword-only ones of `sparsify` after the weight.
    """
    chosen_normalize, chosen_rescale = normalize, rescale

    def method(
        inputs: MergeInputs,
        *,
        weight: Weights,
        normalize: Normalize = chosen_normalize,
        lambda_: Lambda = 1.0,
        rescale: Rescale = chosen_rescale,
        int8_mask: Mask = False,
        **sparsity: Any,
    ) -> Callable[[Chunk], Array]:
        keep = sparsify(inputs, **sparsity)
        return _weighted_sum(inputs, keep, weight, normalize=normalize, lambda_=lambda_, rescale=rescale, elect=elect)

    first, weight, *others, _ = inspect.signature(method).parameters.values()
    sparsity = [p for p in inspect.signature(sparsify).parameters.values() if p.kind is p.KEYWORD_ONLY]
    method.__signature__ = inspect.Signature([first, weight, *sparsity, *others])  # type: ignore[attr-defined]
    method.__annotations__ |= {p.name: p.annotation for p in sparsity}
    method.__name__, method.__doc__ = name, doc
    merge_method(name, kind="streamed", models=(0, None), base="required", **options)(method)


_register(
    *("ties", _largest),
    elect=True,
    normalize=True,
    rescale=False,
    doc="""Keep the `density` largest elements of each difference, elect a sign, and average what agrees with it.

    The sign is that of the weighted sum. TIES (arXiv 2306.01708).
    """,
)
_register(
    *("dare_linear", _at_random),
    elect=False,
    normalize=False,
    rescale=True,
    random=True,
    doc="""Keep each element of each difference with probability `density`, rescale, and add up.

    DARE (arXiv 2311.03099). The factor brings what stays to the difference's former sum of magnitudes: 1/density but
    for chance.
    """,
)
_register(
    *("dare_ties", _at_random),
    elect=True,
    normalize=False,
    rescale=True,
    random=True,
    doc="""As `dare_linear`, then elect a sign and add up what agrees with it.

    DARE (arXiv 2311.03099) before the last two steps of TIES (arXiv 2306.01708).
    """,
)
_register(
    *("breadcrumbs", _all_but_the_largest),
    elect=False,
    normalize=False,
    rescale=False,
    doc="""Drop the `gamma` largest elements of each difference and the smallest down to `density`, and add up.

    Model Breadcrumbs (arXiv 2312.06795).
    """,
)
_register(
    *("breadcrumbs_ties", _all_but_the_largest),
    elect=True,
    normalize=False,
    rescale=False,
    doc="""As `breadcrumbs`, then elect a sign and add up what agrees with it.

    Model Breadcrumbs (arXiv 2312.06795) before the last two steps of TIES (arXiv 2306.01708).
    """,
)
_register(
    *("della", _at_random_by_rank),
    elect=True,
    normalize=True,
    rescale=True,
    random=True,
    rows=True,
    refuse=_out_of_range,
    doc="""As `della_linear`, then elect a sign and average what agrees with it.

    DELLA (arXiv 2406.11617).
    """,
)
_register(
    *("della_linear", _at_random_by_rank),
    elect=False,
    normalize=False,
    rescale=True,
    random=True,
    rows=True,
    refuse=_out_of_range,
    doc="""Keep elements of each difference with a probability that grows with their rank in the row, rescale, add up.

    The probabilities go evenly from density - epsilon for a row's smallest element to density + epsilon for its
    largest. DELLA (arXiv 2406.11617). The factor brings what stays to the former sum of magnitudes.
    """,
)
