"""C04 to C06: experts, routers and top-k, by the family table."""

from __future__ import annotations

from collections.abc import Iterator

from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.errors import CheckpointError
from moesurgery.families.anatomy import BlockTensor, MoeBlock
from moesurgery.families.config_keys import EXPERTS_KEYS, GROUPS_KEYS, TOP_GROUPS_KEYS, TOP_K_KEYS, keys_present
from moesurgery.families.quantised import count_outputs
from moesurgery.validate.check import NotChecked, Outcome, and_more, check, finding
from moesurgery.validate.context import Context

_ONE_LAYOUT = "transformers reads both, most other engines one: write all layers in one of them"


@check("C04")
def experts(subject: Context) -> Outcome:
    """Every MoE layer has all of its experts, equal in shape and as many as the config says."""
    anatomy = subject.anatomy
    if anatomy.family is None and anatomy.is_moe:
        reason = f"{anatomy.unknown_experts}: its experts cannot be told"
        yield NotChecked(("C04", "C05", "C06"), reason)
        return
    if problem := subject.malformed("experts"):
        yield finding("C04", problem, CONFIG)
    stated = subject.setting("experts")
    key = keys_present(anatomy.settings, EXPERTS_KEYS)
    for block, error in subject.broken_blocks:
        if not _is_whole(block):
            yield finding("C04", _missing(block, stated) or error.message, hint=error.hint)
    counts = {block.experts for block in subject.whole_blocks if block in anatomy.main_blocks}
    if stated is None and len(counts) > 1:
        yield finding("C04", f"the layers have different numbers of experts: {sorted(counts)}")
    layouts = {block.layout.kind: block.where for block in anatomy.main_blocks if block.layout is not None}
    if len(layouts) > 1:
        shown = " and ".join(f"{kind} in {where}" for kind, where in sorted(layouts.items()))
        yield finding("C04", f"the experts are stored in two ways: {shown}", hint=_ONE_LAYOUT, severity="warning")
    for block in subject.whole_blocks:
        if stated is not None and block.experts != stated:
            yield finding("C04", f"{block.where} has {block.experts} experts; {key} says {stated}")
        yield from _equal_shapes(subject, block)
    if anatomy.family is not None and stated and not anatomy.blocks:
        yield finding("C04", f"{key} says {stated} experts; there is not one among the tensors")


def _is_whole(block: MoeBlock) -> bool:
    """Whether a block that does not add up has all its experts: then its router is wrong (C05)."""
    return block.layout is not None and block.experts > 0 and _missing(block, None) is None


def _missing(block: MoeBlock, stated: int | None) -> str | None:
    """Name the experts of which a part is not there; None where all are."""
    present: dict[str, set[int]] = {}
    for member in block.members:
        if member.part is not None and member.stem.main and member.expert is not None:
            present.setdefault(member.part.path, set()).add(member.expert)
    if not present:
        return None
    wanted = set().union(*present.values())
    # As many as stated, unless that is a number to doubt: nobody wants a list of a billion experts.
    wanted |= set(range(stated if stated and stated <= 2 * len(wanted) else max(wanted) + 1 if len(wanted) > 1 else 1))
    for path, numbers in present.items():
        if gap := sorted(wanted - numbers):
            shown = ", ".join(map(str, gap[:8])) + (", …" if len(gap) > 8 else "")
            return f"{block.where}: {path} of {len(gap)} of {len(wanted)} experts is missing: {shown}"
    return None


def _equal_shapes(subject: Context, block: MoeBlock) -> Iterator[Finding]:
    """All experts of a block have the same shapes, companions of quantised weights too."""
    kinds: dict[tuple[str, str], dict[tuple[int, ...], list[str]]] = {}
    for member in block.members:
        if member.expert is not None and member.part is not None:
            shape = subject.tensors[member.name].shape
            kinds.setdefault((member.part.path, member.stem.suffix), {}).setdefault(shape, []).append(member.name)
    for shapes in kinds.values():
        if len(shapes) > 1:
            common = max(shapes, key=lambda shape: len(shapes[shape]))
            odd = [name for shape, names in shapes.items() if shape != common for name in names]
            mine = list(subject.tensors[odd[0]].shape)
            yield finding("C04", f"has shape {mine}, the other experts' {list(common)}" + and_more(odd), tensor=odd[0])


