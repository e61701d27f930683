"""Writing a plan: the output appears whole or not at all.

All work happens in `OUT.partial` beside the output. Each shard is a task with its own manifest, so running
the same command again after an interruption writes only what is missing. When all shards are there, side
files, config and the index are written, the directory is renamed, and only then is there an output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.checkpoint import Checkpoint
from moesurgery.checkpoint.digest import sampled_digest, whole_digest
from moesurgery.checkpoint.filenames import CARD, CONFIG, INDEX, PROVENANCE, SINGLE, WORK
from moesurgery.checkpoint.gguf_header import read_gguf_header
from moesurgery.checkpoint.header import header_digest, read_header
from moesurgery.checkpoint.source import Source
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cpu_count import cores
from moesurgery.errors import OutputError
from moesurgery.expr.nodes import Compute
from moesurgery.plan.plan import Plan
from moesurgery.write import copy_bytes
from moesurgery.write.card import card_text, provenance
from moesurgery.write.claim import WorkFolder, claim
from moesurgery.write.job_control import JobControl
from moesurgery.write.output_folder import check_output
from moesurgery.write.publish import publish, recover
from moesurgery.write.shard import Manner, ShardTask, disk_error, done, write_shard
from moesurgery.write.shard_layout import companion_tasks, shard_tasks


@dataclass(frozen=True)
class WriteOptions:
    """How and where to write. Nothing here changes the bytes of a tensor.

    `jobs`: threads in all. `link`: hard-link unchanged shards where they cannot be cloned. `force`:
    replace an existing output. `card`: write README.md even where the model has its own. `durable`: wait for the
    disk before the output appears; without it a power cut may damage what was just written. `checksums`: read every
    shard again for its SHA-256 and record it in the provenance.
    """

    jobs: int | None = None
    link: bool = False
    force: bool = False
    card: bool = False
    durable: bool = True
    checksums: bool = False


@dataclass(frozen=True)
class Written:
    """What a job did."""

    path: Path
    shards: int
    nbytes: int
    resumed: int


def write_plan(
    plan: Plan,
    output: str | Path,
    options: WriteOptions = WriteOptions(),
    *,
    watch: JobControl | None = None,
    make_executor: Callable[[int], AbstractContextManager[Executor]] | None = None,
) -> Written:
    """Write `plan` to the directory `output`.

    `make_executor(workers)` gives any `concurrent.futures.Executor` that sees the same directories; threads by
    default. Raises OutputError where the output exists, equals an input, or does not fit.
    """
    output = Path(os.path.abspath(output))
    recover(output)
    check_output(plan, output, force=options.force)
    for file in plan.checkpoint.side_files:
        plan.checkpoint.source.local(file)  # a link out of the checkpoint is an error now, not after hours
    tasks = [*shard_tasks(plan), *companion_tasks(plan)]
    identity = plan_id(plan, tasks)
    partial = output.with_name(output.name + ".partial")
    work = claim(partial, identity, force=options.force)
    try:
        todo = [task for task in tasks if not done(work, task.name, identity)]
        workers, threads = _workers(options, todo)
        manner = Manner(threads, link=options.link, reflink=_can_reflink(plan, work), durable=options.durable)
        _check_space(todo, work, manner)
        watch = watch or JobControl()
        for task in tasks:
            if task not in todo:
                watch.progress(task.data_bytes)
        _run(todo, work, manner, watch, workers, make_executor)
        try:
            nbytes = _finish(plan, tasks, work, options)
            _check_sources(plan, tasks)
            publish(work, output, force=options.force, durable=options.durable)
        except OSError as error:
            raise disk_error(error, partial) from error
    finally:
        work.release()
    return Written(output, len(tasks), nbytes, len(tasks) - len(todo))


def plan_id(plan: Plan, tasks: list[ShardTask]) -> str:
    """Return a digest of everything that decides the output: inputs, expressions, config, version."""
    digest = hashlib.sha256(f"moesurgery {__version__}\n".encode())
    for checkpoint in plan.sources:
        digest.update(checkpoint.source.identity.encode())
        for header in checkpoint.headers:
            digest.update(f"{header.file} {header.file_size} {header.digest}\n".encode())
    for source, file in files_read(plan, tasks):
        digest.update(f"{file} {source.version(file)}\n".encode())
    digest.update(json.dumps(plan.config, sort_keys=True).encode())
    for file, content in sorted(plan.files.items()):
        digest.update(f"{file}\n".encode() + hashlib.sha256(content or b"").digest())
    for task in tasks:
        digest.update(f"{task.name} {task.phase} {task.metadata} {task.gguf or ''}\n".encode())
        # The bytes of a whole shard are already named by its header above.
        digest.update(b"whole\n" if task.whole else repr(task.entries).encode())
    return digest.hexdigest()


def files_read(plan: Plan, tasks: Iterable[ShardTask]) -> list[tuple[Source, str]]:
    """Return the files whose tensors decide the output: all shards of all models, and what expressions read beside."""
    of_models = ((c.source, file) for c in plan.sources for file in c.shards)
    beside = (
        (stored.source, stored.info.file)
        for task in tasks
        if task.whole is None
        for _, expr in task.entries
        for stored in expr.stored()
    )
    return list(dict.fromkeys((*of_models, *beside)))


def _check_sources(plan: Plan, tasks: Iterable[ShardTask]) -> None:
    """Raise CheckpointError where an input is not what it was when it was opened."""
    for source, file in files_read(plan, tasks):
        source.check(file)
    for checkpoint in plan.sources:
        for file in (CONFIG, INDEX):
            if file in checkpoint.file_sizes:
                checkpoint.source.check(file)
    for file in plan.checkpoint.side_files:
        plan.checkpoint.source.check(file)


def _workers(options: WriteOptions, tasks: list[ShardTask]) -> tuple[int, int]:
    """Divide the threads: shards in parallel, and threads in each (writes to one file take turns)."""
    jobs = options.jobs or min(cores(), 8)
    workers = max(1, min(jobs, len(tasks)))
    return workers, max(1, jobs // workers)


def _can_reflink(plan: Plan, work: WorkFolder) -> bool:
    """Try whether the output's filesystem shares blocks with the first source file."""
    source = plan.checkpoint.source
    if not plan.checkpoint.headers:
        return False
    path = source.local(plan.checkpoint.headers[0].file)
    if path is None:
        return False
    trial = f"{WORK}/clone.tmp"
    try:
        descriptor = work.create(trial)
        try:
            return copy_bytes.clone(path, descriptor)
        finally:
            os.close(descriptor)
            work.remove(trial)
    except OSError:
        return False


