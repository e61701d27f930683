"""A LoRA adapter out of two models: the best approximation of given rank to every difference, experts included.

The truncated singular value decomposition of W' - W (Eckart and Young 1936), with the singular values shared evenly by
the two factors. PEFT adapts what transformers holds in memory, so both models are laid out there, layer by layer, and
names, orientation and stacks of experts are those of transformers' own modules, whatever the checkpoints look like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.checkpoint.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families.clients import adapter_readers
from moesurgery.families.components import EMBEDDING, HEAD
from moesurgery.lora.apply import LAYOUT_VERSION
from moesurgery.moe.canonical_names import CanonicalTensors

if TYPE_CHECKING:
    import torch

    from moesurgery.forward.layer_units import LayerUnit
    from moesurgery.forward.meta_model import MetaModel

EXACT = 1024  # matrices with a side up to this get a full decomposition, others a randomised one
OVERSAMPLED, POWER = 32, 6

# PEFT 0.21 takes modules of these names for the experts of transformers 4 wherever they stand, and renames them.
_RENAMED_BY_PEFT = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_USED_DIRECTLY = ("dt_proj", "out_proj")  # of Mamba mixers: their code takes these weights without calling the module


@dataclass(frozen=True)
class Extracted:
    """What was extracted: modules, and for each the share of the difference (its squared norm) that the factors hold.

    `left` are tensors that differ and are in no adapter. `nbytes`: of the factors. `files`: the adapter, by file name.
    `experts`: whether parameters of experts are in it.
    """

    shares: Mapping[str, float]
    left: tuple[str, ...]
    nbytes: int
    files: Mapping[str, bytes]
    experts: bool

    @property
    def readers(self) -> str:
        """Which programs read the adapter, in a sentence."""
        return adapter_readers(experts=self.experts)


class _Difference(NamedTuple):
    """How two models differ in one parameter: [out, in] or [E, out, in], whatever its orientation in memory.

    `kind` is how PEFT adapts it: as the weight of a linear module, as a parameter, or not at all.
    """

    name: str
    kind: str
    change: torch.Tensor
    siblings: tuple[str, ...] = ()  # all parameters of its module, in order


def extract_lora(
    base: CanonicalTensors, tuned: CanonicalTensors, rank: int, *, progress: Callable[[int], None] = lambda count: None
) -> Extracted:
    """Return the adapter that brings `base` nearest to `tuned`. Raises RefusedError where the models are not alike."""
    from safetensors.torch import save

    if base.paths != tuned.paths:
        raise RefusedError(f"{base.label} and {tuned.label} do not have the same tensors")
    made = _Adapter(rank)
    for difference in _differences(base, tuned, progress):
        made.add(difference)
    if not made.pairs:
        what = f"differ only in {', '.join(made.left[:3])}" if made.left else "do not differ"
        raise RefusedError(f"{base.label} and {tuned.label} {what}: there is no matrix of a layer to adapt")
    tensors = {name: value.contiguous() for name, value in made.tensors().items()}
    files = {
        ADAPTER_WEIGHTS: save(tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: write_json(made.config(base.label)).encode(),
    }
    nbytes = sum(value.nbytes for value in tensors.values())
    return Extracted(made.shares, tuple(made.left), nbytes, files, bool(made.parameters))


class _Adapter:
    """Factors by the name of the parameter that they are for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shares: dict[str, float] = {}
        self.left: list[str] = []
        self.modules: set[str] = set()
        self.parameters: dict[str, None] = {}
        self.siblings: dict[str, tuple[str, ...]] = {}
        self.layers = "model.layers"

    def add(self, difference: _Difference) -> None:
        import torch

        name, kind, change, siblings = difference
        if not bool(change.any()):
            return
        if not bool(change.isfinite().all()):
            raise RefusedError(
                f"{name}: the two models differ by NaN or infinity, which has no singular values",
                "`moesurgery validate --level values` finds such weights in both",
            )
        if kind == "none":
            self.left.append(name)
            return
        factorised = [factors(matrix, self.rank) for matrix in (change if change.dim() == 3 else (change,))]
        a = torch.cat([a for a, _, _ in factorised])
        b = torch.stack([b for _, b, _ in factorised], dim=-1).flatten(1)
        self.pairs[name] = a, b
        self.shares[name] = sum(share for _, _, share in factorised) / len(factorised)
        self.siblings[name] = siblings
        self.layers = re.split(r"\.\d+\.", name, maxsplit=1)[0]
        if kind == "module":
            self.modules.add(_relative(name.removesuffix(".weight")))
        else:
            self.parameters[_relative(name)] = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors under PEFT's names: of several parameters of one module, the first is wrapped innermost."""
        by_name = {}
        for name, (a, b) in self.pairs.items():
            module, _, leaf = name.rpartition(".")
            adapted = [p for p in self.siblings[name] if _relative(f"{module}.{p}") in self.parameters]
            outside = len(adapted) - 1 - adapted.index(leaf) if leaf in adapted else 0
            at = f"base_model.model.{module}" + ".base_layer" * outside
            by_name[f"{at}.lora_A.weight"], by_name[f"{at}.lora_B.weight"] = a, b
        return by_name

    def config(self, base: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "peft_version": LAYOUT_VERSION,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted(self.modules),
            "target_parameters": list(self.parameters),
        }
        if self.layers != "model.layers":  # a tower beside them may have modules of the same names
            settings["exclude_modules"] = rf"(?!{re.escape(self.layers)}\.\d+\.).*"
        return settings


