"""Estimate real gates without data: the model's own token embeddings, passed through each layer's router.

The router of a layer reads the hidden state after a norm, `x / rms(x) * w`. The token embeddings stand in
for x: on the first layer they are part of it, deeper they still point in directions the router was trained
on. The estimate always lies between no factor and the even-gates rule, since real gates are never flatter
than even. Reads under a percent of the weights; numpy only.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from moesurgery.errors import RefusedError
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.components import EMBEDDING
from moesurgery.families.family import InputNorm
from moesurgery.families.routing import second_moments
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import numpy as np

MAX_ROWS = 8192
_RUNS = 64  # the sample is 64 runs of neighbouring rows: few reads, also over a network
MAX_WORK = 4e11  # multiply-adds in all routers together


def router_factors(plan: Plan, anatomy: Anatomy, old: int, new: int, seed: int, rho: float = 0.0) -> dict[str, float]:
    """Return sqrt(A_old / A_new) for each MoE block, by its name, for a correlation `rho` of experts' outputs.

    Raises RefusedError where the family's router has no estimate or a tensor for it is missing.
    """
    blocks = anatomy.blocks
    if old == new:
        return {block.where: 1.0 for block in blocks}
    if (why_not := anatomy.settings.family.routing.no_estimate) is not None:
        raise RefusedError(why_not)
    sample = embedding_sample(plan, anatomy, seed, _rows(anatomy))
    kinds = {_norm(anatomy, block).kind for block in blocks}
    samples = {kind: normalised(sample, kind) for kind in kinds}

    def factor(block: MoeBlock) -> float:
        logits = _logits(plan, anatomy, block, samples[_norm(anatomy, block).kind])
        moments = second_moments(anatomy.settings, logits, _bias(plan, block), rho)
        return math.sqrt(moments[old - 1] / moments[new - 1])

    with ThreadPoolExecutor(4) as pool:
        return dict(zip([b.where for b in blocks], pool.map(factor, blocks), strict=True))


def _rows(anatomy: Anatomy) -> int:
    hidden = anatomy.settings.hidden or 1
    work = hidden * anatomy.experts * len(anatomy.blocks)
    return max(256, min(MAX_ROWS, int(MAX_WORK / work)))


def embedding_sample(plan: Plan, anatomy: Anatomy, seed: int, rows: int) -> np.ndarray:
    """Return up to `rows` token embeddings [rows, H], zero rows (padding) left out, drawn by `seed`."""
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
    return np.asarray(sample[np.any(sample != 0, axis=1)])


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
    weight = values_of(plan.tensors[name])
    router = values_of(plan.tensors[block.router.name])
    if block.router.axis == 1:
        router = router.T
    if router.ndim != 2 or router.shape[1] != sample.shape[1]:
        raise RefusedError(f"{block.router.name} has shape {list(router.shape)}, not [experts, {sample.shape[1]}]")
    router = router[: block.experts] * (weight + 1 if norm.kind == "rms1" else weight)
    logits = sample @ router.T
    for member in block.named("router_bias"):
        logits = logits + values_of(plan.tensors[member.name])[: block.experts]
    return np.asarray(logits)


def _bias(plan: Plan, block: MoeBlock) -> np.ndarray | None:
    for member in block.named("correction_bias"):
        return values_of(plan.tensors[member.name]).reshape(-1)[: block.experts]
    return None