def _check_space(todo: list[ShardTask], work: WorkFolder, manner: Manner) -> None:
    """Refuse before the first byte where the output cannot fit."""
    needed = sum(bytes_needed(task, linked=manner.link or manner.reflink) for task in todo)
    status = os.statvfs(work.descriptor)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        hint = "free some space, choose another disk with -o"
        if not manner.link and any(task.whole for task in todo):
            hint += ", or use --link: unchanged shards then take no space"
        # Nothing was written: leave nothing behind.
        if not any(work.exists(task.name) for task in todo):
            work.discard()
        raise OutputError(
            f"the output needs {needed / 1e9:.2f} GB, {work.parent.path} has {free / 1e9:.2f} GB free", hint
        )


def bytes_needed(task: ShardTask, *, linked: bool) -> int:
    """Return the disk space that writing a shard takes: holes of a sparse source stay holes."""
    if task.whole is None:
        return task.data_bytes
    if linked:
        return 0
    path = task.whole[0].local(task.whole[1])
    return min(task.whole[2], path.stat().st_blocks * 512) if path is not None else task.whole[2]


def _run(
    todo: list[ShardTask],
    work: WorkFolder,
    manner: Manner,
    watch: JobControl,
    workers: int,
    make_executor: Callable[[int], AbstractContextManager[Executor]] | None,
) -> None:
    if not todo:
        return
    local = make_executor is None
    previous_threads = _limit_torch_threads(todo)
    executor = ThreadPoolExecutor(workers) if make_executor is None else make_executor(workers)
    futures: list[Future[int]] = []
    try:
        with executor as pool:
            try:
                futures = [
                    pool.submit(write_shard, task, work, work.plan_id, manner, watch if local else None)
                    for task in todo
                ]
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                watch.stop.set()
                for future in futures:
                    future.cancel()
                raise
    except BrokenExecutor as error:
        raise OutputError(
            f"a worker died while writing {work.path}: {error}", "run the same command again to resume"
        ) from None
    finally:
        if previous_threads is not None:
            import torch

            torch.set_num_threads(previous_threads)


