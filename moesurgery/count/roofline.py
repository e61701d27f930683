"""Is decoding memory or compute bound? FLOPs and bytes per token from headers and config.

Per decode step with B sequences of context C (roofline model: Williams et al. 2009; 2 FLOPs per weight and
token: Kaplan et al. 2020, arXiv 2001.08361):

    FLOPs/token  = 2 * (matrix weights executed) + 2 * heads * (d_qk + d_v) * sum over layers of C_l
    experts hit  = E * (1 - (1 - k/E)^B)         distinct experts per layer, uniform routing
    weight bytes = everything but routed experts, once, + routed experts * hit / E
    intensity    = B * FLOPs / (weight bytes + B * KV bytes);   compute bound above peak / bandwidth

Sizes are those stored, so a quantised model streams its quantised bytes. Tied blocks are streamed once for each
position that runs them: a block is too large for any cache but a very small model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moesurgery.count.accelerators import Accelerator
from moesurgery.count.kv_cache import KV_BYTES_PER_VALUE, kv_bytes, kv_layers
from moesurgery.count.params import Counts
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, HasShape
from moesurgery.families.layer_stack import runs_of

BATCHES = (1, 8, 32, 128, 512)
MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class Roofline:
    """What one token costs. `kv_bytes_per_token` is None where the attention layout is not known."""

    flops_weights: int
    flops_attention: int | None
    weight_bytes: dict[int, float]  # by batch size
    experts_hit: dict[int, float]
    kv_bytes_per_token: int | None
    density: float
    context: int
    accelerator: Accelerator
    compute_bound_batch: int | None
    kv_equals_weights_at: int | None

    def as_json(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "accelerator": self.accelerator.name,
            "ridge_flops_per_byte": self.accelerator.ridge,
            "flops_per_token_weights": self.flops_weights,
            "flops_per_token_attention": self.flops_attention,
            "weight_bytes_by_batch": {str(b): round(v) for b, v in self.weight_bytes.items()},
            "experts_hit_by_batch": {str(b): v for b, v in self.experts_hit.items()},
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_equals_weights_at_tokens": self.kv_equals_weights_at,
            "density": self.density,
            "bound_at_batch_1": None
            if self.kv_bytes_per_token is None
            else "compute"
            if self.compute_bound_batch == 1
            else "memory",
            "compute_bound_from_batch": self.compute_bound_batch,
        }


@dataclass(frozen=True)
class StreamedWeights:
    """Bytes read and matrix weights executed in a step that uses all experts: of the routed experts, and the rest."""

    fixed_bytes: float
    routed_bytes: float
    fixed_weights: float
    routed_weights: float

    def resized(self, experts: float, width: float) -> StreamedWeights:
        """Return those of a model with these shares of its experts and of their neurons."""
        share = experts * width
        return replace(self, routed_bytes=self.routed_bytes * share, routed_weights=self.routed_weights * share)

    def narrowed(self, routed: float, fixed: float) -> StreamedWeights:
        """Return those of a model whose routed experts, and whose other tensors, take these shares of their bytes."""
        return replace(self, routed_bytes=self.routed_bytes * routed, fixed_bytes=self.fixed_bytes * fixed)


def streamed_weights(anatomy: Anatomy, tensors: Mapping[str, HasShape], *, tied_embeddings: bool) -> StreamedWeights:
    """Return what a step of decoding streams: neither image encoders, prediction layers nor an embedding of its own."""
    routed = {m.name for block in anatomy.main_blocks for m in block.members if m.part}
    fixed_bytes = routed_bytes = fixed_weights = routed_weights = 0
    runs = runs_of(anatomy)
    for name, info in tensors.items():
        component = anatomy.component[name]
        if component in (parts.VISION, parts.MTP) or (component == parts.EMBEDDING and not tied_embeddings):
            continue
        times = runs.get(name, 1)  # a tied block is computed, and read, for each position that runs it
        matrix = times * anatomy.parameters[name] if len(info.shape) > 1 else 0
        if name in routed:
            routed_bytes += times * info.nbytes
            routed_weights += matrix
        else:
            fixed_bytes += times * info.nbytes
            fixed_weights += matrix
    return StreamedWeights(fixed_bytes, routed_bytes, fixed_weights, routed_weights)


def experts_hit(experts: int, top_k: int, batch: int) -> float:
    """Return how many distinct experts of a layer a batch of tokens is routed to, with even routing."""
    return experts * (1 - (1 - top_k / experts) ** batch) if experts else 0.0


def decode_seconds(
    weights: StreamedWeights,
    experts: int,
    top_k: int,
    batch: int,
    *,
    kv_read: int,
    attention: int,
    accelerator: Accelerator,
) -> float:
    """Return the seconds of one decoding step of `batch` sequences: the larger of those of FLOPs and of bytes.

    `kv_read` and `attention` are bytes of cache and FLOPs of attention per token.
    """
    flops = batch * (2 * (weights.fixed_weights + weights.routed_weights * top_k / experts) + attention)
    hit = experts_hit(experts, top_k, batch) / experts
    nbytes = weights.fixed_bytes + weights.routed_bytes * hit + batch * kv_read
    return max(flops / (accelerator.tflops * 1e12), nbytes / (accelerator.terabytes_per_second * 1e12))


def roofline(
    anatomy: Anatomy, tensors: Mapping[str, HasShape], counts: Counts, context: int, accelerator: Accelerator
) -> Roofline | None:
    """Return the costs per token; None where the active parameters are not known."""
    if counts.active is None:
        return None
    weights = streamed_weights(anatomy, tensors, tied_embeddings=counts.tied_embeddings)
    experts, k = counts.num_experts or 0, counts.top_k or 0
    share = k / experts if experts else 0.0
    flops = round(2 * (weights.fixed_weights + weights.routed_weights * share))

    def streamed(batch: int) -> float:
        hit = experts_hit(experts, k, batch) / experts if experts else 0.0
        return weights.fixed_bytes + weights.routed_bytes * hit

    kv = kv_layers(anatomy, tensors)
    kv_token = sum(width for width, _, _ in kv) * KV_BYTES_PER_VALUE if kv is not None else None
    kv_read, flops_attention = 0, None
    if kv is not None:
        kv_read = kv_bytes(kv, context)
        flops_attention = sum(2 * per_position * min(context, window or context) for _, per_position, window in kv)
    work = flops + (flops_attention or 0)

    def intensity(batch: int) -> float:
        return batch * work / (streamed(batch) + batch * kv_read)

    return Roofline(
        flops_weights=flops,
        flops_attention=flops_attention,
        weight_bytes={b: streamed(b) for b in BATCHES},
        experts_hit={b: experts_hit(experts, k, b) for b in BATCHES},
        kv_bytes_per_token=kv_token,
        density=flops / (2 * counts.total) if counts.total else 0.0,
        context=context,
        accelerator=accelerator,
        compute_bound_batch=_first_above(intensity, accelerator.ridge) if kv is not None else None,
        kv_equals_weights_at=round(streamed(1) / kv_token) if kv_token else None,
    )


def _first_above(intensity: Any, ridge: float) -> int | None:
    """Return the smallest batch whose intensity reaches the ridge; None where none does.

    Intensity grows with the batch: weights are read once for all, KV once for each.
    """
    if intensity(MAX_BATCH) < ridge:
        return None
    low, high = 0, MAX_BATCH
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if intensity(middle) >= ridge else (middle, high)
    return high
