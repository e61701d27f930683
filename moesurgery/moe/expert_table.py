"""Tables that name each token's experts by number, as DeepSeek-V4's hash layers do (`tid2eid` [vocabulary, k]).

The table alone says which experts a token goes to; the router only weighs them. So when experts go, become one, or the
top-k changes, the table is rewritten: what is left keeps its place under its new number, and every other place takes
the expert whose router row has the largest cosine with that of the expert that stood there, among those that the
token does not have yet (published copies with fewer experts do the same).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Applied
from moesurgery.families.anatomy import BlockTensor, MoeBlock

if TYPE_CHECKING:
    import torch

GONE = -1  # in place of a new number
_ROWS = 8192  # tokens at a time


def is_expert_table(member: BlockTensor) -> bool:
    """Whether a tensor of a block names experts by token."""
    return member.along is not None and member.along.role == "expert_table"


def remapped_table(
    block: MoeBlock,
    table: BlockTensor,
    tensors: Mapping[str, Expr],
    after: Callable[[BlockTensor], Expr],
    place: Sequence[int],
    width: int | None = None,
) -> Expr:
    """Return a block's table for other experts.

    `after` returns what a tensor of the router becomes: from rows [E, H] to rows [E', H]. `place` has the new number
    of each old expert, or GONE. `width` is the new number of experts per token: the first so many stay; more are those
    nearest to the experts that the table lists. Raises RefusedError where the rows are not there as plain numbers.
    """
    name, expr, router = table.name, tensors[table.name], block.router
    if len(expr.shape) != 2:
        raise CheckpointError(f"{name} has shape {list(expr.shape)}, expected a row of expert numbers for each token")
    width = expr.shape[1] if width is None else width
    if width == expr.shape[1] and list(place) == list(range(len(place))):
        return expr
    if router is None or tensors[router.name].dtype not in PLAIN_FLOATS:
        why = "which is missing" if router is None else f"which is quantised ({tensors[router.name].dtype})"
        raise RefusedError(
            f"{name} assigns experts to tokens, and follows the router of {block.where}, {why}",
            "dequantise first with `moesurgery convert --dequantize`" if router else None,
        )
    rows, new_rows = tensors[router.name], after(router)
    if width > new_rows.shape[0]:
        raise RefusedError(f"{name} names {width} experts for each token, and {new_rows.shape[0]} would be left")
    parameters = (("place", tuple(place)), ("width", width), ("name", name))
    return Applied(_remapped, (expr, rows, new_rows), expr.dtype, (expr.shape[0], width), parameters)


def _remapped(
    table: torch.Tensor, before: torch.Tensor, after: torch.Tensor, *, place: tuple[int, ...], width: int, name: str
) -> torch.Tensor:
    """Return the rewritten table [vocabulary, width], int64."""
    import torch

    old = table.to(torch.int64)
    if old.numel() and not 0 <= int(old.min()) <= int(old.max()) < len(place):
        raise CheckpointError(
            f"{name} names experts {int(old.min())} to {int(old.max())}; the layer has 0 to {len(place) - 1}"
        )
    listed = old.shape[1]
    wanted = old[:, [slot % listed for slot in range(width)]]
    new = torch.tensor(place)[wanted]
    new[:, listed:] = GONE
    for slot in range(1, width):  # two that became one: the later place is free
        again = (new[:, :slot] == new[:, slot, None]) & (wanted[:, :slot] != wanted[:, slot, None])
        new[again.any(1), slot] = GONE
    nearest = _nearest(before, after, name)[:, :width]  # a token has at most width - 1 others
    for slot in range(width):
        for rows in torch.split((new[:, slot] == GONE).nonzero().flatten(), _ROWS):
            candidates = nearest[wanted[rows, slot]]
            taken = (candidates[:, :, None] == new[rows][:, None, :]).any(2)
            first_free = taken.int().cumprod(1).sum(1)
            new[rows, slot] = candidates[torch.arange(len(rows)), first_free]
    return new


def _nearest(before: torch.Tensor, after: torch.Tensor, name: str) -> torch.Tensor:
    """Return for each old router row the numbers of the new ones, largest cosine first, the lower number of equals."""
    import torch

    units = []
    for rows in (before, after):
        rows = rows.to(torch.float64)
        if not bool(rows.isfinite().all()):
            raise RefusedError(
                f"the router rows that {name} follows hold numbers that are not finite",
                "`moesurgery validate --level values` finds all such tensors",
            )
        units.append(rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.argsort(units[0] @ units[1].T, dim=1, descending=True, stable=True)
