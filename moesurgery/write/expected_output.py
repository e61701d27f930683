"""What is left to do when all shards of an output are written: check them, and say what they are.

It is plain data, so that a process that has no plan can do it, such as `moesurgery finish` for a job in parts.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.digest import sampled_digest, whole_digest
from moesurgery.checkpoint.filenames import CARD, CONFIG, INDEX, PROVENANCE, SINGLE, WORK
from moesurgery.checkpoint.gguf_header import scan_gguf_header
from moesurgery.checkpoint.header import LENGTH_BYTES, header_digest
from moesurgery.checkpoint.source import read_in_parts
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cpu_count import cores
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import Rounding, rounding_lines
from moesurgery.write.card import card_text, provenance
from moesurgery.write.claim import WorkFolder
from moesurgery.write.open_folder import OpenFolder
from moesurgery.write.shard import ShardTask
from moesurgery.write.shard_manifest import rounding_of, tried_again


@dataclass(frozen=True)
class ExpectedShard:
    """A shard as it must be: `size` in bytes, SHA-256 of its header, and how many bytes of tensors it holds."""

    name: str
    size: int
    header_sha256: str
    data_bytes: int


@dataclass(frozen=True)
class ExpectedOutput:
    """All shards of an output, its index (None for a single file) and its provenance without the shards' digests."""

    shards: tuple[ExpectedShard, ...]
    index: dict[str, Any] | None
    provenance: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)


@dataclass(frozen=True)
class Promise:
    """What somebody published: the SHA-256 of every file, and the files that no plan gives, by name."""

    digests: Mapping[str, str]
    files: Mapping[str, bytes]


def expected_output(plan: Plan, tasks: list[ShardTask]) -> ExpectedOutput:
    """Return what remains to be done for a plan when its shards are written."""
    known = {(c.source, header.file): header.digest for c in plan.sources for header in c.headers}
    shards = []
    for task in tasks:
        if task.whole is not None:
            source, file, size = task.whole
            shards.append(ExpectedShard(task.name, size, known[source, file], task.data_bytes))
        else:
            header = task.header
            digested = header[LENGTH_BYTES:] if task.gguf is None else task.gguf.header(task.entries)
            digest = hashlib.sha256(digested).hexdigest()
            shards.append(ExpectedShard(task.name, task.size, digest, task.data_bytes))
    of_model = [task for task in tasks if task.name not in plan.companions]
    single = (len(of_model) == 1 and of_model[0].name == SINGLE) or plan.checkpoint.gguf is not None
    return ExpectedOutput(tuple(shards), None if single else _index(plan, of_model), provenance(plan, []))


def write_side_files(
    plan: Plan,
    tasks: list[ShardTask],
    work: WorkFolder,
    *,
    card: bool,
    durable: bool,
    evidence: str = "",
    rounding: Rounding | None = None,
) -> None:
    """Write config.json (none for a GGUF), what goes with a model, and README.md where it has none or `card` is true.

    `evidence`: Markdown at the end of README.md. `rounding`: of all shards, where they are written.
    Deletes what an earlier, interrupted attempt left that is no shard of this plan.
    """
    work.keep({task.name for task in tasks})  # the input may have lost files since then
    source = plan.checkpoint

    def write(file: str, *content: bytes) -> None:
        work.write(file, content, durable=durable)

    for file in source.side_files:
        # The last is what some uploaded with a checkpoint: the working folder of a job that was killed.
        if (file == CARD and card) or file in plan.files or file.startswith(f"{WORK}/"):
            continue
        work.write(file, _side_file(source, file), durable=durable)
    for file, content in plan.files.items():
        if content is not None:
            write(file, content)
    if source.gguf is None:
        write(CONFIG, _config(plan))
    if card or CARD not in source.side_files or plan.files.get(CARD, b"") is None:
        write(CARD, card_text(plan, evidence, rounding_lines(rounding or {})).encode())


