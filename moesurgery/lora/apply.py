"""LoRA adapters (PEFT's folders) applied tensor by tensor, those on expert weights too; nothing is materialised.

`W + scale * B A` with A [r, in] and B [out, r] (arXiv 2106.09685); scale is alpha / r, or alpha / sqrt(r) (arXiv
2312.03732). Adapters on a stack of experts hold all of them in one pair: A is [E * r, in], expert after expert, B
[out, r * E] with the experts of one rank beside each other. Adapters made for one layout of the experts fit the other.
PEFT up to 0.18 had A over the outputs and B over the inputs of experts that transformers stores as [out, in].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import regex

from moesurgery.checkpoint.arrays import rounded
from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moesurgery.checkpoint.header import read_header
from moesurgery.checkpoint.scan import read_object
from moesurgery.checkpoint.source_address import open_source
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.escape import one_line
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr, Reader, Slice, Stored, Unary, reshape, torch_dtype
from moesurgery.expr.tensors import slice_last, transpose
from moesurgery.families.components import is_vision
from moesurgery.families.tensor_names import find_layer
from moesurgery.moe.canonical_names import CanonicalName, CanonicalTensors
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch

_MOST_PATTERNS = 10_000
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?")
_REFUSED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "lora_bias")

# Ways to begin that take something away from the base's weights, so that the adapter fits what is left of them.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_ADAPTED_AS_THEY_STAND = ("llama4",)  # families whose experts are [in, out] without their module saying so
LAYOUT_VERSION = "0.19.1"  # the first PEFT that lays adapters on experts out as those that are written here


@dataclass(frozen=True)
class LowRank(Unary):
    """`of + factor * left @ right` of [m, n], [m, r] and [r, n], in float32, rounded to the dtype of `of`."""

    left: Expr
    right: Expr
    factor: float

    @property
    def chunk_multiple(self) -> int:
        rank, width = self.right.shape
        rows = math.lcm(self.of.chunk_multiple, width) // width
        return math.lcm(rows, math.lcm(self.left.chunk_multiple, rank) // rank) * width

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.of, self.left, self.right)

    def array(self, start: int, stop: int, reader: Reader) -> np.ndarray:
        rank, width = self.right.shape
        first, last = start // width, stop // width
        right = self.right.array(0, self.right.numel, reader).reshape(rank, width)
        left = self.left.array(first * rank, last * rank, reader).reshape(-1, rank)
        values = self.of.array(start, stop, reader)
        values += (left @ right * self.factor).reshape(-1)
        return rounded(values, self.dtype, strict=True)

    def evaluate(self, start: int, stop: int, reader: Reader) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array(start, stop, reader)).to(torch_dtype(self.dtype))


@dataclass(frozen=True)
class _Pair:
    """The factors of one module: A [r, in] or [E * r, in], B [out, r] or [out, r * E]."""

    module: str
    a: Expr
    b: Expr
    embedding: bool


class LoraAdapter:
    """An adapter folder: its settings, factors by module, and tensors that replace the model's."""

    def __init__(self, reference: str) -> None:
        source = open_source(reference)
        sizes = source.files()
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if file not in sizes:
                hint = "pickled adapters are never opened: convert it first" if ADAPTER_CONFIG in sizes else None
                raise CheckpointError(f"{source.name} has no {file}", hint or "name a folder that PEFT saved")
        try:
            config = read_object(source, ADAPTER_CONFIG, sizes[ADAPTER_CONFIG])
        except ValueError as error:
            raise CheckpointError(f"{source.name}/{ADAPTER_CONFIG} {error}") from None
        header = read_header(
            ADAPTER_WEIGHTS, sizes[ADAPTER_WEIGHTS], lambda start, length: source.read(ADAPTER_WEIGHTS, start, length)
        )
        self.config = config
        self.checkpoint = Checkpoint(source, config, [header], None, sizes)
        self.name = source.name
        self._check()
        self.tensors = {info.name: Stored(source, info) for info in header.tensors}

    def _check(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise RefusedError(f"{self.name} is a {kind} adapter: only LoRA adapters can be applied")
        for key in _REFUSED:
            if self.config.get(key):
                raise RefusedError(f"{self.name} has {key}, which is not applied here", "merge it with PEFT first")
        begun = str(self.config.get("init_lora_weights"))
        if begun.lower().startswith(_CHANGES_THE_BASE):
            raise RefusedError(
                f"{self.name} has init_lora_weights {begun!r}, which changed the weights that it belongs to, too:"
                " on the model itself it is not what was trained",
                "save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT first",
            )

    def factor(self, module: str, rank: int) -> float:
        """Return what multiplies B A of one module. Raises CheckpointError for what is no number or no pattern."""
        alpha = self.config.get("lora_alpha", rank)
        try:
            alpha = next((value for pattern, value in self._patterns if pattern.fullmatch(module, timeout=1)), alpha)
        except TimeoutError:
            raise self._wrong("alpha_pattern", "takes more than a second to match") from None
        if type(alpha) not in (int, float) or not abs(alpha) < 2**64:
            raise self._wrong(
                "lora_alpha", f"is {one_line(repr(alpha), 80)} for {module}, expected a finite number below 2^64"
            )
        if rank == 0:
            raise CheckpointError(f"{self.name}: {module} has rank 0", "save the adapter again with PEFT")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @cached_property
    def version(self) -> tuple[int, ...] | None:
        """The version of PEFT that saved the adapter; None where it does not say."""
        match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.config.get("peft_version") or ""))
        return tuple(int(number or 0) for number in match.groups()) if match else None

    @cached_property
    def _patterns(self) -> list[tuple[regex.Pattern[str], Any]]:
        """The expressions of modules that have an alpha of their own: strangers' ones, so matched against time."""
        given = self.config.get("alpha_pattern") or {}
        if not isinstance(given, dict) or len(given) > _MOST_PATTERNS:
            raise self._wrong("alpha_pattern", f"is no object of at most {_MOST_PATTERNS:,} entries")
        try:
            return [(regex.compile(rf"(.*\.)?({pattern})"), value) for pattern, value in given.items()]
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._wrong("alpha_pattern", f"holds no regular expression: {error}") from None

    def _wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}/{ADAPTER_CONFIG}: {key} {what}", "save the adapter again with PEFT")

    @cached_property
    def pairs(self) -> list[_Pair]:
        by_module: dict[tuple[str, bool], dict[str, Expr]] = {}
        for name, expr in self.tensors.items():
            if match := _FACTOR.fullmatch(name.removeprefix(_PREFIX)):
                by_module.setdefault((match[1], match[2] is not None), {})[match[3]] = expr
        for (module, _), factors in by_module.items():
            if factors.keys() != {"A", "B"}:
                raise CheckpointError(f"{self.name} has only one factor of {module}")
            for letter, factor in factors.items():
                if len(factor.shape) != 2 or factor.dtype not in PLAIN_FLOATS:
                    what = f"is {factor.dtype} {list(factor.shape)}, expected floats in two dimensions"
                    raise CheckpointError(f"{self.name}: factor {letter} of {module} {what}")
        return [_Pair(module, f["A"], f["B"], embedding) for (module, embedding), f in by_module.items()]

    @cached_property
    def replacements(self) -> dict[str, Expr]:
        """The tensors that were trained whole, under their names in the model."""
        trained_whole: dict[str, Expr] = {}
        for name, expr in self.tensors.items():
            own = name.removeprefix(_PREFIX)
            if ".lora_magnitude_vector" in own:
                raise RefusedError(f"{self.name} has {name}: DoRA is not applied here", "merge it with PEFT first")
            if not _FACTOR.fullmatch(own):
                trained_whole[own.replace(".modules_to_save", "").replace(".base_layer", "")] = expr
        return trained_whole


