"""Numbers of experts and widths that the kernels of clients take badly, and what an awkward one costs.

Facts read in the clients' own sources and issues; `source` says where. docs/clients.md lists them. What is said of
numbers is about the routed experts alone: `families.clients` has what clients cannot do for a model in any form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesurgery.families.anatomy import Anatomy
from moesurgery.families.config_keys import Settings
from moesurgery.families.quantised import quantisation_config

RANK_COUNTS = (2, 4, 8)  # of tensor and expert parallelism, as machines have them
WIDTH_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size", "ffn_dim")
_FUSED_TOP_K = frozenset((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 192, 320, 384, 448, 576))


@dataclass(frozen=True)
class MoeShape:
    """What kernels see of a model's routed experts. `width`: the neurons of one, None where config.json does not say.

    `block` is how many neurons share a scale of FP8 in blocks, 0 for other forms; `groups` those of the router, 1 for
    none; `score` the scoring function, as `RouterRule` has it.
    """

    experts: int
    width: int | None
    score: str
    groups: int = 1
    block: int = 0


@dataclass(frozen=True)
class NumberRule:
    """What one client wants of a number, what happens otherwise, and where that was read.

    `misses` returns the awkward number in words, "" where there is none.
    """

    client: str
    wants: str
    otherwise: str
    source: str
    misses: Callable[[MoeShape], str]

    def warning_for(self, shape: MoeShape) -> str:
        """Return what a user of the model must know, "" where its numbers are as wanted."""
        awkward = self.misses(shape)
        return f"{awkward}: {self.client} wants {self.wants}; otherwise {self.otherwise}" if awkward else ""


def moe_shape(anatomy: Anatomy) -> MoeShape:
    """Return the shape of a model's routed experts."""
    settings = anatomy.settings
    groups = settings.groups
    return MoeShape(anatomy.experts, _width(settings), settings.score, groups[0] if groups else 1, _fp8_block(settings))


def awkward_numbers(client: str, shape: MoeShape) -> list[NumberRule]:
    """Return the rules of a client that a model's numbers do not keep."""
    return [rule for rule in NUMBER_RULES if rule.client == client and rule.misses(shape)]


def _width(settings: Settings) -> int | None:
    value = settings.first(WIDTH_KEYS)
    return value if type(value) is int and value > 0 else None


def _fp8_block(settings: Settings) -> int:
    block = (quantisation_config(settings.config) or {}).get("weight_block_size")
    return block[0] if isinstance(block, list) and block and type(block[0]) is int and block[0] > 0 else 0


def _listed(sizes: list[int]) -> str:
    return " and ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])]) if len(sizes) > 1 else str(sizes[0])


def _experts_over_ranks(shape: MoeShape) -> str:
    sizes = [size for size in RANK_COUNTS if shape.experts % size]
    return f"{shape.experts} experts over {_listed(sizes)} ranks" if sizes else ""


def _width_over_ranks(shape: MoeShape) -> str:
    if shape.width is None:
        return ""
    sizes = [size for size in RANK_COUNTS if shape.width % size or (shape.block and shape.width // size % shape.block)]
    blocks = f" in blocks of {shape.block}" if shape.block else ""
    return f"width {shape.width}{blocks} over {_listed(sizes)} ranks" if sizes else ""


def _not_fused(shape: MoeShape) -> str:
    fits = shape.experts in _FUSED_TOP_K or shape.groups > 1 or shape.score not in ("softmax", "top-softmax", "sigmoid")
    return "" if fits else f"{shape.experts} experts"


def _not_sqrt_softplus(shape: MoeShape) -> str:
    return f"{shape.experts} experts" if shape.score == "sqrt-softplus" and shape.experts not in _FUSED_TOP_K else ""


def _not_fused_groups(shape: MoeShape) -> str:
    fits = shape.groups == 1 or (not shape.experts & (shape.experts - 1) and shape.experts // shape.groups <= 32)
    return "" if fits else f"{shape.experts} experts in {shape.groups} groups"


def _width_multiple(multiple: int) -> Callable[[MoeShape], str]:
    return lambda shape: f"width {shape.width}" if shape.width is not None and shape.width % multiple else ""


_SHARDED = "a width that tensor parallelism divides, each part in whole blocks of FP8 scales"
NUMBER_RULES: tuple[NumberRule, ...] = (
    NumberRule(
        "vllm",
        "a power of two up to 512, or 192, 320, 384, 448 or 576 experts",
        "routing takes a general path of two kernels instead of the fused one",
        "csrc/moe/topk_softmax_kernels.cu; vLLM PR 22211",
        _not_fused,
    ),
    NumberRule(
        "vllm",
        "a power of two up to 512, or 192, 320, 384, 448 or 576 experts in this type",
        "it stops with `Unsupported expert number`",
        "vLLM issue 51521; a way round in PR 50982, open",
        _not_sqrt_softplus,
    ),
    NumberRule("vllm", _SHARDED, "it stops while loading", "vLLM issues 54178 and 25292", _width_over_ranks),
    NumberRule(
        "vllm",
        "as many experts on each rank of expert parallelism",
        "some ranks hold one more, and its load balancer (EPLB) refuses",
        "vllm/model_executor/layers/fused_moe: expert_map_manager.py, layer.py",
        _experts_over_ranks,
    ),
    NumberRule(
        "sglang",
        "as many experts on each rank of expert parallelism",
        "it stops",
        "sglang/srt/layers/moe/fused_moe_triton/layer.py",
        _experts_over_ranks,
    ),
    NumberRule("sglang", _SHARDED, "it stops while loading", "SGLang issues 3345 and 26107", _width_over_ranks),
    NumberRule(
        "sglang",
        "a power of two of experts, at most 32 in a group, where routing is in groups",
        "routing takes a slower path than the fused kernel",
        "SGLang PR 4445",
        _not_fused_groups,
    ),
    NumberRule(
        "llama.cpp",
        "a width that is a multiple of 256",
        "k-quants of the down-projections become larger forms (Q4_K Q5_0, Q6_K Q8_0): up to a third more bytes",
        "llama.cpp issue 6614; PR 28474, where a whole model took 6.18 bits instead of 4.5 a weight",
        _width_multiple(256),
    ),
    NumberRule(
        "mlx",
        "a width that is a multiple of the group size, 64 by default",
        "quantisation leaves the down-projections as they are, unless --q-group-size 32 divides them",
        "mlx_lm/utils.py, quantize_model",
        _width_multiple(64),
    ),
    NumberRule(
        "transformers5",
        "a width that is a multiple of 8",
        "its grouped products of 16-bit weights fail (`strides should be multiple of 16 bytes`)",
        "torch._grouped_mm, torch 2.x, run here",
        _width_multiple(8),
    ),
)
