"""`moesurgery inspect`: what was recognised of a model, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.header import TensorInfo
from moesurgery.cli._common_options import Json, Model
from moesurgery.cli._console import console, human_bytes
from moesurgery.count.prediction import PredictionPart, prediction_part
from moesurgery.errors import CheckpointError
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.config_keys import EXPERTS_KEYS, TOP_K_KEYS, keys_present
from moesurgery.families.moe_layers import ranges
from moesurgery.families.overview import CLASSES, overview
from moesurgery.families.quantised import method
from moesurgery.families.recognition import recognise
from moesurgery.families.routing import routing_class
from moesurgery.families.tensor_names import OWN_MARK, name_template


def inspect_command(model: Model = ".", as_json: Json = False) -> None:
    """Show what is recognised of a model: family, layout, experts, tensors in groups, and anything unknown.

    Reads headers only; nothing else is downloaded from hf://org/name.
    """
    checkpoint = open_checkpoint(model, headers_only=True)
    broken: list[tuple[MoeBlock, CheckpointError]] = []
    anatomy = recognise(checkpoint.config, checkpoint.tensors, broken)
    anatomy.notes.extend(error.message for _, error in broken)
    groups = tensor_groups(anatomy, checkpoint.tensors)
    predicting = prediction_part(anatomy, checkpoint.tensors)
    facts = _facts(anatomy, checkpoint.tensors, predicting)
    if as_json:
        document = {"schema_version": 1, "model": checkpoint.source.identity, **facts}
        console.json(document | {"tensors": [group.as_json() for group in groups]})
        return
    console.result(checkpoint.source.identity)
    for key, value in facts.items():
        if value not in (None, [], {}) and key != "prediction":
            console.result(f"{key.replace('_', ' '):<15} {_words(value)}")
    if predicting is not None:
        console.result(f"{'prediction':<15} {predicting.sentence(human_bytes(predicting.nbytes))}")
    console.result()
    rows = [(str(g.count), g.name, g.dtype, g.shapes, g.component.replace("_", " ")) for g in groups]
    console.table(("", "tensors", "dtype", "shape", "part"), rows, right=(0,))


@dataclass
class TensorPattern:
    """Tensors whose names differ in their numbers only, of one dtype, shape and part of the model."""

    template: str
    dtype: str
    shape: tuple[int, ...]
    component: str
    numbers: list[set[int]]
    count: int = 0
    nbytes: int = 0

    @property
    def name(self) -> str:
        """The template with the numbers that occur: `model.layers.[0-31].mlp.experts.[0-7].w1.weight`."""
        pieces = self.template.split("#")
        filled = [f"[{ranges(occurring)}]" if len(occurring) > 1 else str(*occurring) for occurring in self.numbers]
        return "".join(a + b for a, b in zip(pieces, [*filled, ""], strict=True)).replace(OWN_MARK, "#")

    @property
    def shapes(self) -> str:
        return " x ".join(map(str, self.shape)) or "one number"

    def as_json(self) -> dict[str, Any]:
        return {
            "tensors": self.name,
            "count": self.count,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "component": self.component,
        }


def tensor_groups(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> list[TensorPattern]:
    """Return the tensors in groups, in the order of the first of each."""
    groups: dict[tuple[Any, ...], TensorPattern] = {}
    for name, info in tensors.items():
        template, numbers = name_template(name)
        component = anatomy.component[name]
        key = (template, info.dtype, info.shape, component)
        if key not in groups:
            groups[key] = TensorPattern(template, info.dtype, info.shape, component, [set() for _ in numbers])
        group = groups[key]
        group.count += 1
        group.nbytes += info.nbytes
        for seen, number in zip(group.numbers, numbers, strict=True):
            seen.add(number)
    return list(groups.values())


def _facts(anatomy: Anatomy, tensors: Mapping[str, TensorInfo], predicting: PredictionPart | None) -> dict[str, Any]:
    family, settings = anatomy.family, anatomy.settings
    main = anatomy.main_blocks
    shown = overview(family) if family else None
    layouts = sorted({block.layout.kind for block in anatomy.blocks if block.layout})
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    kind = "dense" if not anatomy.is_moe else "unknown: see docs/families.md"
    letter = routing_class(settings) if family and main else None
    return {
        "model_type": anatomy.model_type,
        "family": family.name if family and main else kind,
        "layout": layouts,
        "layers": settings.layers,
        "moe_layers": _layers(main),
        "prediction_layers": _layers([block for block in anatomy.blocks if block.mtp]),
        "prediction": predicting.as_json() if predicting else None,
        "experts": _or_reason(lambda: f"{anatomy.experts} per layer ({keys_present(settings, EXPERTS_KEYS)})")
        if main
        else None,
        "top_k": _or_reason(lambda: f"{settings.top_k} ({keys_present(settings, TOP_K_KEYS)})") if main else None,
        "groups": _or_reason(lambda: "{1} of {0} kept".format(*settings.groups) if settings.groups else "") or None,
        "routing_class": f"{letter}: {CLASSES[letter]}" if letter else None,
        "rescale": shown.factor if shown and main else None,
        "drop_experts": shown.drop if shown and main else None,
        "quantisation": method(anatomy.config),
        "dtypes": {dtype: human_bytes(size) for dtype, size in sorted(dtypes.items())},
        "notes": anatomy.notes,
        "unrecognised": anatomy.unrecognised,
    }


def _or_reason(value: Callable[[], str]) -> str:
    """Return a value, or what is wrong with it: `inspect` shows the rest all the same."""
    try:
        return value()
    except CheckpointError as error:
        return error.message


def _layers(blocks: list[MoeBlock]) -> str | None:
    return ranges({block.layer for block in blocks}) if blocks else None


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {of}" for key, of in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    return str(value)
