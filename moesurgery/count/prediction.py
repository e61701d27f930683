"""How large the layers for multi-token prediction (MTP) are, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesurgery.families.anatomy import Anatomy, HasShape
from moesurgery.families.components import MTP
from moesurgery.families.layer_config import prediction_layers
from moesurgery.families.tensor_names import name_template


@dataclass(frozen=True)
class PredictionPart:
    """The prediction layers of a model. `layers` are stored, config.json names `declared`.

    `parameters` and `nbytes` are theirs alone, `share` is that of all parameters of the checkpoint.
    """

    layers: int
    declared: int
    parameters: int
    nbytes: int
    share: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self, size: str) -> str:
        """Say it in words; `size` is `nbytes` in words."""
        if not self.layers:
            return f"config.json names {self.declared}, and no tensor belongs to one"
        named = "" if self.declared == self.layers else f", {self.declared} of them named by config.json"
        return (
            f"{self.layers}{named}: {self.parameters:,} parameters, {100 * self.share:.2f} % of all, {size}; with them"
            " a step of decoding gives 1 token and the drafted ones that are accepted: how many, only running says"
        )


def prediction_part(anatomy: Anatomy, tensors: Mapping[str, HasShape]) -> PredictionPart | None:
    """Return what a model has for multi-token prediction; None where it has, and declares, nothing."""
    names = [name for name, component in anatomy.component.items() if component == MTP]
    declared = prediction_layers(anatomy.settings)
    if not names and not declared:
        return None
    layers = set()
    for name in names:
        # A layer is known by its first number, behind the stack (layers.61) or in a module of its own (mtp.layers.0).
        template, numbers = name_template(name)
        if "#." in template and not template.startswith("#"):
            layers.add((template.partition("#")[0], numbers[0]))
    parameters = sum(anatomy.parameters[name] for name in names)
    every = sum(anatomy.parameters.values())
    return PredictionPart(
        max(len(layers), 1 if names else 0),
        declared,
        parameters,
        sum(tensors[name].nbytes for name in names),
        parameters / every if every else 0.0,
    )
