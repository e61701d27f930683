"""What is supported for each family, in words: the table that `moesurgery families` and the docs show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesurgery.families.config_keys import Settings
from moesurgery.families.family import ExpertAxisTensor, Family, Flag, Projection
from moesurgery.families.routing import routing_class

CLASSES = {
    "A": "weights renormalised to a constant sum",
    "B": "raw softmax weights",
    "C": "routed output normalised afterwards: a factor has no effect",
    "D": "routed and shared output normalised together: a factor moves their ratio",
    "E": "a router of its own kind",
}


@dataclass(frozen=True)
class Overview:
    """One row: every text is for people, and follows from the entry alone.

    `factor` says where `rescale` puts its factor, `drop` whether experts can be dropped; both say why not.
    """

    family: Family
    layouts: str
    classes: str
    factor: str
    drop: str

    @property
    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`; reasons for refusals are left to `refusals`."""
        factor, drop = (
            text.split(": ")[0] if text.startswith("refused") else text for text in (self.factor, self.drop)
        )
        return (self.family.name, self.layouts, self.classes, factor, drop)

    @property
    def refusals(self) -> dict[str, str]:
        """Why operations are refused, by their names."""
        reasons = {"rescale": self.factor, "drop-experts": self.drop}
        reasons = {name: text.removeprefix("refused: ") for name, text in reasons.items() if text.startswith("refused")}
        return {**reasons, **self.family.refuses}

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "model_types": list(self.family.model_types),
            "layouts": [
                {"kind": layout.kind, "tensors": {part.path: meaning(part) for part in layout.parts}}
                for layout in self.family.layouts
            ],
            "router": {along.path: about(along) for along in self.family.along},
            "shared": list(self.family.shared),
            "routing_class": self.classes,
            "rescale": self.factor,
            "drop_experts": self.drop,
            "refuses": self.refusals,
            "note": self.family.note,
        }


HEADER = ("family", "experts stored", "class", "rescale", "drop experts")


def overview(family: Family) -> Overview:
    """Return the row of one family."""
    kinds = list(dict.fromkeys(layout.kind for layout in family.layouts))
    return Overview(family, " or ".join(kinds), _classes(family), _factor(family), _drop(family))


def _classes(family: Family) -> str:
    usual = routing_class(Settings(family, {}))
    flag = family.routing.renormalised
    if usual in "AB" and isinstance(flag, Flag) and family.routing.score != "top-softmax":
        return f"{usual}, {'B' if usual == 'A' else 'A'} by {flag.keys[0]}"
    return usual


def _factor(family: Family) -> str:
    routing = family.routing
    if reason := family.refuses.get("rescale"):
        return f"refused: {reason}"
    if routing.fixed_top_k is not None:
        return f"refused: the code always uses top-{routing.fixed_top_k}"
    if routing.after == "routed":
        return "top-k only: a factor has no effect"
    return f"config: {routing.routed_scale_key}" if routing.routed_scale_key else "down-projections"


def _drop(family: Family) -> str:
    reason = family.refuses.get("drop-experts")
    return f"refused: {reason}" if reason else "yes"


def meaning(part: Projection) -> str:
    """Return what a projection holds, with its axes."""
    out, into = {"gate": ("I", "H"), "up": ("I", "H"), "gate_up": ("2I", "H"), "down": ("H", "I")}[part.role]
    axes = f"{out}, {into}" if part.order == "oi" else f"{into}, {out}"
    if part.rows:
        axes = f"E*{axes}"
    elif "#" not in part.path:
        axes = f"E, {axes}"
    return f"{part.role} [{axes}]" + (", gate and up in turn" if part.interleaved else "")


def about(along: ExpertAxisTensor) -> str:
    """Return what a tensor beside the experts is."""
    words = along.role.replace("_", " ")
    axis = f", experts along axis {along.axis}" if along.axis else ""
    return words + axis + (", followed by rows of no routed expert" if along.extra else "")