def adapted(plan: Plan, reference: str) -> Plan:
    """Return the plan with a LoRA adapter applied to its expressions.

    Raises CheckpointError for a folder that holds no adapter, RefusedError where a tensor of it fits nothing.
    """
    adapter = LoraAdapter(reference)
    tensors = dict(plan.tensors)
    for name, expr in adapter.replacements.items():  # embeddings are saved whole beside their factors
        if name not in tensors or tensors[name].shape != expr.shape:
            raise RefusedError(f"{name} of the adapter {adapter.name} fits no tensor of {plan.checkpoint.name}")
        tensors[name] = cast(expr, tensors[name].dtype)
    parts = CanonicalTensors(replace(plan, tensors=tensors), plan.checkpoint.name)
    known = _Names(parts)
    changed: dict[CanonicalName, Expr] = {}
    for pair in adapter.pairs:
        known.apply(pair, adapter, changed)
    for name, holder in parts.tensors.items():
        keys = [CanonicalName(holder.layer, path) for path in holder.paths]
        if any(key in changed for key in keys):
            tensors[name] = holder.assemble([changed.get(key, parts.part(key)) for key in keys])
    return replace(plan, sources=(*plan.sources, adapter.checkpoint), tensors=tensors)


class _Names:
    """The parts of a model by the names that they have in any layout of its family."""

    def __init__(self, parts: CanonicalTensors) -> None:
        self.parts = parts
        self.keys: dict[str, list[CanonicalName]] = {}
        self.inside: dict[str, list[str]] = {}  # module -> the parameters in it
        for key in parts.stored_in:
            own, others = parts.names(key, key.layer)
            for name in (own, *others):
                self.keys.setdefault(name, []).append(key)
        for name in self.keys:
            self.inside.setdefault(name.rpartition(".")[0], []).append(name)

    def apply(self, pair: _Pair, adapter: LoraAdapter, changed: dict[CanonicalName, Expr]) -> None:
        """Enter what a pair of factors makes of the parts that it is for."""
        module = pair.module.replace(".base_layer", "")
        inside = [keys for keys in (self.keys[name] for name in self._inside(module)) if keys[0] not in changed]
        for other in (False, True):  # tools beside PEFT lay factors out in their own way: shapes may tell
            for keys in inside:
                part = self.parts.part(keys[0])
                if part.dtype not in PLAIN_FLOATS or len(part.shape) != 2:
                    continue
                if len(keys) == 1 and not other and self._one(pair, adapter, keys[0], changed):
                    return
                if len(keys) > 1 and self._all_experts(pair, adapter, keys, changed, other=other):
                    return
        raise RefusedError(
            f"{module} of the adapter {adapter.name} (A {list(pair.a.shape)}, B {list(pair.b.shape)}) fits no tensor of"
            f" {self.parts.label}"
        )

    def _inside(self, module: str) -> list[str]:
        """Return the names of the parameters in a module, by its own name or by what transformers calls it."""
        parameters = self.inside.get(module) or self.inside.get(self._renamed(module))
        if parameters is not None:
            return parameters
        stored = self._in_memory.get(f"{module}.weight")
        return [stored] if stored is not None else []

    def _renamed(self, module: str) -> str:
        """Return what a module is called here that transformers holds under another prefix, as in a model with images.

        Modules of a tower beside the language model are never taken for its own.
        """
        if is_vision(module.split(".")):
            return module
        in_layer = find_layer(module)
        if in_layer is not None:
            return self.parts.name_of(in_layer[1], in_layer[2])
        last = module.rpartition(".")[2]
        outside = {name for name in self.inside if name.rpartition(".")[2] == last and not is_vision(name.split("."))}
        return outside.pop() if len(outside) == 1 else module

    @cached_property
    def _in_memory(self) -> dict[str, str]:
        """The stored name of every parameter that transformers only renames; none for a model that it does not know."""
        from moesurgery.forward.meta_model import MetaModel

        try:
            targets = MetaModel(self.parts.plan, ("cpu",), "float32").target
        except (CheckpointError, RefusedError):
            return {}
        count = Counter(targets.values())
        return {target: name for name, target in targets.items() if count[target] == 1}

    def _one(self, pair: _Pair, adapter: LoraAdapter, key: CanonicalName, changed: dict[CanonicalName, Expr]) -> bool:
        rank = pair.a.shape[0]
        factor = adapter.factor(pair.module, rank)
        part = self.parts.part(key)
        transposed = pair.embedding or bool(adapter.config.get("fan_in_fan_out")) or "~io" in key.path
        left, right = (transpose(pair.a), transpose(pair.b)) if transposed else (pair.b, pair.a)
        if part.shape != (left.shape[0], right.shape[1]) or left.shape[1] != right.shape[0]:
            return False
        changed[key] = LowRank(part, left, right, factor)
        return True

    def _all_experts(
        self,
        pair: _Pair,
        adapter: LoraAdapter,
        keys: list[CanonicalName],
        changed: dict[CanonicalName, Expr],
        *,
        other: bool,
    ) -> bool:
        """Apply one pair to the same projection of all experts, gate and up together.

        The factors are taken to lie as the version of PEFT lays them, or the `other` way round.
        """
        roles = {key: key.path.split(".")[2].partition("~")[0] for key in keys}
        numbers = sorted({int(key.path.split(".")[1]) for key in keys})
        experts = len(numbers)
        if pair.a.shape[0] % experts or pair.b.shape[1] != pair.a.shape[0]:
            return False
        halves = 2 if len(set(roles.values())) == 2 and set(roles.values()) == {"gate", "up"} else 1
        stored = self.parts.part(keys[0]).shape
        out, into = (stored[1], stored[0]) if "~io" in keys[0].path else (stored[0] * halves, stored[1])
        crossed = self._crossed(adapter, keys[0]) != other
        if (pair.a.shape[1], pair.b.shape[0]) != ((out, into) if crossed else (into, out)):
            return False
        if out == into and adapter.version is None:
            raise RefusedError(
                f"{pair.module} of the adapter {adapter.name} is for square experts, and {ADAPTER_CONFIG} does not say"
                " which PEFT saved it: up to 0.18 the factors of a stack of experts were the other way round",
                f'write the version into {ADAPTER_CONFIG}: "peft_version": "0.18.0",'
                f' or "{LAYOUT_VERSION}" for later ones',
            )
        rank = pair.a.shape[0] // experts
        factor = adapter.factor(pair.module, rank)
        by_rank = reshape(pair.b, (pair.b.shape[0] * rank, experts))
        for key in keys:
            number = int(key.path.split(".")[1])
            a = Slice(pair.a, number * rank, (number + 1) * rank)
            b = reshape(slice_last(by_rank, number, number + 1), (pair.b.shape[0], rank))
            left = transpose(a) if crossed else b  # [out, rank]
            if halves == 2:
                left = Slice(left, 0, out // 2) if roles[key] == "gate" else Slice(left, out // 2, out)
            right = transpose(b) if crossed else a  # [rank, in]
            if "~io" in key.path:
                left, right = (b, a) if crossed else (transpose(a), transpose(b))
            changed[key] = LowRank(self.parts.part(key), left, right, factor)
        return True

    def _crossed(self, adapter: LoraAdapter, key: CanonicalName) -> bool:
        """Whether A of a stack of experts is over their outputs and B over their inputs.

        PEFT takes a stack for [E, in, out] up to 0.18, and since 0.19.1 for [E, out, in] unless the module says that it
        is transposed; 0.19.0 has that the wrong way round.
        """
        family = self.parts.anatomy.family
        as_they_stand = family is not None and family.name in _ADAPTED_AS_THEY_STAND
        transposed = "~io" in key.path
        if adapter.version is not None and adapter.version < (0, 19):
            return not transposed
        as_it_stands = transposed and as_they_stand
        return not as_it_stands if adapter.version == (0, 19, 0) else as_it_stands
