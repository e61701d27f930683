"""Which tensor goes into which output shard, and what the shards are called."""

from __future__ import annotations

from moesurgery.checkpoint.file_reader import PAGE
from moesurgery.checkpoint.filenames import SINGLE
from moesurgery.checkpoint.gguf_header import GgufHeader
from moesurgery.checkpoint.source import gguf_stem
from moesurgery.expr.nodes import Expr, Stored
from moesurgery.plan.plan import Plan
from moesurgery.write.gguf_container import GgufPart, gguf_parts_of
from moesurgery.write.shard import ShardTask

SHARD_BYTES = 5_000_000_000  # where experts make shards grow: none larger than this, or than the source's largest


def output_tasks(plan: Plan) -> list[ShardTask]:
    """Return all shards of an output, those beside the model last."""
    return [*shard_tasks(plan), *companion_tasks(plan)]


def shard_tasks(plan: Plan) -> list[ShardTask]:
    """Divide a plan into shards.

    Boundaries and order follow the source unless the plan says how large a shard may be: a filesystem can share
    blocks with one source shard only, since the data of another begins elsewhere in the page. A shard of which every
    tensor is unchanged becomes a copy of the whole file.
    """
    if plan.max_shard_size:
        groups = _cut(plan, [name for group in _by_home(plan) for name in group], plan.max_shard_size)
    else:
        limit = max(SHARD_BYTES, *(header.file_size for header in plan.checkpoint.headers), 0)
        groups = [part for group in _by_home(plan) for part in _cut(plan, group, limit)]
    names = _names(plan, groups)
    parts = [None] * len(groups) if plan.checkpoint.gguf is None else gguf_parts_of(plan, groups)
    return [_task(plan, name, group, part) for name, group, part in zip(names, groups, parts, strict=True)]


def companion_tasks(plan: Plan) -> list[ShardTask]:
    """Return a task for each safetensors file beside the model."""
    return [ShardTask(name, tuple(tensors.items()), (), 8 % PAGE) for name, tensors in plan.companions.items()]


def _by_home(plan: Plan) -> list[list[str]]:
    order = {file: i for i, file in enumerate(plan.checkpoint.shards)}
    groups: dict[str, list[str]] = {}
    for name in plan.tensors:
        groups.setdefault(plan.shard_of[name], []).append(name)
    return [groups[file] for file in sorted(groups, key=lambda f: order.get(f, len(order)))]


def _cut(plan: Plan, names: list[str], limit: int) -> list[list[str]]:
    """Return `names` in parts of at most `limit` bytes, or of one tensor that is larger."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = plan.tensors[name].nbytes
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += nbytes
    return parts


def _names(plan: Plan, groups: list[list[str]]) -> list[str]:
    """Keep the source's file names where there is a shard for each; else the Hub's usual ones."""
    shards = plan.checkpoint.shards
    sources = [{plan.shard_of[name] for name in group} for group in groups]
    if len(groups) == len(shards) and all(source == {file} for source, file in zip(sources, shards, strict=True)):
        return shards
    gguf = plan.checkpoint.gguf
    stem, ending = ("model", ".safetensors") if gguf is None else (gguf_stem(gguf.file), ".gguf")
    if len(groups) == 1:
        return [SINGLE if gguf is None else stem + ending]
    return [f"{stem}-{i:05d}-of-{len(groups):05d}{ending}" for i in range(1, len(groups) + 1)]


def _task(plan: Plan, name: str, group: list[str], part: GgufPart | None) -> ShardTask:
    entries = tuple((n, plan.tensors[n]) for n in group)
    header = next((h for h in plan.checkpoint.headers if h.file == plan.shard_of[group[0]]), None) if group else None
    if header is None:
        return ShardTask(name, entries, (), 8 % PAGE, gguf=part)
    metadata = tuple(sorted(header.metadata.items()))
    whole = None
    unedited = part is None or (isinstance(header, GgufHeader) and part.keys == tuple(header.entries.values()))
    if (
        unedited
        and len(group) == len(header.tensors)
        and all(_same(n, e, i) for (n, e), i in zip(entries, header.tensors, strict=True))
    ):
        whole = (plan.checkpoint.source, header.file, header.file_size)
    return ShardTask(name, entries, metadata, header.data_start % PAGE, whole, part)


def _same(name: str, expr: Expr, info: object) -> bool:
    return isinstance(expr, Stored) and expr.info is info and expr.info.name == name
