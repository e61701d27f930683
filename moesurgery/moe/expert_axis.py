"""Where the experts of one block are in its tensors: by a number in the name, or along an axis.

Selecting experts is byte ranges in every layout: per-expert tensors are renumbered or left out, stacked ones
lose rows, and so do router rows, biases, selection biases, per-expert scales and the companions of quantised
weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS, element_count
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr, Slice, concat, reshape
from moesurgery.expr.tensors import Full, concat_last, slice_last, take
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.moe.expert_table import GONE, is_expert_table, remapped_table
from moesurgery.plan.select_packed import PackedEntries

_PLAIN = "dequantise first: `moesurgery convert --dequantize` where it knows the form, else the tool that made it"

Entries = dict[str, list[tuple[str, Expr]]]  # the replacements of each tensor: `Plan.substituted`


def selected(block: MoeBlock, tensors: Mapping[str, Expr], kept: Sequence[int]) -> Entries:
    """Return what a block's tensors become when only the experts `kept` remain, numbered anew in that order.

    Raises RefusedError where a tensor beside the experts is not understood: it could not be edited to match.
    """
    refuse_strays(block, tensors)
    entries: Entries = {}
    for member in block.members:
        expr = tensors[member.name]
        if is_expert_table(member):
            place = [kept.index(e) if e in kept else GONE for e in range(block.experts)]
            table = remapped_table(
                block, member, tensors, lambda m: along_experts(block, m, tensors[m.name], kept), place
            )
            entries[member.name] = [(member.name, table)]
        elif member.expert is None:
            entries[member.name] = [(member.name, along_experts(block, member, expr, kept))]
        else:
            padding = [member.expert] if member.expert >= block.experts else []  # tensors of identity experts
            shift = len(kept) - block.experts
            entries[member.name] = [(member.renumbered(n), expr) for n, e in enumerate(kept) if e == member.expert]
            entries[member.name] += [(member.renumbered(e + shift), expr) for e in padding]
    return entries


def along_experts(block: MoeBlock, member: BlockTensor, expr: Expr, kept: Sequence[int]) -> Expr:
    """Return the entries of a stacked tensor that belong to the experts `kept`, in that order.

    Raises RefusedError where they cannot be identified, or do not fill the words that they are packed in.
    """
    if list(kept) == list(range(block.experts)):
        return expr
    if member.stuck:
        raise RefusedError(f"{member.name}: the router is quantised, and could not follow: {member.stuck}", _PLAIN)
    if member.quantised_router and member.axis is None:
        if member.stem.suffix != ".weight_shape":
            return expr
        return concat([Full(len(kept), expr.dtype, (1,)), Slice(expr, 1, expr.shape[0])])
    assert member.axis is not None
    if member.packed:
        if len(kept) % len(member.packed) and member.axis:
            raise RefusedError(
                f"{member.name} packs the router's outputs {len(member.packed)} to a word, and {len(kept)} experts"
                " would not fill the last",
                f"leave a multiple of {len(member.packed)} experts, or {_PLAIN}",
            )
        return PackedEntries(expr, member.axis, member.packed, tuple(kept))
    if member.part is not None and member.part.rows:
        rows = expr.shape[0] // block.experts
        split = reshape(expr, (block.experts, rows, *expr.shape[1:]))
        return reshape(take(split, list(kept)), (len(kept) * rows, *expr.shape[1:]))
    length = expr.shape[member.axis] if len(expr.shape) > member.axis else 1
    # Identity experts have router rows; transformers 5 pads the stacked weights for them too.
    extra = member.along.extra if member.along is not None else member.part is not None and member.stem.main
    if length != block.experts and not extra:
        assert member.stem.companion is not None  # `recognise` has checked weights and router tensors
        if expr.numel == 1:
            return expr  # one number for all experts
        raise RefusedError(
            f"{member.name} has shape {list(expr.shape)}: it is not known which part belongs to which of the"
            f" {block.experts} experts"
        )
    wanted = [*kept, *range(block.experts, length)]  # entries after the experts (identity experts) stay
    before = element_count(expr.shape[: member.axis])
    if before == 1:
        rest = expr.shape[member.axis + 1 :]
        chosen = take(reshape(expr, (length, *rest)), wanted)
        return reshape(chosen, (*expr.shape[: member.axis], len(wanted), *rest))
    if member.axis != len(expr.shape) - 1:
        raise RefusedError(f"{member.name}: experts along axis {member.axis} of {list(expr.shape)} cannot be selected")
    return concat_last([slice_last(expr, e, e + 1) for e in wanted])


def renamed_modules(block: MoeBlock, kept: Sequence[int]) -> dict[str, str | None]:
    """Return the new name of every module of a per-expert block, None for those that are removed."""
    place = {e: n for n, e in enumerate(kept)}
    names: dict[str, str | None] = {}
    for path in {part.path for part in block.layout.parts if "#" in part.path} if block.layout else ():
        for shape in {path, path[: path.index("#") + 1]}:
            for e in range(block.experts):
                new = f"{block.where}.{shape.replace('#', str(place[e]))}" if e in place else None
                names[f"{block.where}.{shape.replace('#', str(e))}"] = new
    return names


def _up_to_the_expert(path: str) -> list[str]:
    """Return the pieces of a path between its numbers, up to that of the expert."""
    pieces = path.split("#")
    return [*pieces[:-1], ""] if len(pieces) > 1 else pieces


def refuse_strays(block: MoeBlock, tensors: Mapping[str, Expr]) -> None:
    """Raise RefusedError for a tensor that must change with the experts and is not in the family table."""
    known = {member.name for member in block.members}
    paths = [part.path for part in block.layout.parts] if block.layout else []
    heads = sorted({"[0-9]+".join(map(re.escape, _up_to_the_expert(path))) for path in paths})
    beside = re.compile(rf"{re.escape(block.where)}\.(?:{'|'.join(heads)})[._].*")
    routers = block.router_modules
    if routers and block.router is None and not block.named("expert_table"):
        raise RefusedError(
            f"{block.where} has no router under a name that is known ({routers[0]}weight), so it could not follow the"
            " experts",
            "`moesurgery inspect` lists its tensors",
        )
    for name, expr in tensors.items():
        if name in known or not name.startswith(block.where + "."):
            continue
        if beside.fullmatch(name) or (
            name.startswith(routers) and (block.experts in expr.shape or expr.dtype not in PLAIN_FLOATS)
        ):
            raise RefusedError(
                f"{name} stands with the experts or their router, but the family table does not say what it is,"
                " so it could not follow them",
                "docs/families.md shows how to add it",
            )
