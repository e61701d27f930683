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
from dataclasses import dataclass
from typing import Any

from moesurgery.count.params import Counts
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, HasShape
from moesurgery.families.layer_stack import runs_of

KV_BYTES_PER_VALUE = 2
BATCHES = (1, 8, 32, 128, 512)
MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class Accelerator:
    """Dense bf16 peak in TFLOP/s and memory bandwidth in TB/s, from the makers' data sheets."""

    name: str
    tflops: float
    terabytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which a kernel is compute bound."""
        return self.tflops / self.terabytes_per_second


ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("a100", 312, 2.04),
        Accelerator("h100", 989, 3.35),
        Accelerator("h200", 989, 4.8),
        Accelerator("b200", 2250, 8.0),
        Accelerator("mi300x", 1307, 5.3),
        Accelerator("l40s", 362, 0.864),
        Accelerator("rtx4090", 165, 1.008),
    )
}


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


def roofline(
    anatomy: Anatomy, tensors: Mapping[str, HasShape], counts: Counts, context: int, accelerator: Accelerator
) -> Roofline | None:
    """Return the costs per token; None where the active parameters are not known."""
    if counts.active is None:
        return None
    routed = {m.name for block in anatomy.main_blocks for m in block.members if m.part}
    fixed_bytes = routed_bytes = fixed_weights = routed_weights = 0
    tied = counts.tied_embeddings
    runs = runs_of(anatomy)
    for name, info in tensors.items():
        component = anatomy.component[name]
        if component in (parts.VISION, parts.MTP) or (component == parts.EMBEDDING and not tied):
            continue
        times = runs.get(name, 1)  # a tied block is computed, and read, for each position that runs it
        matrix = times * anatomy.parameters[name] if len(info.shape) > 1 else 0
        if name in routed:
            routed_bytes += times * info.nbytes
            routed_weights += matrix
        else:
            fixed_bytes += times * info.nbytes
            fixed_weights += matrix
    experts, k = counts.num_experts or 0, counts.top_k or 0
    share = k / experts if experts else 0.0
    flops = round(2 * (fixed_weights + routed_weights * share))

    def hit(batch: int) -> float:
        return experts * (1 - (1 - share) ** batch) if experts else 0.0

    def streamed(batch: int) -> float:
        return fixed_bytes + (routed_bytes * hit(batch) / experts if experts else 0.0)

    kv = kv_layers(anatomy, tensors)
    kv_token = sum(width for width, _, _ in kv) * KV_BYTES_PER_VALUE if kv is not None else None
    kv_read, flops_attention = 0, None
    if kv is not None:
        kv_read = sum(width * KV_BYTES_PER_VALUE * min(context, window or context) for width, _, window in kv)
        flops_attention = sum(2 * per_position * min(context, window or context) for _, per_position, window in kv)
    work = flops + (flops_attention or 0)

    def intensity(batch: int) -> float:
        return batch * work / (streamed(batch) + batch * kv_read)

    return Roofline(
        flops_weights=flops,
        flops_attention=flops_attention,
        weight_bytes={b: streamed(b) for b in BATCHES},
        experts_hit={b: hit(b) for b in BATCHES},
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


def kv_layers(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> list[tuple[int, int, int | None]] | None:
    """Return, per attention layer, (cached values per token, heads * (d_qk + d_v), window or None).

    Widths come from the key and value projections that are stored; None where they cannot be told.
    """
    first = anatomy.settings.first

    def size(*keys: str) -> int | None:
        value = first(keys)
        return value if type(value) is int and value > 0 else None

    heads = size("num_attention_heads", "n_heads", "n_head")
    stated = first(("head_dim", "attention_head_dim"))
    head_dim = stated if stated is not None else (anatomy.settings.hidden or 0) // (heads or 1)
    if heads is None or type(head_dim) is not int:
        return None
    latent, rope = size("kv_lora_rank"), size("qk_rope_head_dim")
    types, window = first(("layer_types",)), first(("sliding_window",))
    if first(("use_sliding_window",)) is False or not isinstance(window, int):
        window = None
    keys: dict[int, int] = {}
    values: dict[int, int] = {}
    latents: set[int] = set()
    fused: set[int] = set()
    for name in tensors:
        layer, component = anatomy.layer.get(name), anatomy.component[name]
        if layer is None or component != parts.ATTENTION or not name.endswith(".weight"):
            continue
        module = name.split(".")[-2]
        if module in ("k_proj", "wk"):
            keys[layer] = tensors[name].shape[0]
        elif module in ("v_proj", "wv"):
            values[layer] = tensors[name].shape[0]
        elif module in ("kv_a_proj_with_mqa", "kv_a_proj"):
            latents.add(layer)
        elif module in ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "kv_proj"):
            fused.add(layer)
    kv_heads = size("num_key_value_heads", "n_kv_heads", "kv_n_heads") or heads
    found = []
    known = keys.keys() | latents | fused
    # Every position has keys and values of its own, whatever block it runs.
    positions = anatomy.settings.tie_map or range(max(known, default=-1) + 1)
    for position, layer in enumerate(positions):
        if layer not in known:
            continue
        sliding = isinstance(types, list) and position < len(types) and types[position] == "sliding_attention"
        limit = window if sliding or (window and not isinstance(types, list)) else None
        if layer in latents and latent and rope:
            d_qk, d_v = (size("qk_nope_head_dim") or 0) + rope, size("v_head_dim") or 0
            found.append((latent + rope, heads * (d_qk + d_v), limit))
        elif layer in keys:
            found.append((keys[layer] + values.get(layer, keys[layer]), heads * 2 * head_dim, limit))
        else:
            found.append((2 * kv_heads * head_dim, heads * 2 * head_dim, limit))
    return found or None
