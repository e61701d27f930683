"""Which tensors belong to layers for multi-token prediction (MTP), and whether config.json declares such layers."""

from __future__ import annotations

from dataclasses import dataclass

from moesurgery.families.components import VISION, is_mtp
from moesurgery.families.config_keys import PREDICTION_KEYS
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.context import Context

# What a layer for multi-token prediction has and no other: DeepSeek-V3's names, which all others took over; in a GGUF
# they stand below `nextn`.
_PARTS = frozenset(("eh_proj", "enorm", "hnorm", "shared_head", "nextn"))


@dataclass(frozen=True)
class PredictionLayers:
    """The numbers of the language model's plain layers, and of those for prediction, which may stand behind them.

    `own_module`: there are such layers in a module of their own, `mtp`. `declared`: how many config.json names.
    """

    plain: frozenset[int]
    numbers: frozenset[int]
    own_module: bool
    declared: int

    def holds(self, name: str) -> bool:
        """Whether a tensor, also under the name that transformers gives it, belongs to such a layer."""
        if is_mtp(name):
            return True
        template, numbers = name_template(name)
        return template.partition("#")[0].endswith("layers.") and numbers[0] in self.numbers


def language_and_prediction_layers(subject: Context) -> PredictionLayers:
    """Tell the layers of a checkpoint apart by their names."""
    stacks: dict[str, set[int]] = {}
    parts: dict[int, set[str]] = {}
    for name, layer in subject.anatomy.layer.items():
        root, _, rest = name.partition(f".{layer}.")
        if subject.anatomy.component[name] == VISION or is_mtp(name):
            continue
        stacks.setdefault(root, set()).add(layer)
        parts.setdefault(layer, set()).add(rest.split(".")[0])
    deepest = max(stacks.values(), key=len, default=set())
    numbers = {layer for layer in deepest if not parts[layer].isdisjoint(_PARTS)}
    declared = subject.anatomy.settings.first(PREDICTION_KEYS, 0)
    return PredictionLayers(
        frozenset(deepest - numbers),
        frozenset(numbers),
        any(is_mtp(name) for name in subject.tensors),
        declared if type(declared) is int else 0,
    )