@check("C05")
def check_routers(subject: Context) -> Outcome:
    """A router has an entry for every expert, reads the hidden state, and its groups divide the experts."""
    blocks = [b for b, _ in subject.broken_blocks if _is_whole(b)] + subject.whole_blocks
    family = subject.anatomy.settings.family
    has_routers = any(along.role == "router" for along in family.along)
    for block in blocks:
        if block.router is None and not block.named("expert_table") and has_routers:
            yield finding("C05", f"{block.where} has experts and no router")
        for member in block.members:
            if member.along is None or member.along.role == "expert_table":
                continue
            if member.quantised_router:
                yield from _quantised_outputs(subject, block, member)
                continue
            shape = subject.tensors[member.name].shape
            length = shape[member.along.axis] if member.along.axis < len(shape) else 0
            if length != block.experts and not (member.along.extra and length > block.experts):
                message = f"has {length} entries for the {block.experts} experts of its layer"
                yield finding("C05", message, tensor=member.name)
            elif member is block.router and len(shape) == 2 and family.routing.special is None:
                width, hidden = shape[1 - member.along.axis], subject.setting("hidden")
                if hidden is not None and width != hidden:
                    yield finding("C05", f"reads {width} inputs; the hidden size is {hidden}", tensor=member.name)
    if blocks:
        yield from _groups(subject, sorted({block.experts for block in blocks}))


def _quantised_outputs(subject: Context, block: MoeBlock, member: BlockTensor) -> Iterator[Finding]:
    """A quantised router has an output for every expert, as far as its shapes tell."""
    together = [m for m in block.members if m.quantised_router and m.base == member.base]
    count = count_outputs({m.stem.suffix: subject.tensors[m.name].shape for m in together})
    if member.stem.main and count is not None and count != block.experts:
        message = f"has {count} outputs for the {block.experts} experts of its layer"
        yield finding("C05", message, tensor=member.name)


def _groups(subject: Context, counts: list[int]) -> Iterator[Finding]:
    settings = subject.anatomy.settings
    if settings.family.routing.groups is None:
        return
    try:
        active, stated, kept = settings.groups, settings.integer(GROUPS_KEYS), settings.integer(TOP_GROUPS_KEYS)
    except CheckpointError as error:
        yield finding("C05", error.message.removeprefix(f"{CONFIG}: "), CONFIG)
        return
    if active is None or not stated:
        return
    for count in counts:
        if count % stated:
            yield finding("C05", f"{count} experts do not divide into {stated} groups", CONFIG)
    if kept is not None and not 1 <= kept <= stated:
        yield finding("C05", f"routing keeps {kept} of {stated} groups", CONFIG)


@check("C06")
def top_k(subject: Context) -> Outcome:
    """1 <= top-k <= the experts that a token can reach."""
    settings = subject.anatomy.settings
    counts = [block.experts for block in subject.anatomy.blocks if block.experts]
    if not counts:
        return
    if problem := subject.malformed("top_k"):
        yield finding("C06", problem, CONFIG)
        return
    chosen = settings.top_k
    if chosen is None:
        yield NotChecked(("C06",), "config.json names no top-k: the model class's own default applies")
        return
    most = min(counts)
    groups = None if subject.malformed("groups") else settings.groups
    if groups is not None and 1 <= groups[1] <= groups[0]:
        most = most // groups[0] * groups[1]
    if not 1 <= chosen <= most:
        key = keys_present(settings, TOP_K_KEYS)
        yield finding("C06", f"{key} is {chosen}; a token can reach {most} experts", CONFIG)
