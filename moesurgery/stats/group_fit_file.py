"""A group fit on disk: neuron orders and router rows for `merge-experts` (`fitting.group_fit`).

A safetensors file. For each MoE block that was run, `WHERE/order/E` [I] has the neurons of expert E in the order of
those of its group's dominant member, `WHERE/router` [M, H] and `WHERE/router_bias` [M] the router's entries for the M
groups of more than one expert. The metadata has the groups that it was made for, and the provenance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesurgery.checkpoint.header import TensorInfo, read_header
from moesurgery.checkpoint.source import LocalSource
from moesurgery.checkpoint.strict_json import compact_json
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.expr.nodes import Expr, Slice, Stored
from moesurgery.stats import entry_rules
from moesurgery.stats.safetensors_file import save_arrays

if TYPE_CHECKING:
    import numpy as np

_FORMAT = "moesurgery fit 1"


class MergedGroups(Protocol):
    """The groups of a merge that a fit is made for: by block, the members of each group and its dominant one."""

    @property
    def groups(self) -> Mapping[str, list[list[int]]]: ...
    @property
    def dominant(self) -> Mapping[str, list[int]]: ...
    @property
    def align(self) -> str: ...
    @property
    def router(self) -> str: ...


@dataclass
class GroupFit:
    """The fit of one block.

    orders[e] [I] for each member of a group but the dominant one; router["router"] [M, H] and router["router_bias"] [M]
    for the M groups of several experts.
    """

    where: str
    orders: dict[int, np.ndarray] = field(default_factory=dict)
    router: dict[str, np.ndarray] = field(default_factory=dict)


def save_group_fits(path: Path, fits: Sequence[GroupFit], merger: MergedGroups, about: Mapping[str, Any]) -> None:
    """Write the fit for a merge, with its provenance `about`.

    Raises RefusedError for router rows that are not finite.
    """
    import numpy as np

    arrays: dict[str, Any] = {}
    for fit in fits:
        for role, entries in fit.router.items():
            if not np.isfinite(entries).all():
                raise RefusedError(
                    f"merge-experts: the {role} fitted for {fit.where} is not finite:"
                    " the model computes NaN or infinity on this text",
                    "`moesurgery validate --level values` finds bad weights; --router dominant fits nothing",
                )
        arrays |= {f"{fit.where}/order/{e}": order.astype(np.int64) for e, order in fit.orders.items()}
        arrays |= {f"{fit.where}/{role}": entries.astype(np.float32) for role, entries in fit.router.items()}
    blocks = {f.where: {"groups": merger.groups[f.where], "dominant": merger.dominant[f.where]} for f in fits}
    document = {**about, "align": merger.align, "router": merger.router, "blocks": blocks}
    save_arrays(path, arrays, {"about": compact_json(document), "format": _FORMAT})


@dataclass(frozen=True)
class GroupFitFile:
    """A fit as it was read. Its tensors are opened when their values are asked for."""

    source: LocalSource
    file: str
    about: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def blocks(self) -> Mapping[str, Mapping[str, Any]]:
        """The groups and dominant members of each block that was run."""
        by_block: Mapping[str, Mapping[str, Any]] = self.about["blocks"]
        return by_block

    def differences(self, merger: MergedGroups) -> list[str]:
        """Return in what a merge differs from the one that the fit was made for, in words."""
        for kind, wanted in (("align", "activations"), ("router", "lse")):
            if getattr(merger, kind) == wanted != self.about[kind]:
                return [f"it was made for --{kind} {self.about[kind]}"]
        for where, block in self.blocks.items():
            groups, dominant = merger.groups.get(where), merger.dominant.get(where)
            if groups != block["groups"]:
                return [f"it has {block['groups']} in {where}, the merge {groups or 'no experts there'}"]
            if dominant != block["dominant"]:
                return [f"other members are dominant in {where}"]
        return []

    def check(self, merger: MergedGroups, path: str) -> None:
        """Raise RefusedError where the fit was made for another merge."""
        differs = self.differences(merger)
        if differs:
            raise RefusedError(
                f"merge-experts: {path} was made for another merge: {differs[0]}", "make it again with --text FILE"
            )

    def order(self, where: str, expert: int) -> Expr:
        """Return the order [I] of an expert's neurons. Raises CheckpointError where it is none."""
        import numpy as np

        info = self._tensor(f"{where}/order/{expert}", "I64", 1)
        values = np.frombuffer(self.source.read(info.file, info.start, info.nbytes), "<i8")
        if not np.array_equal(np.sort(values), np.arange(info.shape[0])):
            raise self._wrong(info.name, f"does not name each of {info.shape[0]} neurons once")
        return Stored(self.source, info)

    def row(self, where: str, role: str, number: int) -> Expr:
        """Return the entry [1, H] or [1] of group `number` in the block's "router" or "router_bias"."""
        merged = [n for n, group in enumerate(self.blocks[where]["groups"]) if len(group) > 1]
        at = merged.index(number)
        info = self._tensor(f"{where}/{role}", "F32", 2 if role == "router" else 1)
        if info.shape[0] != len(merged):
            raise self._wrong(info.name, f"has {info.shape[0]} entries for {len(merged)} groups")
        return Slice(Stored(self.source, info), at, at + 1)

    def _tensor(self, name: str, dtype: str, dimensions: int) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None or info.dtype != dtype or len(info.shape) != dimensions:
            what = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise self._wrong(name, what)
        return info

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} {what}", "make the fit again with --text FILE")


_ABOUT = {
    "align": entry_rules.A_TEXT,
    "router": entry_rules.A_TEXT,
    "blocks": entry_rules.mapping_to(entry_rules.EntryRule("an object", lambda v: isinstance(v, dict))),
}
_BLOCK = {
    "groups": entry_rules.listed(entry_rules.listed(entry_rules.COUNT)),
    "dominant": entry_rules.listed(entry_rules.COUNT),
}


def open_group_fits(path: str | Path) -> GroupFitFile:
    """Read a fit. Raises CheckpointError where the file holds none."""
    file = Path(path).absolute()
    hint = "make one with `moesurgery merge-experts … --text FILE`"
    source = LocalSource(file.parent)
    try:
        size = file.stat().st_size
        try:
            header = read_header(file.name, size, lambda start, length: source.read(file.name, start, length))
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be read as a fit of groups: {error}", hint) from None
        if header.metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no fit of groups", hint)
        about = entry_rules.read_document(header.metadata.get("about", ""), _ABOUT, {"text": entry_rules.FILES})
        for where, block in about["blocks"].items():
            entry_rules.check_entries(block, _BLOCK, {}, f"{where}: ")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read as a fit of groups: {reason}", hint) from None
    return GroupFitFile(source, file.name, about, {info.name: info for info in header.tensors})
