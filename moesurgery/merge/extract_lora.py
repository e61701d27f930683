"""A LoRA adapter out of two models: the best approximation of given rank to every difference, experts included.

The truncated singular value decomposition of W' - W (Eckart and Young 1936), with the singular values shared evenly by
the two factors. Experts become one pair of factors for all of a layer, as PEFT stores adapters on stacked parameters,
under the names of the family's fused layout, which is how transformers 5 holds every model in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import OutputError, RefusedError
from moesurgery.merge.lora import CONFIG, WEIGHTS
from moesurgery.merge.parts import Key, Parts
from moesurgery.plan.expr import Expr
from moesurgery.plan.reader import FileReader

if TYPE_CHECKING:
    import torch

EXACT = 1024  # matrices with a side up to this get a full decomposition, others a randomised one
OVERSAMPLED, POWER = 32, 6


@dataclass(frozen=True)
class Extracted:
    """What was extracted: modules, and for each the share of the difference (its squared norm) that the factors hold.

    `left` are tensors that differ and are in no adapter.
    """

    shares: Mapping[str, float]
    left: tuple[str, ...]
    nbytes: int


def extract_lora(
    base: Parts, tuned: Parts, rank: int, output: Path, *, progress: Callable[[int], None] = lambda count: None
) -> Extracted:
    """Write the adapter folder `output`, which must not exist. Raises RefusedError where the models are not alike."""
    from safetensors.torch import save_file

    if output.exists():
        raise OutputError(f"{output} exists", "choose another folder with -o")
    if base.paths != tuned.paths:
        raise RefusedError(f"{base.label} and {tuned.label} do not have the same tensors")
    work = _Work(base, tuned, rank)
    for group, keys in _groups(base).items():
        work.extract(group, keys)
        progress(sum(base.part(key).nbytes for key in keys))
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True)
    try:
        tensors = {name: value.contiguous() for name, value in work.tensors.items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(work.config(), indent=2) + "\n")
        os.rename(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"{output} cannot be written: {error.strerror}") from None
    return Extracted(work.shares, tuple(work.left), sum(v.nbytes for v in tensors.values()))


def _groups(parts: Parts) -> dict[tuple[int | None, str], list[Key]]:
    """Return the parts by what becomes one pair of factors: a matrix, or the same projection of all experts."""
    found: dict[tuple[int | None, str], list[Key]] = {}
    for key in parts.home:
        match = re.fullmatch(r"(?:.*/)?experts\.\d+\.(.*)", key.path)
        name = re.sub(r"^(gate|up)\b", "gate_up", match[1]) if match else key.path
        found.setdefault((key.layer, f"experts.{name}" if match else name), []).append(key)
    return found


class _Work:
    def __init__(self, base: Parts, tuned: Parts, rank: int) -> None:
        self.base, self.tuned, self.rank = base, tuned, rank
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shares: dict[str, float] = {}
        self.left: list[str] = []
        self.modules: set[str] = set()
        self.parameters: dict[str, None] = {}

    def extract(self, group: tuple[int | None, str], keys: list[Key]) -> None:
        holder, _ = self.base.home[keys[0]]
        name = holder.name
        changes = [self._difference(key) for key in keys]
        if not any(bool(change.any()) for change in changes):
            return
        if any(change.dim() != 2 for change in changes) or group[0] is None:
            self.left.append(name)
            return
        if group[1].startswith("experts."):
            self._experts(keys, changes)
            return
        a, b, share = factors(changes[0], self.rank)
        if group[1].startswith("router."):  # a parameter of a module of its own class, not a linear one
            name = self._fused_name(keys[0]) or name
            self.parameters[_relative(name)] = None
        elif not name.endswith(".weight"):
            self.left.append(name)
            return
        else:
            self.modules.add(_relative(name.removesuffix(".weight")))
        self._enter(name, a, b, share)

    def _experts(self, keys: list[Key], changes: list[torch.Tensor]) -> None:
        import torch

        name = self._fused_name(keys[0]) or self.base.home[keys[0]][0].name
        per_expert: dict[int, list[torch.Tensor]] = {}
        for key, change in zip(keys, changes, strict=True):
            change = change.t() if "~io" in key.path else change
            per_expert.setdefault(int(key.path.split("experts.")[1].split(".")[0]), []).append(change)
        found = [factors(torch.cat(parts), self.rank) for _, parts in sorted(per_expert.items())]
        a = torch.cat([a for a, _, _ in found])
        b = torch.stack([b for _, b, _ in found], dim=-1).flatten(1)
        self.parameters[_relative(name)] = None
        self._enter(name, a, b, sum(s for _, _, s in found) / len(found))

    def _fused_name(self, key: Key) -> str | None:
        own, others = self.base.names(key, key.layer)
        family = self.base.anatomy.family
        layouts = [la for la in family.layouts if la.kind == "fused"] if family else []
        paths = [part.path for la in layouts for part in la.parts]
        if key.path.startswith("router."):
            moved = [m for la in layouts for m in la.moved]
            for name in (own, *others):
                if any(name.endswith(f".{new}.weight") or f".{new}" in name for _, new in moved):
                    return name
            return own
        return next((name for name in (own, *others) if any(name.endswith(path) for path in paths)), None)

    def _difference(self, key: Key) -> torch.Tensor:
        first, second = self.base.part(key), self.tuned.part(key)
        if first.shape != second.shape or not {first.dtype, second.dtype} <= PLAIN_FLOATS:
            raise RefusedError(
                f"{self.base.home[key][0].name} is {first.dtype} {list(first.shape)} in {self.base.label} and"
                f" {second.dtype} {list(second.shape)} in {self.tuned.label}"
            )
        return _values(second) - _values(first)

    def _enter(self, name: str, a: torch.Tensor, b: torch.Tensor, share: float) -> None:
        self.pairs[name] = a, b
        self.shares[name] = share

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors under PEFT's names: of two parameters of one module, the first is wrapped inside the second."""
        found = {}
        for name, (a, b) in self.pairs.items():
            module = name.removesuffix(".weight")
            relative = _relative(name)
            if relative in self.parameters and not name.endswith(".weight"):
                module, _, last = name.rpartition(".")
                others = [p for p in self.parameters if p.rpartition(".")[0] == relative.rpartition(".")[0]]
                module += ".base_layer" if len(others) == 2 and "down" not in last and "output" not in last else ""
            found[f"base_model.model.{module}.lora_A.weight"] = a
            found[f"base_model.model.{module}.lora_B.weight"] = b
        return found

    def config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.label,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted(self.modules),
            "target_parameters": list(self.parameters),
        }


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
        return torch.from_numpy(expr.array(0, expr.numel, reader)).float().view(expr.shape)
    finally:
        reader.close()


def _relative(name: str) -> str:
    """Return the name of a parameter from its layer on, which is what PEFT matches with the ends of names."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[1]
