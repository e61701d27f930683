"""Which positions of a stack share a block, and which block's weights they get.

Schemes: immediate repetition as in MobileLLM-LS (arXiv 2402.14905), cycles as in Relaxed Recursive Transformers
(2410.20672) and the middle cycle of Mixture-of-Recursions (2507.10524), one block for all as in ALBERT and the
Universal Transformer, and repetition of every block, which is depth up-scaling (2312.15166) stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moesurgery.errors import RefusedError

TIE_BLOCKS = "tie-blocks"
Scheme = Literal["immediate", "cycle", "all", "middle-cycle", "repeat"]
Init = Literal["first", "last", "average", "stepwise"]


@dataclass(frozen=True)
class TieScheme:
    """A new stack over the blocks of an old one.

    Position i stands in the place of old block `own[i]` (what is not shared comes from there, and its entry in the
    config's lists); it shares its weights with position `tie_map[i]`, and these are the mean of the old blocks
    `sources[tie_map[i]]`.
    """

    own: tuple[int, ...]
    tie_map: tuple[int, ...]
    sources: dict[int, tuple[int, ...]]

    @property
    def tied(self) -> bool:
        return any(source != position for position, source in enumerate(self.tie_map))


def arranged(scheme: Scheme, depth: int, group_size: int, init: Init) -> TieScheme:
    """Return the arrangement of `depth` blocks by a scheme, `group_size` positions to a block."""
    if scheme == "repeat":
        own = tuple(block for block in range(depth) for _ in range(group_size))
        return _over(own)
    if scheme == "immediate":
        tie_map = [i - i % group_size for i in range(depth)]
    elif scheme == "all":
        tie_map = [0] * depth
    elif scheme == "cycle":
        tie_map = [i % -(-depth // group_size) for i in range(depth)]
    else:
        period = max(1, -(-(depth - 2) // group_size))
        tie_map = [0, *(1 + i % period for i in range(depth - 2)), depth - 1][:depth]
    return TieScheme(tuple(range(depth)), tuple(tie_map), _initial(tie_map, init))


def mapped(blocks: Sequence[int], depth: int, init: Init | None) -> TieScheme:
    """Return the arrangement in which position i runs block `blocks[i]`; raise RefusedError for one that is not there.

    Positions of one block share it. `init` takes the weights from the positions instead, for a stack as deep as before.
    """
    for block in blocks:
        if not 0 <= block < depth:
            raise RefusedError(f"{TIE_BLOCKS}: there is no block {block}", f"the blocks are 0 to {depth - 1}")
    if len(blocks) != depth:
        if init is not None:
            raise RefusedError(
                f"{TIE_BLOCKS}: init {init} needs a map as long as the model is deep ({depth}), this has {len(blocks)}",
                "leave init out: each position then has the block that the map names",
            )
        return _over(tuple(blocks))
    tie_map = [list(blocks).index(block) for block in blocks]
    named: dict[int, tuple[int, ...]] = {s: (blocks[s],) for s in tie_map}
    return TieScheme(tuple(range(depth)), tuple(tie_map), named if init is None else _initial(tie_map, init))


def _over(own: tuple[int, ...]) -> TieScheme:
    """Return the arrangement in which every position is the old block `own[i]`, stored once."""
    tie_map = tuple(own.index(block) for block in own)
    return TieScheme(own, tie_map, {s: (own[s],) for s in tie_map})


def _initial(tie_map: Sequence[int], init: Init) -> dict[int, tuple[int, ...]]:
    """Return the old blocks that each group's weights come from."""
    groups: dict[int, list[int]] = {}
    for position, source in enumerate(tie_map):
        groups.setdefault(source, []).append(position)
    if init == "average":
        return {source: tuple(members) for source, members in groups.items()}
    if init == "stepwise":  # evenly spaced over the depth, first and last kept
        step = (len(tie_map) - 1) / max(1, len(groups) - 1)
        return {source: (int(n * step + 0.5),) for n, source in enumerate(sorted(groups))}
    return {source: (members[0 if init == "first" else -1],) for source, members in groups.items()}
