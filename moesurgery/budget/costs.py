"""What a model of another shape would take: bytes, active parameters, decoding speed. From headers alone.

Every tensor grows with the experts (routers), with experts and neurons (routed experts), or with neither. Bytes are
those of the weight files, headers included; a KV cache is 2 bytes per value (`count.kv_cache`). The speed is the
roofline's (`count.roofline`): per step of a batch the larger of FLOPs / peak and bytes / bandwidth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moesurgery.budget.shape import AS_STORED, FORMS, Shape, shape_of
from moesurgery.checkpoint.dtypes import BITS, PLAIN_FLOATS
from moesurgery.count.accelerators import Accelerator
from moesurgery.count.kv_cache import kv_bytes, kv_layers
from moesurgery.count.params import count_params
from moesurgery.count.roofline import decode_seconds, streamed_weights
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, BlockTensor, HasShape
from moesurgery.moe.neurons import has_neurons

_FIXED, _EXPERTS, _NEURONS = "fixed", "experts", "neurons"


@dataclass(frozen=True)
class Cost:
    """What a model of one shape takes. `tokens_per_second` is of one sequence, None where no accelerator is named."""

    weight_bytes: int
    kv_bytes: int
    active: int
    tokens_per_second: float | None = None

    @property
    def memory(self) -> int:
        return self.weight_bytes + self.kv_bytes


class ShapeCosts:
    """The costs of any shape of one model, for one context and batch.

    `header_bytes` are those of the weight files beside their tensors: a smaller model has no more. Attributes:
    `shape` of the model as it is, `kv_known` whether its attention layout is.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tensors: Mapping[str, HasShape],
        *,
        context: int,
        batch: int,
        accelerator: Accelerator | None = None,
        header_bytes: int = 0,
    ) -> None:
        self.shape = shape_of(anatomy)
        self._header_bytes = header_bytes
        self._batch, self._accelerator = batch, accelerator
        grows = _growth(anatomy)
        kept = {name for name, count in anatomy.parameters.items() if count == 0}
        kept |= {m.name for block in anatomy.blocks for m in block.members if m.role == "correction_bias"}
        self._elements: Counter[tuple[str, int]] = Counter()  # of plain weights, by growth and bits
        self._bytes: Counter[str] = Counter()  # of all others, by growth
        for name, info in tensors.items():
            how = grows.get(name, _FIXED)
            if info.dtype in PLAIN_FLOATS and name not in kept:
                self._elements[how, BITS[info.dtype]] += info.nbytes * 8 // BITS[info.dtype]
            else:
                self._bytes[how] += info.nbytes
        counts = count_params(anatomy, tensors)
        assert counts.active is not None  # a family with blocks and a top-k has them
        main = [name for name in grows if anatomy.component[name] not in (parts.MTP, parts.VISION)]
        sizes = Counter[str]()
        for name in main:
            sizes[grows[name]] += anatomy.parameters[name]
        share = self.shape.top_k / self.shape.experts
        self._routed_active = sizes[_NEURONS] * share
        self._router = sizes[_EXPERTS]
        self._fixed_active = counts.active["all"] - self._routed_active - self._router
        self._streamed = streamed_weights(anatomy, tensors, tied_embeddings=counts.tied_embeddings)
        layers = kv_layers(anatomy, tensors)
        self.kv_known = layers is not None
        self._kv = 0 if layers is None else kv_bytes(layers, context)
        self._attention = 0 if layers is None else sum(2 * w * min(context, limit or context) for _, w, limit in layers)

    def weight_bytes(self, shape: Shape) -> int:
        experts, width = shape.experts / self.shape.experts, shape.width / self.shape.width
        growth = {_FIXED: 1.0, _EXPERTS: experts, _NEURONS: experts * width}
        limit = FORMS[shape.form].bits if shape.form != AS_STORED else max(BITS.values())
        total = sum(growth[how] * count for how, count in self._bytes.items())
        total += sum(growth[how] * n * min(bits, limit) / 8 for (how, bits), n in self._elements.items())
        return round(total) + self._header_bytes

    def of(self, shape: Shape) -> Cost:
        """Return what a model of `shape` takes."""
        experts, width = shape.experts / self.shape.experts, shape.width / self.shape.width
        routed = width * shape.top_k / self.shape.top_k
        active = round(self._fixed_active + self._router * experts + self._routed_active * routed)
        weights = self.weight_bytes(shape)
        speed = None
        if self._accelerator is not None:
            as_stored = self.weight_bytes(Shape(shape.experts, shape.width, shape.top_k)) - self._header_bytes
            narrowing = (weights - self._header_bytes) / as_stored
            seconds = decode_seconds(
                self._streamed.resized(experts, width),
                shape.experts,
                shape.top_k,
                self._batch,
                kv_read=self._kv,
                attention=self._attention,
                accelerator=self._accelerator,
                narrowing=narrowing,
            )
            speed = 1 / seconds
        return Cost(weights, self._kv * self._batch, active, speed)


def _growth(anatomy: Anatomy) -> dict[str, str]:
    """Return of every tensor of a block what it grows with."""

    def of(member: BlockTensor) -> str:
        if member.part is not None:
            return _NEURONS if has_neurons(member) else _EXPERTS
        return _EXPERTS if member.axis is not None else _FIXED

    return {member.name: of(member) for block in anatomy.blocks for member in block.members}
