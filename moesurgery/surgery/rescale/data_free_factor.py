"""Estimate real gates without data: the model's own token embeddings, passed through each layer's router.

The router of a layer reads the hidden state after a norm, `x / rms(x) * w`. The token embeddings stand in
for x: on the first layer they are part of it, deeper they still point in directions the router was trained
on. The estimate always lies between no factor and the even-gates rule, since real gates are never flatter
than even. Reads under a percent of the weights; numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.expr.evaluate import finite_values, values_of
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.components import EMBEDDING
from moesurgery.families.family import InputNorm
from moesurgery.families.routing import second_moments
from moesurgery.plan.dequantise import plain_values
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import numpy as np

MAX_ROWS = 8192
_RUNS = 64  # the sample is 64 runs of neighbouring rows: few reads, also over a network
MAX_WORK = 4e11  # multiply-adds in all routers together


@dataclass(frozen=True)
class RouterEstimate:
    """sqrt(A_old / A_new) for each MoE block, by its name, and what was left out to find it."""

    factors: Mapping[str, float]
    notes: tuple[str, ...] = ()


def router_factors(plan: Plan, anatomy: Anatomy, old: int, new: int, seed: int, rho: float = 0.0) -> RouterEstimate:
    """Estimate sqrt(A_old / A_new) for each MoE block, for a correlation `rho` of experts' outputs.

    Embedding rows that are not finite are left out, and counted.

    Raises RefusedError where the family's router has no estimate, a tensor for it is missing, or its values give none.
    """
    import numpy as np

    if old == new:
        return RouterEstimate({block.where: 1.0 for block in anatomy.blocks})
    blocks = [block for block in anatomy.blocks if not block.named("expert_table")]
    if not blocks:
        raise RefusedError("every layer takes its experts from a table, and the router chooses none")
    if (why_not := anatomy.settings.family.routing.no_estimate) is not None:
        raise RefusedError(why_not)
    sample, left_out = embedding_sample(plan, anatomy, seed, _rows(anatomy))
    kinds = {_norm(anatomy, block).kind for block in blocks}
    samples = {kind: normalised(sample, kind) for kind in kinds}

    def factor(block: MoeBlock) -> float:
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            logits = _logits(plan, anatomy, block, samples[_norm(anatomy, block).kind])
            moments = second_moments(anatomy.settings, logits, _bias(plan, block), rho)
        before, after = float(moments[old - 1]), float(moments[new - 1])
        if not (0 < before < math.inf and 0 < after < math.inf):
            raise RefusedError(
                f"{block.where}: the mean squared weights of its router come to {before:g} at top-{old} and {after:g}"
                f" at top-{new}"
            )
        return math.sqrt(before / after)

    with ThreadPoolExecutor(4) as pool:
        factors = dict(zip([b.where for b in blocks], pool.map(factor, blocks), strict=True))
    by_table = [block.where for block in anatomy.blocks if block.where not in factors]
    mean = math.exp(sum(map(math.log, factors.values())) / len(factors))
    factors |= dict.fromkeys(by_table, mean)
    note = (
        f"{left_out:,} of {left_out + len(sample):,} sampled embedding rows hold NaN, infinity or numbers too large to"
        " square, and the estimate is without them: `moesurgery validate --level values` finds such numbers"
    )
    notes: tuple[str, ...] = (note,) if left_out else ()
    if by_table:
        notes += (f"{', '.join(by_table)}: a table chooses there, not the router: the mean of the other factors",)
    return RouterEstimate(factors, notes)


def _rows(anatomy: Anatomy) -> int:
    hidden = anatomy.settings.hidden or 1
    work = hidden * anatomy.experts * len(anatomy.blocks)
    return max(256, min(MAX_ROWS, int(MAX_WORK / work)))


def embedding_sample(plan: Plan, anatomy: Anatomy, seed: int, rows: int) -> tuple[np.ndarray, int]:
    """Return up to `rows` token embeddings [rows, H], drawn by `seed`, and how many were left out as not finite.

    Rows of zeros (padding) are left out too. Raises RefusedError where no others are there.
    """
    import numpy as np

    embedding = _embedding(plan, anatomy)
    vocabulary = embedding.shape[0]
    if vocabulary <= rows:
        sample = values_of(embedding)
    else:
        length = rows // _RUNS
        stride = vocabulary / _RUNS
        draws = np.random.default_rng(seed).random(_RUNS)
        starts = [int(i * stride + draws[i] * (stride - length)) for i in range(_RUNS)]
        remote = any(stored.source.local(stored.info.file) is None for stored in embedding.stored())
        with ThreadPoolExecutor(8 if remote else 1) as pool:  # on a disk, threads take longer to meet than to read
            sample = np.concatenate(list(pool.map(lambda s: values_of(embedding, (s, s + length)), starts)))
    with np.errstate(over="ignore", invalid="ignore"):
        usable = np.isfinite(np.einsum("th,th->t", sample, sample, dtype=np.float32))
    finite = sample[usable & np.any(sample != 0, axis=1)]
    if not len(finite):
        raise RefusedError(f"all {len(sample):,} rows that were sampled of the embedding are zero or not finite")
    return np.asarray(finite), int(len(sample) - usable.sum())


def _embedding(plan: Plan, anatomy: Anatomy) -> Expr:
    hidden = anatomy.settings.hidden
    for name, component in anatomy.component.items():
        expr = plan.tensors[name]
        if component == EMBEDDING and len(expr.shape) == 2 and expr.shape[1] == hidden and name.endswith("weight"):
            return expr
    raise RefusedError(f"no embedding of width {hidden} was found")


def normalised(sample: np.ndarray, kind: str) -> np.ndarray:
    """Return the rows divided by their root mean square (after subtracting the mean, for a LayerNorm)."""
    import numpy as np

    if kind == "layer":
        sample = sample - sample.mean(axis=1, keepdims=True)
    power = np.einsum("th,th->t", sample, sample, dtype=np.float32) / sample.shape[1]
    return np.asarray(sample / np.sqrt(power + 1e-12)[:, None])


def _norm(anatomy: Anatomy, block: MoeBlock) -> InputNorm:
    return block.of.norm if block.of else anatomy.settings.family.norm


def _logits(plan: Plan, anatomy: Anatomy, block: MoeBlock, sample: np.ndarray) -> np.ndarray:
    """Return the router logits [rows, E] of a normalised sample in one block."""
    import numpy as np

    norm = _norm(anatomy, block)
    names = [f"{block.layer_path}.{path}" for path in (norm.path, *norm.others)]
    name = next((n for n in names if n in plan.tensors), None)
    if name is None:
        raise RefusedError(f"the norm before the router, {names[0]}, is missing")
    if block.router is None:
        raise RefusedError(f"{block.where} has no router weight")
    weight = finite_values(name, plan.tensors[name])
    router = finite_values(block.router.name, plain_values(plan, block.router.name))
    if block.router.axis == 1:
        router = router.T
    if router.ndim != 2 or router.shape[1] != sample.shape[1]:
        raise RefusedError(f"{block.router.name} has shape {list(router.shape)}, not [experts, {sample.shape[1]}]")
    if weight.shape != (sample.shape[1],):
        raise RefusedError(f"{name} has shape {list(weight.shape)}, not [{sample.shape[1]}]")
    router = router[: block.experts] * (weight + 1 if norm.kind == "rms1" else weight)
    logits = sample @ router.T
    for member in block.named("router_bias"):
        logits = logits + finite_values(member.name, plan.tensors[member.name])[: block.experts]
    return np.asarray(logits)


def _bias(plan: Plan, block: MoeBlock) -> np.ndarray | None:
    for member in block.named("correction_bias"):
        return finite_values(member.name, plan.tensors[member.name]).reshape(-1)[: block.experts]
    return None
