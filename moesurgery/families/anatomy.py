"""What every tensor of a model is: its components, its MoE blocks, and the family that they follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.config_keys import TOP_K_KEYS, Settings, keys_present
from moesurgery.families.family import ExpertAxisTensor, ExpertSet, Family, Layout, Projection
from moesurgery.families.quantised import TensorName
from moesurgery.families.table import by_architecture, by_model_type

_EXPERTS = re.compile(r"expert(?!ise)|switch_mlp|\bmoe\b|_exps\b")
TIED = "tied_"  # before the model_type of a model with tied blocks (`moesurgery tie-blocks`)


class HasShape(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class BlockTensor(NamedTuple):
    """One tensor of an MoE block.

    `role` is a projection ("down") or a router tensor ("correction_bias"). `stem` tells weight from bias and
    companion (of the name's template: use `base` for the name itself). `expert` is the number in the name
    (per-expert layouts); `axis` is the expert axis (all others; None where a tensor of a quantised router is about all
    experts alike). `packed` and `stuck` are those of `quantised.Outputs`.
    """

    name: str
    role: str
    stem: TensorName
    part: Projection | None
    along: ExpertAxisTensor | None
    expert: int | None
    axis: int | None
    packed: tuple[int, ...] = ()
    stuck: str = ""

    @property
    def quantised_router(self) -> bool:
        """Whether it is one of the tensors that a quantised router is made of."""
        return self.along is not None and self.stem.suffix != ""

    @property
    def base(self) -> str:
        """The name without its suffix: what a weight, its bias and its companions have in common."""
        return self.name[: len(self.name) - len(self.stem.suffix)]

    def renumbered(self, expert: int) -> str:
        """The name that the tensor would have as part of another expert (per-expert layouts)."""
        assert self.part is not None
        after = self.part.path.rsplit("#", 1)[1]  # the expert's number is the last of a path
        head = self.base.removesuffix(f"{self.expert}{after}")
        return f"{head}{expert}{after}{self.stem.suffix}"


@dataclass
class MoeBlock:
    """The routed experts of one layer and everything that follows them.

    `of` is the further set of experts that the block is (image experts, attention experts); None for the main one.
    `router_modules` are the modules, with a dot at the end, whose tensors have an expert axis.
    """

    root: str
    layer: int
    container: str
    members: list[BlockTensor] = field(default_factory=list)
    layout: Layout | None = None
    experts: int = 0
    mtp: bool = False
    of: ExpertSet | None = None
    router_modules: tuple[str, ...] = ()

    @property
    def layer_path(self) -> str:
        return f"{self.root}{self.container}.{self.layer}"

    @property
    def where(self) -> str:
        return f"{self.layer_path}.{self.of.name}" if self.of else self.layer_path

    def named(self, role: str) -> list[BlockTensor]:
        return [m for m in self.members if m.role == role]

    @cached_property
    def router(self) -> BlockTensor | None:
        return next((m for m in self.members if m.role == "router" and m.stem.main), None)


@dataclass
class Anatomy:
    """A model taken apart. `component` and `parameters` have an entry for every tensor.

    `parameters[name]` is the number of weights that the tensor stands for: 0 for companions of quantised
    weights, for buffers and for integer tables (those are listed in `buffers` with their elements).
    """

    config: Mapping[str, Any]
    family: Family | None
    is_moe: bool
    blocks: list[MoeBlock]
    component: dict[str, str]
    layer: dict[str, int]
    parameters: dict[str, int]
    buffers: dict[str, int]
    unrecognised: list[str]
    notes: list[str]

    @cached_property
    def settings(self) -> Settings:
        return Settings(self.family or Family("unknown", (), (), ()), self.config)

    @property
    def model_type(self) -> str:
        return model_type_of(self.config)

    @property
    def main_blocks(self) -> list[MoeBlock]:
        """The MoE blocks of the language model, without multi-token-prediction layers."""
        return [block for block in self.blocks if not block.mtp]

    def block(self, where: str) -> MoeBlock:
        """Return the MoE block of this name."""
        return next(block for block in self.blocks if block.where == where)

    @property
    def unknown_experts(self) -> str:
        """Why no experts were found in a mixture: the family is not known, or the names of its experts are not."""
        if self.family is None:
            return f"the family of model_type {self.model_type!r} is not in the table"
        inside = [name for name in self.component if name in self.layer]
        name = next((n for n in inside if _EXPERTS.search(n)), None)
        other = f" names that are not known, such as {name}" if name else " no tensors under the names that it has"
        return f"{self.model_type} is a family in the table, and its experts have{other}"

    def require_family(self, operation: str) -> Family:
        """Return the family; raise RefusedError where the model is dense, unknown, or refuses `operation`."""
        if self.family is None or not self.blocks:
            if not self.is_moe:
                raise RefusedError(
                    f"{operation}: this is a dense model ({self.model_type}): it has no experts",
                    "`moesurgery upcycle` makes a mixture of experts of it",
                )
            raise RefusedError(
                f"{operation}: {self.unknown_experts}, so its experts cannot be told from other tensors",
                "`moesurgery families` lists what is known; docs/families.md shows how to add one"
                if self.family is None
                else f"`moesurgery families {self.family.name}` shows the names that are; docs/families.md, how to add"
                " some",
            )
        reason = self.family.refuses.get(operation)
        if reason:
            raise RefusedError(f"{operation}: {self.family.name}: {reason}")
        return self.family

    @cached_property
    def experts(self) -> int:
        """The number of routed experts per layer. Raises CheckpointError where tensors and config disagree."""
        counts = {block.experts for block in self.main_blocks}
        if len(counts) != 1:
            if not counts:
                raise CheckpointError(
                    f"config.json says {self.settings.layers} layers, all experts stand in later ones"
                )
            raise CheckpointError(f"the layers have different numbers of experts: {sorted(counts)}")
        (count,) = counts
        stated = self.settings.experts
        if stated is not None and stated != count:
            raise CheckpointError(f"config.json says {stated} experts, the tensors hold {count}")
        return count


def check_stated_top_k(anatomy: Anatomy) -> None:
    """Raise CheckpointError where the config's number of experts per token is none that the layers can have."""
    stated, experts = anatomy.settings.top_k, anatomy.experts
    if stated is not None and not 1 <= stated <= experts:
        raise CheckpointError(
            f"config.json: {keys_present(anatomy.settings, TOP_K_KEYS)} is {stated}, each layer has {experts} experts",
            f"correct config.json: the number that the model was trained with, between 1 and {experts}",
        )


def model_type_of(config: Mapping[str, Any]) -> str:
    """Return `model_type` of a config, "?" where it has none."""
    return str(config.get("model_type", "")) or "?"


def find_families(config: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the table entries that `config` may mean, by model_type (nested ones too) and architectures."""
    stated = config.get("architectures")
    architectures = {a for a in stated if isinstance(a, str)} if isinstance(stated, list) else set()
    for place in (config, config.get("text_config"), config.get("llm_config"), config.get("thinker_config")):
        if not isinstance(place, Mapping):
            continue
        candidates = by_model_type(str(place.get("model_type", "")).removeprefix(TIED))
        exact = tuple(f for f in candidates if architectures.intersection(f.architectures))
        if candidates:
            return exact or tuple(f for f in candidates if not f.architectures) or candidates
    return by_architecture(architectures)