def check_and_index(
    expected: ExpectedOutput, work: OpenFolder, jobs: int | None = None, *, durable: bool, checksums: bool
) -> None:
    """Check every shard, then write the provenance, and last the index.

    `jobs`: threads. `checksums`: read every shard once more for its SHA-256. Raises OutputError where a shard is not
    what was planned.
    """

    def checked(shard: ExpectedShard) -> dict[str, Any]:
        return tried_again(lambda: checked_shard(work, shard, checksums=checksums))

    with ThreadPoolExecutor(jobs or min(cores(), 8)) as pool:
        outputs = list(pool.map(checked, expected.shards))
    write_record(expected, outputs, work, durable=durable)
    if durable:
        for shard in expected.shards:  # shards of an earlier attempt that did not wait among them
            work.sync_file(shard.name)
        work.sync()


def write_record(
    expected: ExpectedOutput, shards: Iterable[dict[str, Any]], work: OpenFolder, *, durable: bool
) -> None:
    """Write the provenance, with what `checked_shard` said of every shard, and last the index."""
    outputs = list(shards)
    if work.exists(CONFIG):
        config = work.source.read(CONFIG, 0, work.status(CONFIG).st_size)
        outputs.append({"file": CONFIG, "sha256": hashlib.sha256(config).hexdigest()})
    record = write_json(expected.provenance | {"outputs": outputs})
    work.write(PROVENANCE, [record.encode()], durable=durable)
    if expected.index is not None:
        work.write(INDEX, [write_json(expected.index).encode()], durable=durable)


def keep_promise(promise: Promise, work: OpenFolder, jobs: int | None = None) -> None:
    """Put the promised files into a finished working folder, and check that every file in it is what was promised.

    Raises OutputError where one is not.
    """
    for file, content in promise.files.items():
        work.write(file, [content], durable=True)
    made = {name: status.st_size for name, status in work.entries() if stat.S_ISREG(status.st_mode)}
    made = {name: size for name, size in made.items() if not name.startswith(f"{WORK}/")}

    def differs(file: str) -> bool:
        return file not in made or whole_digest(work.source, file, made[file]) != promise.digests[file]

    with ThreadPoolExecutor(jobs or min(cores(), 8)) as pool:
        wrong = [file for file, bad in zip(promise.digests, pool.map(differs, promise.digests), strict=True) if bad]
    wrong += sorted(made.keys() - promise.digests.keys())
    if wrong:
        raise OutputError(
            f"{work.path}: {', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not what was published",
            "use the version of moesurgery and of its libraries that made it; the folder is kept for you to look at",
        )


def checked_shard(work: OpenFolder, shard: ExpectedShard, *, checksums: bool) -> dict[str, Any]:
    """Read back the header of a shard and return what the provenance says of it."""
    source = work.source
    size = work.status(shard.name).st_size

    def read(start: int, length: int) -> bytes:
        return source.read(shard.name, start, length)

    gguf = shard.name.lower().endswith(".gguf")
    digest = scan_gguf_header(shard.name, size, read).digest if gguf else header_digest(size, read)
    if (size, digest) != (shard.size, shard.header_sha256):
        raise OutputError(
            f"{work.path / shard.name} is not what was planned", "delete the .partial folder and start again"
        )
    digests = {"header_sha256": digest, "sampled_sha256": sampled_digest(source, shard.name, size)}
    if checksums:
        digests["sha256"] = whole_digest(source, shard.name, size)
    record: dict[str, Any] = {"file": shard.name, "size": size, **digests}
    if rounding := rounding_of(work, shard.name):
        record["rounding"] = rounding
    return record


def _config(plan: Plan) -> bytes:
    source = plan.checkpoint
    return b"".join(_side_file(source, CONFIG)) if plan.config == source.config else write_json(plan.config).encode()


def _index(plan: Plan, tasks: list[ShardTask]) -> dict[str, Any]:
    kept = {
        k: v for k, v in (plan.checkpoint.index_metadata or {}).items() if k not in ("total_size", "total_parameters")
    }
    metadata = {**kept, "total_size": plan.nbytes}
    weight_map = {name: task.name for task in tasks for name, _ in task.entries}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _side_file(checkpoint: Checkpoint, file: str) -> Iterator[bytes]:
    return read_in_parts(checkpoint.source, file, checkpoint.file_sizes[file])
