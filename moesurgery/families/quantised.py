"""Quantised weights: which tensors belong together, how many weights they stand for, where a factor goes.

A quantised linear is a main tensor (`….weight`, `…_blocks`, `….qweight`) and companions (`….weight_scale`,
…). Only the main tensor stands for parameters. A factor on the weight is a factor on one companion, exact
where that is floating point of enough precision, and exact for powers of two where it is an exponent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS

CompanionKind = Literal["scale", "divisor", "input", "meta"]


@dataclass(frozen=True)
class QuantTensor:
    """A tensor `base + suffix` that belongs to the main tensor `base + of`.

    kind "scale" multiplies the weight, "divisor" divides it, "input" concerns activations (never touched),
    "meta" is shapes, zero points, indices. `rank`: where several could take a factor, the lowest does.
    """

    suffix: str
    of: str
    kind: CompanionKind
    rank: int = 1


COMPANIONS: tuple[QuantTensor, ...] = (
    # FP8 in blocks (DeepSeek-V3, Qwen3-FP8, MiniMax) and, fused, as transformers 5 writes it
    QuantTensor(".weight_scale_inv", ".weight", "scale"),
    QuantTensor("_scale_inv", "", "scale"),
    QuantTensor("_scale_inv", ".weight", "scale"),
    QuantTensor(".activation_scale", ".weight", "input"),
    # DeepSeek-V4: FP4 and FP8 with E8M0 scales
    QuantTensor(".scale", ".weight", "scale"),
    # MXFP4 (gpt-oss)
    QuantTensor("_scales", "_blocks", "scale"),
    # compressed-tensors; NVFP4 has the divisor as well
    QuantTensor(".weight_scale", ".weight_packed", "scale"),
    QuantTensor(".weight_global_scale", ".weight_packed", "divisor", rank=0),
    QuantTensor(".weight_shape", ".weight_packed", "meta"),
    QuantTensor(".weight_zero_point", ".weight_packed", "meta"),
    QuantTensor(".weight_g_idx", ".weight_packed", "meta"),
    QuantTensor(".input_scale", ".weight_packed", "input"),
    QuantTensor(".input_global_scale", ".weight_packed", "input"),
    QuantTensor(".weight_scale", ".weight", "scale"),
    QuantTensor(".weight_zero_point", ".weight", "meta"),
    QuantTensor(".input_scale", ".weight", "input"),
    QuantTensor(".output_scale", ".weight", "input"),
    # NVFP4 of ModelOpt
    QuantTensor(".weight_scale_2", ".weight", "scale", rank=0),
    QuantTensor("_weight_scale", "", "scale"),
    QuantTensor("_weight_scale_2", "", "scale", rank=0),
    QuantTensor("_input_scale", "", "input"),
    # fused MXFP8 (Inkling-2)
    QuantTensor("_scale", "", "scale"),
    # Mistral's own names
    QuantTensor(".qscale_weight", ".weight", "scale"),
    QuantTensor(".qscale_act", ".weight", "input"),
    # GPTQ and AWQ
    QuantTensor(".scales", ".qweight", "scale"),
    QuantTensor(".qzeros", ".qweight", "meta"),
    QuantTensor(".g_idx", ".qweight", "meta"),
    # MLX: w * scale + bias, in words of 32 bits along the inputs
    QuantTensor(".scales", ".weight", "scale"),
    QuantTensor(".biases", ".weight", "meta"),
    # bitsandbytes
    QuantTensor(".SCB", ".weight", "scale"),
    QuantTensor(".weight_format", ".weight", "meta"),
    QuantTensor(".weight.absmax", ".weight", "scale"),
    QuantTensor(".weight.quant_map", ".weight", "meta"),
    QuantTensor(".weight.nested_absmax", ".weight", "scale", rank=0),
    QuantTensor(".weight.nested_quant_map", ".weight", "meta"),
    QuantTensor(".weight.quant_state.bitsandbytes__nf4", ".weight", "meta"),
    QuantTensor(".weight.quant_state.bitsandbytes__fp4", ".weight", "meta"),
)
_BY_LENGTH = tuple(sorted(COMPANIONS, key=lambda c: -len(c.suffix)))

# Endings of a main tensor, longest first; "" is a bare parameter such as a fused `experts.down_proj`.
MAIN_SUFFIXES = (".weight_packed", ".qweight", "_blocks", ".weight", "")
BIAS_SUFFIXES = (".bias", "_bias")


class TensorName(NamedTuple):
    """A tensor name taken apart: `base + suffix`, and what the suffix makes of it."""

    base: str
    suffix: str
    companion: QuantTensor | None = None
    bias: bool = False

    @property
    def main(self) -> bool:
        return self.companion is None and not self.bias


def split_name(name: str, exists: Callable[[str], bool], dtype_of: Callable[[str], str]) -> TensorName:
    """Split `name` into base and suffix. A companion counts only beside a main tensor that needs one."""
    for companion in _BY_LENGTH:
        if not name.endswith(companion.suffix):
            continue
        base = name[: -len(companion.suffix)]
        main = base + companion.of
        if base and main != name and exists(main) and dtype_of(main) not in PLAIN_FLOATS:
            return TensorName(base, companion.suffix, companion)
    for suffix in BIAS_SUFFIXES:
        if name.endswith(suffix):
            return TensorName(name[: -len(suffix)], suffix, bias=True)
    for suffix in MAIN_SUFFIXES:
        if name.endswith(suffix):
            return TensorName(name[: len(name) - len(suffix)], suffix)
    raise AssertionError("the empty suffix always matches")


# Outputs of AWQ in a 32-bit word, the one in the lowest bits first (AutoAWQ, 4 bits).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACKED = (".qweight", ".weight_packed")


class Outputs(NamedTuple):
    """Where the outputs of a quantised linear are in one of its tensors.

    `axis` is None where the tensor is about all outputs alike. `order`: outputs that share a 32-bit word, the one in
    the lowest bits first; empty where each has entries of its own. `stuck` says why single outputs cannot be told.
    """

    axis: int | None
    order: tuple[int, ...] = ()
    stuck: str = ""


def count_outputs(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the outputs of a quantised linear by the shapes of its tensors by suffix; None where they do not tell."""
    if ".qweight" in shapes:
        scales = shapes.get(".scales", ())
        return scales[1] if len(scales) == 2 else None
    if any(suffix.startswith(".weight.") for suffix in shapes):
        return None  # bitsandbytes in 4 bits stores a matrix as one column of bytes
    main = shapes.get(".weight_packed") or shapes.get(".weight") or ()
    return main[0] if len(main) == 2 else None


