"""A transformers model on the meta device, and loading of one unit's weights at a time from a plan.

The names and the arrangement of the checkpoint's tensors become those of the module's parameters by
transformers' own conversion tables, so that every family and layout it loads is read here too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesurgery.errors import CheckpointError
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.components import is_vision
from moesurgery.forward.cpu_experts import use_by_expert
from moesurgery.forward.experts_module import ExpertsModule
from moesurgery.forward.layer_loading import THREADS, Loader
from moesurgery.forward.layer_units import LayerUnit, TensorGroup, decoder_layers, find_units, place_units
from moesurgery.forward.lazy_tensor import LazyTensor
from moesurgery.forward.model_building import build
from moesurgery.forward.routing_adapters import UNREAD, adapter_of
from moesurgery.plan.dequantise import dequantised
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch


class MetaModel:
    """A model on torch's meta device, and the loader of its weights.

    Raises CheckpointError where transformers has no class for the model, or a tensor is missing or of another
    shape than its code expects.
    """

    def __init__(self, plan: Plan, devices: Sequence[str], dtype: str) -> None:
        import torch

        plan.checkpoint.refuse_gguf("llama.cpp runs those, transformers does not")
        self.plan = plan
        self.donor: MetaModel | None = None  # a model whose loaded weights are reused where they are the same
        self.tensors, renamed = dequantised(plan)
        self.devices = [torch.device(device) for device in devices]
        self.device = self.devices[0]
        self.dtype = getattr(torch, dtype)
        self.model = build(plan, self.dtype)
        if self.device.type == "cpu":
            use_by_expert(self.model)
        self.text_model = getattr(self.model, "thinker", self.model)  # of a model with speech output
        _move_buffers(self.model, self.device)
        self._dtypes: dict[str, Any] = self.model._get_dtype_plan(self.dtype)
        threads = max(2, THREADS // len(self.devices))  # together they read no faster
        self._loaders = [Loader(device, threads) for device in self.devices]
        self._on_host = Loader(torch.device("cpu"))
        self._exprs: dict[str, dict[str, Any]] = {}  # what a group's parameters are made of, by its target
        self.units: dict[str, LayerUnit] = {unit.path: unit for unit in find_units(self.model)}
        self._loose = LayerUnit("", self.model)
        self._empty = {
            name: torch.nn.Parameter(_placeholder(p, self.device), requires_grad=False)
            for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        for name, empty in self._empty.items():
            self._place(name, empty)
        self.target: dict[str, str] = {}  # plan name -> parameter (the first, where it is split)
        self.unused: list[str] = []
        self._assign()
        self._check_complete()
        self.target |= {name: self.target[plain] for name, plain in renamed.items() if plain in self.target}
        self.layers = decoder_layers(self.units, self.target, plan)
        place_units(self.units, self.layers, len(self.devices))
        for unit in self.units.values():
            if unit.stage:
                self._move(unit)
        self.load(self._loose)

    def blocks(self) -> list[ExpertsModule]:
        """Return where the MoE blocks of the plan are, in order of layers.

        A block whose tensors transformers splits off another block's has no module path of its own (the vision experts
        of ERNIE-VL, which get no text tokens), and is left out.
        """
        by_path: dict[str, ExpertsModule] = {}
        for block in self.plan.anatomy.main_blocks:
            experts = self._experts(block)
            if experts is not None:
                by_path.setdefault(experts.experts or experts.where, experts)
        return list(by_path.values())

    def unit_of(self, path: str) -> LayerUnit:
        """Return the unit that holds a module or parameter; the loose one if none does."""
        while path:
            if path in self.units:
                return self.units[path]
            path = path.rpartition(".")[0]
        return self._loose

    def load(self, unit: LayerUnit) -> None:
        """Read a unit's weights from the plan into its module. Raises CheckpointError where a source has changed."""
        self.put(unit, self.read(unit))

    def read(self, unit: LayerUnit) -> dict[str, torch.Tensor]:
        """Return a unit's weights on the device, by parameter. May run in a background thread.

        Raises CheckpointError where a source has changed since its headers were read.
        """
        import torch

        weights: dict[str, torch.Tensor] = {}
        lazy: list[tuple[torch.Tensor, Expr]] = []
        with torch.no_grad():
            for group in unit.groups:
                if self.donor is not None and (given := self._shared(group, self.donor)) is not None:
                    weights[group.target] = given
                    continue
                for target, value in self._converted(group).items():
                    if target in self._empty or self._is_buffer(target):
                        weights[target] = self._room(target, value, self.devices[unit.stage])
                        if isinstance(value, LazyTensor):
                            lazy.append((weights[target], value.expr))
                        else:
                            weights[target].copy_(value)
            self._loaders[unit.stage].fill(lazy)
        self._loaders[unit.stage].check()
        self._on_host.check()
        return weights

    def value(self, name: str) -> torch.Tensor:
        """Return a tensor of the plan by its name, on the first device, also where no parameter is made of it."""
        import torch

        value = torch.empty(tuple(self.tensors[name].shape), dtype=self.dtype, device=self.device)
        self._loaders[0].fill([(value, self.tensors[name])])
        self._loaders[0].check()
        return value

    def put(self, unit: LayerUnit, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the weights that `read` returned on a unit's module."""
        import torch

        for target, value in weights.items():
            buffer = target not in self._empty
            self._place(target, value if buffer else torch.nn.Parameter(value, requires_grad=False))
        self._refuse_missing([n for n in self._parameters(unit) if n not in weights])

    def free(self, unit: LayerUnit) -> None:
        """Free a unit's weights."""
        for name in self._parameters(unit):
            self._place(name, self._empty[name])

    def _move(self, unit: LayerUnit) -> None:
        """Move a unit, none of whose weights is loaded, to its device."""
        import torch

        device = self.devices[unit.stage]
        _move_buffers(unit.module, device)
        for name in self._parameters(unit):
            self._empty[name] = torch.nn.Parameter(_placeholder(self._empty[name], device), requires_grad=False)
            self._place(name, self._empty[name])

    def _assign(self) -> None:
        """Decide for each tensor of the plan which parameter it goes to, by transformers' conversion tables."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        state = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, TensorGroup] = {}
        for name in sorted(self.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target not in state:
                self.unused.append(name)
                continue
            self.target[name] = target
            group = groups.setdefault(target, TensorGroup(target, by_pattern[pattern] if pattern is not None else None))
            group.names.append((pattern or name, name))
        for group in groups.values():
            self.unit_of(group.target).groups.append(group)
        self._tie(groups)
        for unit in self.units.values():
            unit.nbytes = sum(self._empty[n].numel() for n in self._parameters(unit)) * self.dtype.itemsize

    def _check_complete(self) -> None:
        """Raise CheckpointError for a missing weight before anything is computed."""
        held: set[str] = set()
        for unit in (*self.units.values(), self._loose):
            for group in unit.groups:
                patterns = group.converter.target_patterns if group.converter else [group.target]
                held.update(group.target.replace(patterns[0], pattern, 1) for pattern in patterns)
        self._refuse_missing([n for n in self._empty if n not in held and not is_vision(n.split("."))])

    def _refuse_missing(self, missing: list[str]) -> None:
        if missing:
            raise CheckpointError(
                f"{self.plan.checkpoint.source.identity}: {len(missing)} tensors are missing, such as {missing[0]}",
                "the checkpoint is incomplete, or its config.json belongs to another model",
            )

    def _tie(self, groups: dict[str, TensorGroup]) -> None:
        """Map tied parameters that are stored once to each module that uses them."""
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            for missing, stored in ((target, source), (source, target)):
                if missing not in groups and stored in groups and missing in self._empty:
                    tied = groups[stored]
                    if self.unit_of(missing) is not self.unit_of(stored):
                        again = TensorGroup(missing, tied.converter, tied.names)
                        self.unit_of(missing).groups.append(again)

    def _shared(self, group: TensorGroup, donor: MetaModel) -> torch.Tensor | None:
        """Return the donor's parameter if it is loaded and made from the same tensors."""
        theirs = next((g for g in donor.unit_of(group.target).groups if g.target == group.target), None)
        if theirs is None or len(getattr(group.converter, "target_patterns", ())) > 1:
            return None
        empty = donor._empty.get(group.target)
        if empty is None or donor.tensor(group.target) is empty or empty.shape != self._empty[group.target].shape:
            return None
        if self.made_of(group) != donor.made_of(theirs):
            return None
        given: torch.Tensor = donor.tensor(group.target).data
        return given

    def made_of(self, group: TensorGroup) -> list[tuple[str, Expr]]:
        """Return what a group's parameters are made of, each with the converter's pattern for it."""
        return [(pattern, self.tensors[name]) for pattern, name in group.names]

    def _converted(self, group: TensorGroup) -> dict[str, Any]:
        """Return what a group's parameters are made of; kept where that is expressions alone."""
        if group.target not in self._exprs:
            values = self._convert(group)
            if not all(isinstance(value, LazyTensor) for value in values.values()):
                return values
            self._exprs[group.target] = values
        return self._exprs[group.target]

    def _convert(self, group: TensorGroup) -> dict[str, Any]:
        lazy = [(pattern, name, LazyTensor(self.tensors[name], self._on_host)) for pattern, name in group.names]
        if group.converter is None:
            return {group.target: lazy[0][2]}
        converter = copy.deepcopy(group.converter)
        for pattern, name, tensor in lazy:
            converter.add_tensor(group.target, name, pattern, tensor)
        try:
            converted = converter.convert(group.target, model=self.model, config=self.model.config)
        except (ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{group.target}: transformers cannot make it of {lazy[0][1]}: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _room(self, target: str, value: Any, device: torch.device) -> torch.Tensor:
        """Return an empty tensor on a device for a parameter or buffer, given a value of the right shape."""
        import torch

        empty = self._empty.get(target)
        shape = tuple(empty.shape) if empty is not None else tuple(self.tensor(target).shape)
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{target} has shape {list(value.shape)}, the model's code expects {list(shape)}")
        return torch.empty(shape, dtype=self._dtype_of(target), device=device)

    def _dtype_of(self, target: str) -> torch.dtype:
        kind: torch.dtype = self.tensor(target).dtype
        if not kind.is_floating_point:
            return kind
        kept = next((d for pattern, d in self._dtypes.items() if pattern in target), None)
        return kept or (kind if self._is_buffer(target) else self.dtype)

    def _parameters(self, unit: LayerUnit) -> Iterator[str]:
        if unit is self._loose:
            yield from (n for n in self._empty if self.unit_of(n) is unit)
            return
        for name, _ in unit.module.named_parameters(remove_duplicate=False):
            yield f"{unit.path}.{name}"

    def tensor(self, target: str) -> Any:
        """Return the parameter or buffer at a path."""
        path, _, leaf = target.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def _is_buffer(self, target: str) -> bool:
        path, _, leaf = target.rpartition(".")
        return leaf in self.model.get_submodule(path)._buffers

    def _place(self, target: str, value: Any) -> None:
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        (module._buffers if leaf in module._buffers else module._parameters)[leaf] = value

    def _experts(self, block: MoeBlock) -> ExpertsModule | None:
        """Find a block's modules by where its tensors go."""
        weights = [m.name for m in block.members if m.part and m.stem.main and m.name in self.target]
        if not weights:
            return None
        owner = self.target[weights[0]].rpartition(".")[0]
        module_path: str | None = owner
        while module_path and not _takes_routing(self.model.get_submodule(module_path)):
            module_path = module_path.rpartition(".")[0]
            if module_path in self.units or not module_path:
                module_path = None
        router = self.target.get(block.router.name) if block.router else None
        correction = next((self.target.get(m.name) for m in block.named("correction_bias")), None)
        unit = self.unit_of(owner).path
        path = module_path or owner
        unread = "" if module_path else self._unread(owner, unit)
        while path != unit and router is not None and not router.startswith(path + "."):
            path = path.rpartition(".")[0]
        return ExpertsModule(block, unit, path, module_path, router, correction, unread)

    def _unread(self, path: str, unit: str) -> str:
        """Return why no module from `path` up to `unit` gives access to the routing."""
        kind = type(self.model.get_submodule(path)).__name__
        while path and path != unit:
            path = path.rpartition(".")[0]
            kind = type(self.model.get_submodule(path)).__name__
            if kind in UNREAD:
                return UNREAD[kind]
        return f"{kind} calls no module with chosen experts and their weights"


def _move_buffers(module: Any, device: torch.device) -> None:
    """Move the buffers of a module and of those in it; not those on the meta device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)


def _placeholder(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of a parameter's shape and dtype, all NaN, that takes no memory.

    Unlike one on the meta device it does not mislead code that asks for `weight.device`, and what is computed
    with it by mistake is NaN.
    """
    import torch

    kind = parameter.dtype
    return torch.full((1,), float("nan") if kind.is_floating_point else 0, dtype=kind, device=device).expand(
        parameter.shape
    )


def _takes_routing(module: Any) -> bool:
    """Whether a module is called with hidden states, chosen experts and their weights, or has an adapter."""
    import inspect

    if adapter_of(module) is not None:
        return True
    names = list(inspect.signature(type(module).forward).parameters)
    return len(names) == 4 and type(module).__name__.endswith("Experts")
