"""What tying took from each position, given back at low rank: a PEFT adapter beside the tied model.

For every matrix W of a position that now runs with R, the adapter holds B A, the best approximation of W - R of a
given rank (Eckart-Young), as Relaxed Recursive Transformers (arXiv 2410.20672) start from. At full rank the original is
back. It is a stock LoRA: `PeftModel.from_pretrained(model, folder + "/adapter")`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, concat, stack
from moesurgery.expr.shared import SharedComputation, SharedResult
from moesurgery.expr.tensors import transpose
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.family import Layout
from moesurgery.families.layer_stack import Stack
from moesurgery.lora.apply import LAYOUT_VERSION
from moesurgery.plan.plan import Plan
from moesurgery.surgery.tie_blocks.schemes import TIE_BLOCKS
from moesurgery.surgery.tie_blocks.tied_stack import TiedStack

if TYPE_CHECKING:
    import torch

FOLDER = "adapter"
# Linears that model code calls as modules, as a LoRA needs it. A Mamba layer reads some of its weights directly.
LINEARS = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "shared_expert_gate"),
    )
)
# Families whose linears have other names in transformers, and so for PEFT, than in the file.
RENAMED = ("axk2",)


def is_linear(inside: str, shape: Sequence[int]) -> bool:
    """Whether a LoRA can stand beside a tensor of a block, that is no part of stacked experts."""
    module, _, leaf = inside.rpartition(".")
    return leaf == "weight" and len(shape) == 2 and module.rpartition(".")[2] in LINEARS


def apart_for_relaxing(plan: Plan, stack: Stack) -> list[str]:
    """Return texts that name what stays with each position because no LoRA can give it back: all but large matrices."""
    anatomy = plan.anatomy
    experts = {m.name for block in anatomy.blocks for m in block.members if m.part is not None and m.stem.main}
    routers = {m.name for block in anatomy.blocks for m in block.members if m.along is not None}
    apart = ["norm"]
    for block in range(stack.depth):
        for inside, name in stack.blocks[block].items():
            linear = is_linear(inside, plan.tensors[name].shape) and name not in routers
            if linear or name in experts or any(text in inside for text in apart):
                continue
            module, _, leaf = inside.rpartition(".")
            router = re.search(r"\.(gate|router)\.", inside)
            if name in routers and router:
                apart.append(router[0])  # the one part of its path that is the same on disk and in memory
            elif leaf == "weight":
                apart.append(f"{module.rpartition('.')[2]}.weight")
            else:
                apart.append(f".{leaf}" if module else leaf)
    return apart


@dataclass
class LowRankAdapter:
    """A LoRA of one rank over linears and stacked expert weights, as PEFT stores it."""

    rank: int
    tensors: dict[str, Expr] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def add_linear(self, module: str, own: Expr, shared: Expr) -> None:
        """Add the factors of a linear [out, in]: lora_A [r, in], lora_B [out, r]."""
        out, into = own.shape
        solution = SharedComputation(low_rank, (own, shared), (("rank", self.rank),))
        prefix = f"base_model.model.{module}"
        self.tensors[f"{prefix}.lora_A.weight"] = SharedResult(solution, 0, own.dtype, (self.rank, into))
        self.tensors[f"{prefix}.lora_B.weight"] = SharedResult(solution, 1, own.dtype, (out, self.rank))
        self.modules.append(module)

    def add_experts(self, layer: str, own: Mapping[str, Expr], shared: Mapping[str, Expr]) -> None:
        """Add the factors of each expert of stacked weights [E, out, in]: lora_A [r E, in], lora_B [out, r E].

        PEFT wraps the experts module once per parameter, so all but the last stand in a `base_layer`.
        """
        for depth, path in enumerate(reversed(list(own))):
            experts, out, into = own[path].shape
            solution = SharedComputation(low_rank_experts, (own[path], shared[path]), (("rank", self.rank),))
            prefix = f"base_model.model.{layer}.{path.rpartition('.')[0]}" + ".base_layer" * depth
            self.tensors[f"{prefix}.lora_A.weight"] = SharedResult(
                solution, 0, own[path].dtype, (self.rank * experts, into)
            )
            self.tensors[f"{prefix}.lora_B.weight"] = SharedResult(
                solution, 1, own[path].dtype, (out, self.rank * experts)
            )
            self.parameters.append(f"{layer}.{path}")

    def files(self) -> tuple[dict[str, bytes | None], dict[str, Mapping[str, Expr]]]:
        """Return the adapter's config and weights, by their paths in the output."""
        config = {
            "peft_type": "LORA",
            "peft_version": LAYOUT_VERSION,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.modules),
            "target_parameters": sorted(self.parameters) or None,
        }
        text = write_json(config)
        return {f"{FOLDER}/adapter_config.json": text.encode()}, {
            f"{FOLDER}/adapter_model.safetensors": dict(sorted(self.tensors.items()))
        }