def outputs_in(
    suffix: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, outputs: int, config: Mapping[str, Any]
) -> Outputs:
    """Return where a linear's `outputs` are in its tensor `suffix`, of `dtype`; `shapes` as for `count_outputs`."""
    shape = shapes[suffix]
    odd = len(shapes.get(".qweight", (1, 1))) != 2 or (suffix == ".weight_shape" and shape != (2,))
    if count_outputs(shapes) != outputs or odd:
        return Outputs(None, stuck=f"its {method(config) or 'packed'} form does not tell which part is whose")
    if suffix.endswith("g_idx") or suffix == ".weight_shape" or not any(n > 1 for n in shape):
        return Outputs(None)
    if suffix in (".qweight", ".qzeros", ".scales") and ".qweight" in shapes:
        return _outputs_of_words(shape, shapes[".qweight"][1] != outputs, outputs)
    if shape[0] == outputs:
        return Outputs(0)
    if suffix == ".weight_zero_point" and dtype == "I32":
        lanes = 32 // packed_bits(config)
        if -(-outputs // lanes) == shape[0]:
            return Outputs(0, tuple(range(lanes)))
    if shape[0] == 1 and len(shape) > 1:
        return Outputs(None)  # one row of blocks for all
    return Outputs(None, stuck=f"{list(shape)} has entries for blocks of outputs, not for single ones")


def _outputs_of_words(shape: tuple[int, ...], awq: bool, outputs: int) -> Outputs:
    """Return where outputs are in a tensor of GPTQ or AWQ: along the last axis, alone or packed."""
    if shape[-1] == outputs:
        return Outputs(1)
    lanes = outputs // shape[-1] if shape[-1] and outputs % shape[-1] == 0 else 0
    if lanes not in (4, 8, 16) or (awq and lanes != len(AWQ_ORDER)):
        return Outputs(None, stuck=f"{list(shape)} packs {outputs} outputs in an order that is not known")
    return Outputs(1, AWQ_ORDER if awq else tuple(range(lanes)))


QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `quantization_config` object, wherever config.json nests it; empty where there is none."""
    for place in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(place, Mapping):
            for key in QUANTISATION_KEYS:
                if isinstance(place.get(key), Mapping):
                    return place[key]  # type: ignore[no-any-return]
    return {}


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config without quantisation settings, wherever it nests them."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in QUANTISATION_KEYS or (key == "quantization" and not isinstance(value, Mapping))
    }


def method(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation method that config.json names, None for plain weights."""
    settings = quantisation_config(config)
    name = settings.get("quant_method") or settings.get("quant_algo")
    if not name and isinstance(config.get("quantization"), Mapping) and settings.get("group_size"):
        return "mlx"
    return str(name) if name else None


_PACKED_BITS = (2, 3, 4, 8)


def packed_bits(config: Mapping[str, Any]) -> int:
    """Return the bits per weight of packed 32-bit integers: from the config, 4 where it does not say."""
    settings = quantisation_config(config)
    for key in ("bits", "w_bit"):
        if settings.get(key) in _PACKED_BITS:
            return int(settings[key])
    return next((bits for bits, _ in _packed_groups(config)), 4)


def _packed_groups(config: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """Return (bits, weights per scale) of each group of layers of compressed-tensors; None for one scale per row."""
    groups = quantisation_config(config).get("config_groups")
    bits_and_sizes: list[tuple[int, int | None]] = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("num_bits") in _PACKED_BITS:
            size = weights.get("group_size")
            bits_and_sizes.append((int(weights["num_bits"]), size if type(size) is int and size > 0 else None))
    return bits_and_sizes


def bits_that_fit(config: Mapping[str, Any], packed: tuple[int, ...], scales: tuple[int, ...]) -> set[int]:
    """Return the bits per weight that a `.weight_packed` of 32-bit words can have, by the shape of its scales.

    More than one where groups of layers have different bits and shapes do not tell which group a tensor is of.
    """
    groups = _packed_groups(config)
    if len({bits for bits, _ in groups}) < 2 or not packed or not scales:
        return {packed_bits(config)}
    return {bits for bits, size in groups if scales[-1] == (-(-packed[-1] * 32 // bits // size) if size else 1)}


def holds_quantised(tensors: Mapping[str, Any]) -> bool:
    """Whether one of the tensors is a quantised weight, with what belongs to it beside it."""
    for name, tensor in tensors.items():
        if tensor.dtype in PLAIN_FLOATS:
            continue
        stem = split_name(name, tensors.__contains__, lambda n: str(tensors[n].dtype))
        if stem.companion is not None:
            return True
        if any(stem.base + c.suffix in tensors for c in COMPANIONS if stem.base + c.of == name):
            return True
    return False


def weights_per_element(dtype: str, suffix: str, companions: Iterable[str], bits: int) -> int:
    """Return how many weights one stored element of a main tensor stands for.

    `companions` are the suffixes of the tensors that stand beside it; `bits` comes from `packed_bits`.
    """
    beside = set(companions)
    if suffix in (".qweight", ".weight_packed") and dtype in ("I32", "U32"):
        return 32 // bits
    if dtype == "U32" and ".scales" in beside:
        return 32 // bits
    if suffix in ("_blocks", ".weight_packed") and dtype == "U8":
        return 2
    if dtype == "U8" and beside & {
        ".weight_scale",
        "_weight_scale",
        ".weight_scale_2",
        "_weight_scale_2",
        ".weight.absmax",
    }:
        return 2
    if dtype == "I8" and ".scale" in beside:
        return 2
    return 1


def _mlx_weights(base: str, config: Mapping[str, Any], shape_of: Callable[[str], tuple[int, ...] | None]) -> int | None:
    """Return how many weights one of MLX stands for: as many as its scales, times the weights of a group."""
    scales, settings = shape_of(f"{base}.scales"), quantisation_config(config)
    own = settings.get(base)
    size = (own if isinstance(own, Mapping) else settings).get("group_size")
    return math.prod(scales) * size if scales and type(size) is int and size > 0 else None


def packed_weights(
    name: str, config: Mapping[str, Any], shape_of: Callable[[str], tuple[int, ...] | None]
) -> int | None:
    """Return how many weights a packed tensor stands for, by the shapes beside it; None where they do not tell.

    GPTQ packs inputs, [in * bits / 32, out], and lists the group of each input; AWQ packs outputs,
    [in, out * bits / 32]. So the count is exact for every number of bits, and where layers differ in it.
    """
    if name.endswith(".weight"):
        return _mlx_weights(name.removesuffix(".weight"), config, shape_of)
    suffix = ".qweight" if name.endswith(".qweight") else ".weight_packed"
    base = name.removesuffix(suffix)
    packed, groups = shape_of(name), shape_of(f"{base}.g_idx")
    scales = shape_of(base + (".scales" if suffix == ".qweight" else ".weight_scale"))
    if not packed or not scales or len(packed) != 2:
        return None
    if suffix == ".weight_packed":
        fitting = bits_that_fit(config, packed, scales)
        return packed[0] * packed[1] * 32 // fitting.pop() if len(fitting) == 1 else None
    if len(scales) != 2:
        return None
    if packed[1] != scales[1]:
        return packed[0] * scales[1]
    return groups[0] * scales[1] if groups else None
