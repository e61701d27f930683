"""What a model of another shape would take: bytes, active parameters, decoding speed. From headers alone.

Every tensor grows with the experts (routers), with their width (FFNs that the class builds from the same number), with
both (routed experts), or with neither. In a quantised form (`plan.written_forms`) routed experts take their codes and
scales. Bytes are those of the weight files, headers included; a KV cache is 2 bytes per value (`count.kv_cache`). The
speed is the roofline's (`count.roofline`): per step of a batch the larger of FLOPs / peak and bytes / bandwidth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from moesurgery.budget.expert_matrices import added_header_bytes, expert_matrices, quantised_bytes
from moesurgery.budget.shape import AS_STORED, BESIDE, FORMS, MixtureShape, mixture_shape
from moesurgery.checkpoint.dtypes import BITS, PLAIN_FLOATS
from moesurgery.count.accelerators import Accelerator
from moesurgery.count.kv_cache import kv_bytes, kv_layers
from moesurgery.count.params import count_params
from moesurgery.count.roofline import decode_seconds, streamed_weights
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families import components as parts
from moesurgery.families.anatomy import Anatomy, BlockTensor, MoeBlock
from moesurgery.moe.ffn_blocks import dense_ffns, shared_experts
from moesurgery.moe.neuron_axis import tensors_with_neurons
from moesurgery.moe.neurons import has_neurons

_FIXED, _EXPERTS, _WIDTH, _BOTH = "fixed", "experts", "width", "both"


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

    `header_bytes` are those of the weight files beside their tensors: a smaller model has no more, unless its experts
    become several tensors each. `tied` are the costs of the same model with pairs of blocks tied. Attributes: `shape`
    of the model as it is, `kv_known` whether its attention layout is.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tensors: Mapping[str, Expr],
        *,
        context: int,
        batch: int,
        accelerator: Accelerator | None = None,
        header_bytes: int = 0,
        tied: ShapeCosts | None = None,
    ) -> None:
        self.tied = tied
        self.shape = mixture_shape(anatomy)
        self._header_bytes = header_bytes
        self._batch, self._accelerator = batch, accelerator
        grows = _growth(anatomy, tensors)
        kept = {name for name, count in anatomy.parameters.items() if count == 0}
        kept |= {m.name for block in anatomy.blocks for m in block.members if m.role == "correction_bias"}
        self._matrices = expert_matrices(anatomy, tensors)
        self._elements: Counter[tuple[str, int]] = Counter()  # of plain weights, by growth and bits
        self._routed: Counter[tuple[str, int]] = Counter()  # the same of the experts' matrices
        self._bytes: Counter[str] = Counter()  # of all others, by growth
        linear = {m.name for b in anatomy.blocks for m in b.members if m.part is not None and m.stem.main}
        for name, info in tensors.items():
            how = grows.get(name, _FIXED)
            if info.dtype in PLAIN_FLOATS and name not in kept:
                bits = int(BITS[info.dtype])
                (self._routed if name in linear else self._elements)[how, bits] += info.nbytes * 8 // bits
            else:
                self._bytes[how] += info.nbytes
        counts = count_params(anatomy, tensors)
        assert counts.active is not None  # a family with blocks and a top-k has them
        routed = {m.name for block in anatomy.main_blocks for m in block.members if m.part is not None}
        share = self.shape.top_k / self.shape.experts
        self._active: dict[tuple[str, bool], float] = defaultdict(float)  # by growth, and whether of a routed expert
        for name, how in grows.items():
            if anatomy.component[name] not in (parts.MTP, parts.VISION):
                of_one = name in routed
                self._active[how, of_one] += anatomy.parameters[name] * (share if of_one else 1)
        self._active[_FIXED, False] += counts.active["all"] - sum(self._active.values())
        self._streamed = streamed_weights(anatomy, tensors, tied_embeddings=counts.tied_embeddings)
        layers = kv_layers(anatomy, tensors)
        self.kv_known = layers is not None
        self._kv = 0 if layers is None else kv_bytes(layers, context)
        self._attention = 0 if layers is None else sum(2 * w * min(context, limit or context) for _, w, limit in layers)

    def _growth_to(self, shape: MixtureShape) -> dict[str, float]:
        """Return by what each kind of tensor is multiplied."""
        experts, width = shape.experts / self.shape.experts, shape.width / self.shape.width
        return {_FIXED: 1.0, _EXPERTS: experts, _WIDTH: width, _BOTH: experts * width}

    def weight_bytes(self, shape: MixtureShape) -> int:
        if shape.tied and self.tied is not None:
            return self.tied.weight_bytes(replace(shape, tied=False))
        added = 0
        if shape.form != AS_STORED and (quantised := FORMS[shape.form].quantised) is not None:
            added = round(added_header_bytes(self._matrices, quantised) * shape.experts / self.shape.experts)
        return round(sum(self.tensor_bytes(shape))) + self._header_bytes + added

    def tensor_bytes(self, shape: MixtureShape) -> tuple[float, float]:
        """Return the bytes of the experts' matrices, where they are plain now, and of all other tensors."""
        growth = self._growth_to(shape)
        form = None if shape.form == AS_STORED else FORMS[shape.form]
        limit = max(BITS.values()) if form is None else form.bits
        others = sum(growth[how] * count for how, count in self._bytes.items())
        if form is not None and form.quantised is not None:
            limit = FORMS[BESIDE].bits if self._routed_bits > FORMS[BESIDE].bits else max(BITS.values())
            routed = growth[_EXPERTS] * quantised_bytes(self._matrices, form.quantised, growth[_WIDTH])
        else:
            routed = sum(growth[how] * n * min(bits, limit) / 8 for (how, bits), n in self._routed.items())
        others += sum(growth[how] * n * min(bits, limit) / 8 for (how, bits), n in self._elements.items())
        return routed, others

    @property
    def _routed_bits(self) -> int:
        return max((bits for _, bits in self._routed), default=0)

    def of(self, shape: MixtureShape) -> Cost:
        """Return what a model of `shape` takes."""
        if shape.tied and self.tied is not None:
            return self.tied.of(replace(shape, tied=False))
        growth = self._growth_to(shape)
        chosen = shape.top_k / self.shape.top_k  # of routed experts so many times as many are active, of any number
        routed = {_BOTH: growth[_WIDTH] * chosen, _EXPERTS: chosen}
        active = round(
            sum(count * (routed[how] if of_one else growth[how]) for (how, of_one), count in self._active.items())
        )
        weights = self.weight_bytes(shape)
        speed = None
        if self._accelerator is not None:
            experts, others = self.tensor_bytes(shape)
            before = self.tensor_bytes(replace(shape, form=AS_STORED))
            streamed = self._streamed.resized(growth[_EXPERTS], growth[_WIDTH])
            seconds = decode_seconds(
                streamed.narrowed(experts / before[0] if before[0] else 1.0, others / before[1]),
                shape.experts,
                shape.top_k,
                self._batch,
                kv_read=self._kv,
                attention=self._attention,
                accelerator=self._accelerator,
            )
            speed = 1 / seconds
        return Cost(weights, self._kv * self._batch, active, speed)