def low_rank(own: torch.Tensor, shared: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in] and B [out, r] with B A nearest to own - shared [out, in] in the Frobenius norm.

    By the eigenvectors of the smaller Gram matrix, in float64: exact at full rank, and several times cheaper than a
    singular value decomposition. Where the rank is larger than the matrix, the rest is zero.
    """
    import torch

    difference = own.double() - shared.double()
    turned = difference.shape[0] < difference.shape[1]
    if turned:
        difference = difference.t()
    values, vectors = torch.linalg.eigh(difference.t() @ difference)
    count = min(rank, len(values))
    basis = vectors[:, -count:].flip(1)  # [small, count], largest first
    size = values[-count:].flip(0).clamp(min=0).sqrt().sqrt()  # the factors get the same norms
    image = (difference @ basis) / size.clamp(min=torch.finfo(torch.float64).tiny)
    image[:, size == 0] = 0
    left, right = image, (basis * size).t()  # difference ~ left @ right
    if turned:
        left, right = right.t(), left.t()
    a = torch.zeros(rank, right.shape[1], dtype=torch.float64)
    b = torch.zeros(left.shape[0], rank, dtype=torch.float64)
    a[:count], b[:, :count] = right, left
    return a.float(), b.float()


def low_rank_experts(own: torch.Tensor, shared: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of each expert in PEFT's order: A [E r, in] by expert, B [out, r E] by rank."""
    import torch

    factors = [low_rank(o, s, rank) for o, s in zip(own, shared, strict=True)]
    a = torch.cat([a for a, _ in factors])
    b = torch.stack([b for _, b in factors], dim=-1).flatten(1)
    return a, b


def expert_parameters(block: MoeBlock, tensors: Mapping[str, Expr], layouts: Sequence[Layout]) -> dict[str, Expr]:
    """Return a block's expert weights as transformers holds them, by parameter path: gate_up, then down.

    Each is [E, out, in]. Raises RefusedError for layouts of which it is not known how PEFT sees them.
    """
    if block.of is not None:
        raise RefusedError(f"{TIE_BLOCKS}: relax: {block.where} is one of two sets of experts", "leave relax out")
    fused = next((layout for layout in reversed(layouts) if layout.kind == "fused"), None)
    if fused is None or [part.role for part in fused.parts] != ["gate_up", "down"]:
        raise RefusedError(
            f"{TIE_BLOCKS}: relax: it is not known how transformers holds the experts of this family",
            "leave relax out",
        )
    members = [(m, tensors[m.name]) for m in block.members if m.part is not None and m.stem.main]
    by_path = {}
    for part in fused.parts:
        stacked = [expr for m, expr in members if m.role == part.role and m.expert is None]
        roles = ("gate", "up") if part.role == "gate_up" else ("down",)
        by_place = {(m.role, m.expert): expr for m, expr in members}
        if not stacked:
            stacked = [stack([concat([by_place[role, e] for role in roles]) for e in range(block.experts)])]
        by_path[part.path] = transpose(stacked[0]) if part.order == "io" else stacked[0]
    return by_path


def relaxed(tie: TiedStack, rank: int) -> tuple[dict[str, bytes | None], dict[str, Mapping[str, Expr]]]:
    """Return the config and the weights of the adapter that holds each position's difference, by their paths.

    Raises RefusedError for families and layouts that PEFT knows otherwise, quantised weights, or no difference at all.
    """
    plan, anatomy = tie.plan, tie.plan.anatomy
    if anatomy.model_type in RENAMED:
        raise RefusedError(f"{TIE_BLOCKS}: relax: PEFT knows {anatomy.model_type} under other names", "leave relax out")
    adapter = LowRankAdapter(rank)
    by_layer = {block.layer: block for block in anatomy.main_blocks}
    experts = {m.name for block in anatomy.blocks for m in block.members if m.part is not None}
    done: set[int] = set()
    for inside, position, own, _ in tie.compared():
        old = tie.arrangement.own[position]
        layer = tie.stack.name(position, "").removesuffix(".")
        shared = tie.weights(tie.arrangement.tie_map[position], inside)
        if own.dtype not in PLAIN_FLOATS:
            raise RefusedError(f"{TIE_BLOCKS}: relax: {inside} is quantised", "dequantise first")
        if tie.stack.blocks[old][inside] not in experts:
            adapter.add_linear(f"{layer}.{inside.removesuffix('.weight')}", own, shared)
        elif position not in done:
            done.add(position)
            replaced = {
                name: tie.weights(tie.arrangement.tie_map[position], inside)
                for inside, name in tie.stack.blocks[old].items()
                if name in experts and tie.shared(inside)
            }
            layouts = anatomy.settings.family.layouts
            block = by_layer[old]
            adapter.add_experts(
                layer,
                expert_parameters(block, plan.tensors, layouts),
                expert_parameters(block, {**plan.tensors, **replaced}, layouts),
            )
    if not adapter.tensors:
        raise RefusedError(f"{TIE_BLOCKS}: relax: every position has its own weights already", "leave relax out")
    return adapter.files()