def _differences(
    base: CanonicalTensors, tuned: CanonicalTensors, progress: Callable[[int], None]
) -> Iterator[_Difference]:
    from moesurgery.forward.meta_model import MetaModel

    dtype = _dtype(base, tuned)
    try:
        first, second = (MetaModel(parts.plan, ("cpu",), dtype) for parts in (base, tuned))
    except (RefusedError, CheckpointError):
        yield from _as_stored(base, tuned, progress)  # transformers has no class for it, so nothing is moved in memory
        return
    for unit in first.layers:
        other = second.units[unit.path]
        first.load(unit)
        second.load(other)
        yield from _of_unit(first, second, unit, moe=bool(base.anatomy.blocks))
        first.free(unit)
        second.free(other)
        progress(unit.nbytes)
    inside = {unit.path for unit in first.layers}
    yield from _stored(base, tuned, [n for n, to in first.target.items() if first.unit_of(to).path not in inside])
    yield from _stored(base, tuned, first.unused)


def _of_unit(first: MetaModel, second: MetaModel, unit: LayerUnit, *, moe: bool) -> Iterator[_Difference]:
    """Yield the differences of one layer, as the modules that hold them want them."""
    stored = set(first.target.values())
    for path, module in unit.module.named_modules():
        where = f"{unit.path}.{path}" if path else unit.path
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{where}.{leaf}"
            change = second.tensor(name).float() - parameter.float()
            kind = _kind(unit.module, path, module, leaf, moe)
            if kind == "parameter" and change.dim() == 3 and getattr(module, "is_transposed", False):
                change = change.transpose(1, 2)
            yield _Difference(name, kind, change, tuple(module._parameters))
        for leaf, buffer in module._buffers.items():
            name = f"{where}.{leaf}"
            if name in stored and buffer is not None:
                yield _Difference(name, "none", second.tensor(name).float() - buffer.float())


def _kind(root: Any, path: str, module: Any, leaf: str, moe: bool) -> str:
    """Say how PEFT can adapt a parameter of a module: as a "module", as a "parameter", or "none"."""
    import torch

    value = module._parameters[leaf]
    parent, _, own = path.rpartition(".")
    if type(module) is torch.nn.Linear:  # a router may be of a class of its own, and return more than one tensor
        if leaf != "weight" or (own in _USED_DIRECTLY and "Mamba" in type(root.get_submodule(parent)).__name__):
            return "none"
        return "parameter" if moe and own in _RENAMED_BY_PEFT else "module"
    if isinstance(module, (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)) or leaf.endswith("bias"):
        return "none"
    if value.dim() == 3:
        return "parameter"
    # What PEFT wraps around a module hides its buffers and modules, which the code around a router may ask for.
    return "parameter" if value.dim() == 2 and not module._buffers and not module._modules else "none"


def _as_stored(
    base: CanonicalTensors, tuned: CanonicalTensors, progress: Callable[[int], None]
) -> Iterator[_Difference]:
    """Yield the differences of models that are in memory what they are in their files."""
    for difference in _stored(base, tuned, base.plan.tensors):
        name = difference.name
        matrix = difference.change.dim() == 2 and name.endswith(".weight") and base.tensors[name].layer is not None
        yield difference._replace(kind="module" if matrix else "none")
        progress(base.plan.tensors[name].nbytes)


def _stored(base: CanonicalTensors, tuned: CanonicalTensors, names: Iterable[str]) -> Iterator[_Difference]:
    """Yield the differences of tensors as they are in the files, which no adapter takes.

    Of vocabularies of two sizes, those of the tokens that both have, and the rows that only one has.
    """
    for name in names:
        first, second = base.plan.tensors[name], tuned.plan.tensors.get(name)
        plain = second is not None and {first.dtype, second.dtype} <= PLAIN_FLOATS
        if second is not None and plain and first.shape == second.shape:
            yield _Difference(name, "none", _values(second) - _values(first), (name.rpartition(".")[2],))
            continue
        table = base.anatomy.component[name] in (EMBEDDING, HEAD)
        if second is not None and plain and table and first.shape[1:] == second.shape[1:]:
            ours, theirs = _values(first), _values(second)
            longer, shorter = (theirs, ours) if len(theirs) > len(ours) else (ours, theirs)
            change = longer.clone()
            change[: len(shorter)] -= shorter
            yield _Difference(name, "none", change, (name.rpartition(".")[2],))
            continue
        what = "is not there" if second is None else f"is {second.dtype} {list(second.shape)}"
        raise RefusedError(
            f"{name} is {first.dtype} {list(first.shape)} in {base.label}, and {what} in {tuned.label}",
            "dequantise both first: `moesurgery convert --dequantize`"
            if second is not None and not plain
            else "an adapter is between two models of the same shapes: choose the model that was tuned",
        )


def _dtype(*models: CanonicalTensors) -> str:
    """Return torch's name for what holds all weights of the models as they are."""
    kinds = {expr.dtype for parts in models for expr in parts.plan.tensors.values()} & PLAIN_FLOATS
    return "bfloat16" if kinds == {"BF16"} else "float16" if kinds == {"F16"} else "float32"


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A [r, in], B [out, r] with B A nearest to `change` [out, in], and the share of its squared norm in it.

    Of less rank than asked, the rest is zeros.
    """
    import torch

    if min(change.shape) <= max(EXACT, rank):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank + OVERSAMPLED, niter=POWER)
        vh = v.t()
    root = s[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    missing = rank - len(root)
    if missing > 0:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    total = float(change.double().square().sum())
    return a, b, float(s[:rank].double().square().sum()) / total if total else 1.0


def _values(expr: Expr) -> torch.Tensor:
    import torch

    reader = FileReader()
    try:
        values = torch.from_numpy(expr.array(0, expr.numel, reader)).float().view(expr.shape)
        reader.check()
        return values
    finally:
        reader.close()


def _relative(name: str) -> str:
    """Return the name of a parameter from its layer on, which is what PEFT matches with the ends of names."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[1]