def _growth(anatomy: Anatomy, tensors: Mapping[str, Expr]) -> dict[str, str]:
    """Return what each tensor grows with, of those that do."""

    def of(member: BlockTensor, neurons: Container[str]) -> str:
        if member.part is not None:
            return _BOTH if member.name in neurons else _EXPERTS
        return _EXPERTS if member.axis is not None else _FIXED

    grows: dict[str, str] = {}
    for block in anatomy.blocks:
        neurons = _with_neurons(block, tensors)
        grows |= {member.name: of(member, neurons) for member in block.members}
    family = anatomy.settings.family
    following = shared_experts(anatomy, tensors) if family.shared_width == "" else {}
    if family.dense_width in family.width_keys:
        following |= dense_ffns(anatomy, tensors)
    return grows | {name: _WIDTH for block in following.values() for name in _with_neurons(block, tensors)}


def _with_neurons(block: MoeBlock, tensors: Mapping[str, Expr]) -> set[str]:
    """Return the tensors of a block that lose entries with neurons; where the form does not tell, the width stays."""
    if all(tensors[m.name].dtype in PLAIN_FLOATS for m in block.members):
        return {m.name for m in block.members if m.part is not None and has_neurons(m)}
    try:
        return tensors_with_neurons(block, tensors)
    except RefusedError:
        return set()