def _limit_torch_threads(todo: list[ShardTask]) -> int | None:
    """One torch thread per worker: chunks fit the cache, and the workers are the parallelism."""
    entries = (expr for task in todo if not task.whole for _, expr in task.entries)
    pieces = (piece for expr in entries for piece in expr.pieces())
    if all(not isinstance(piece, Compute) or piece.expr.numpy_only for piece in pieces):
        return None
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    return previous


def _finish(plan: Plan, tasks: list[ShardTask], work: WorkFolder, options: WriteOptions) -> int:
    """Check every shard, then write side files, config, card, provenance, and last the index."""
    total = sum(task.data_bytes for task in tasks)
    known = {(c.source, header.file): header.digest for c in plan.sources for header in c.headers}
    with ThreadPoolExecutor(options.jobs or min(cores(), 8)) as pool:
        outputs = list(pool.map(lambda task: _check_shard(work, task, known, checksum=options.checksums), tasks))
    work.keep({task.name for task in tasks})  # the input may have lost files since an earlier, interrupted attempt
    source = plan.checkpoint

    def write(file: str, content: bytes | Iterator[bytes]) -> None:
        work.write(file, [content] if isinstance(content, bytes) else content, durable=options.durable)

    for file in source.side_files:
        # The last is what some uploaded with a checkpoint: the working folder of a job that was killed.
        if (file == CARD and options.card) or file in plan.files or file.startswith(f"{WORK}/"):
            continue
        write(file, _side_file(source, file))
    for file, content in plan.files.items():
        if content is not None:
            write(file, content)
    if source.gguf is None:
        same = plan.config == source.config
        config = b"".join(_side_file(source, CONFIG)) if same else write_json(plan.config).encode()
        write(CONFIG, config)
        outputs.append({"file": CONFIG, "sha256": hashlib.sha256(config).hexdigest()})
    if options.card or CARD not in source.side_files or plan.files.get(CARD, b"") is None:
        write(CARD, card_text(plan).encode())
    write(PROVENANCE, write_json(provenance(plan, outputs)).encode())
    shards = [task for task in tasks if task.name not in plan.companions]
    if source.gguf is None and (shards[0].name != SINGLE or len(shards) > 1):
        write(INDEX, write_json(_index(plan, shards)).encode())
    if options.durable:
        for task in tasks:  # shards of an earlier attempt that did not wait among them
            work.sync_file(task.name)
        work.sync()
    return total


def _check_shard(
    work: WorkFolder, task: ShardTask, known: Mapping[tuple[Source, str], str], *, checksum: bool
) -> dict[str, Any]:
    """Read back the header of a shard and return its digests; raise OutputError where it is not what was planned.

    `known` has the digests of the source shards' headers: a whole copy is known by its header's, unread.
    """
    source = work.source
    size = work.status(task.name).st_size

    def read(start: int, length: int) -> bytes:
        return source.read(task.name, start, length)

    if task.whole is not None:
        digest = header_digest(size, read) if task.gguf is None else read_gguf_header(task.name, size, read).digest
        same = digest == known.get(task.whole[:2]) and size == task.whole[2]
    else:
        header = (read_header if task.gguf is None else read_gguf_header)(task.name, size, read)
        digest = header.digest
        written = [(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors]
        same = written == [(name, expr.dtype, expr.shape, expr.nbytes) for name, expr in task.entries]
    if not same:
        raise OutputError(
            f"{work.path / task.name} is not what was planned", "delete the .partial folder and start again"
        )
    digests = {"header_sha256": digest, "sampled_sha256": sampled_digest(source, task.name, size)}
    if checksum:
        digests["sha256"] = whole_digest(source, task.name, size)
    return {"file": task.name, "size": size, **digests}


def _index(plan: Plan, tasks: list[ShardTask]) -> dict[str, Any]:
    kept = {
        k: v for k, v in (plan.checkpoint.index_metadata or {}).items() if k not in ("total_size", "total_parameters")
    }
    metadata = {**kept, "total_size": plan.nbytes}
    weight_map = {name: task.name for task in tasks for name, _ in task.entries}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _side_file(checkpoint: Checkpoint, file: str) -> Iterator[bytes]:
    size = checkpoint.file_sizes[file]
    for start in range(0, size, 8 << 20):
        yield checkpoint.source.read(file, start, min(8 << 20, size - start))
