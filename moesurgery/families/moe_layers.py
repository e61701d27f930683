"""Which layers are MoE, by the config: a check on what the tensors say, which is what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from moesurgery.errors import CheckpointError
from moesurgery.families.config_keys import Settings

_SPARSE_KINDS = ("sparse", "moe", "hash_moe")
_MOST_LAYERS = 100_000  # a config may say anything: no set of more than this is made


def _by_kind(settings: Settings, key: str, layers: int) -> set[int]:
    return {i for i, kind in enumerate(settings.first((key,))) if kind in _SPARSE_KINDS}


def _by_numbers(settings: Settings, key: str, layers: int) -> set[int]:
    """A list of numbers, or a string of them with commas."""
    value = settings.first((key,))
    return set(map(int, value.split(","))) if isinstance(value, str) else set(value)


def _only_dense(settings: Settings, key: str, layers: int) -> set[int]:
    step, dense = settings.first(("decoder_sparse_step",), 1), settings.first(("mlp_only_layers",), [])
    return {i for i in range(layers) if i not in dense and step > 0 and (i + 1) % step == 0}


def _frequency(settings: Settings, key: str, layers: int) -> set[int]:
    """A list of 0 and 1 per layer; else every so many layers, after the first dense ones."""
    value = settings.first((key,))
    if isinstance(value, list):
        return {i for i, sparse in enumerate(value) if sparse}
    first = settings.first(("first_k_dense_replace",), 0)
    return {i for i in range(first, layers) if i % value == 0}


def _after_dense(settings: Settings, key: str, layers: int) -> set[int]:
    return set(range(settings.first((key,)), layers))


def _period(settings: Settings, key: str, layers: int) -> set[int]:
    offset = settings.first(("expert_layer_offset",), 1)
    return {i for i in range(layers) if i % settings.first((key,)) == offset}


def _interleaved(settings: Settings, key: str, layers: int) -> set[int]:
    step = settings.first((key,))
    return set(range(step - 1, layers, step))


def _interval(settings: Settings, key: str, layers: int) -> set[int]:
    start, end, step = (settings.first((f"moe_layer_{k}",)) for k in ("start_index", "end_index", "interval"))
    start, end = (max(v) if isinstance(v, list) else v for v in (start, end))
    end = layers - 1 if end in (None, -1) else end
    return {i for i in range(start, end + 1) if (i + 1) % (step or 1) == 0}


def _stacks(settings: Settings, key: str, layers: int) -> set[int]:
    """Switch: every so many layers of encoder and of decoder, so that so many are sparse."""
    sparse_layers = set()
    for total, sparse in (("num_layers", key), ("num_decoder_layers", "num_sparse_decoder_layers")):
        count, step = settings.first((total,)), settings.first((total,)) // settings.first((sparse,))
        sparse_layers |= {i for i in range(count) if i % step == 1 or step == 1}
    return sparse_layers


def _by_block(settings: Settings, key: str, layers: int) -> set[int]:
    return {i for i, block in enumerate(settings.first((key,))) if block.get("block_type", "moe") == "moe"}


def _pattern(settings: Settings, key: str, layers: int) -> set[int]:
    return {i for i, kind in enumerate(settings.first((key,))) if kind == "E"}


_RULES: Mapping[str, Callable[[Settings, str, int], set[int]]] = {
    "mlp_layer_types": _by_kind,
    "layers_block_type": _by_kind,
    "hybrid_override_pattern": _pattern,
    "block_configs": _by_block,
    "moe_layers": _by_numbers,
    "moe_layers_enum": _by_numbers,
    "mlp_only_layers": _only_dense,
    "decoder_sparse_step": _only_dense,
    "encoder_sparse_step": _interleaved,
    "num_sparse_encoder_layers": _stacks,
    "moe_layer_freq": _frequency,
    "moe_layer_frequency": _interleaved,
    "moe_layer_interval": _interleaved,
    "first_k_dense_replace": _after_dense,
    "num_dense_layers": _after_dense,
    "dense_mlp_idx": _after_dense,
    "expert_layer_period": _period,
    "interleave_moe_layer_step": _interleaved,
    "moe_layer_start_index": _interval,
}


def moe_layers(settings: Settings) -> set[int] | None:
    """Return the layers that the config calls MoE. None where it does not say, or says it in a strange way."""
    try:
        layers = settings.layers
    except CheckpointError:
        return None
    if layers is not None and layers > _MOST_LAYERS:
        return None
    for key in settings.family.sparse:
        if settings.first((key,)) is not None:
            try:
                stated = _RULES[key](settings, key, layers or 0)
                # Lists of Step-3.5 go on behind the stack, with prediction layers.
                return stated if layers is None else {layer for layer in stated if layer < layers}
            except (AttributeError, TypeError, ValueError, ArithmeticError, MemoryError):
                return None
    return None if layers is None or settings.family.sparse else set(range(layers))


def layers_note(settings: Settings, found: set[int]) -> str | None:
    """Return where config and tensors differ, None where they agree or nothing can be said."""
    stated = moe_layers(settings)
    if stated is None or not found:
        return None
    found = positions(settings, found)
    if stated == found:
        return None
    return f"config.json makes layers {ranges(stated)} MoE, the tensors {ranges(found)}: the tensors count"


def positions(settings: Settings, blocks: set[int]) -> set[int]:
    """Return the layers that run one of `blocks`: these themselves, and in a tied model those that share them."""
    tie_map = settings.tie_map
    return blocks if tie_map is None else {i for i, source in enumerate(tie_map) if source in blocks}


def ranges(numbers: Iterable[int]) -> str:
    """Show numbers as `0, 3-5`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
