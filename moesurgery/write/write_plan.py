"""Writing a plan: the output appears whole or not at all.

All work happens in `OUT.partial` beside the output. Each shard is a task with its own manifest, so running
the same command again after an interruption writes only what is missing. When all shards are there, side
files, config and the index are written, the directory is renamed, and only then is there an output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from moesurgery._version import __version__
from moesurgery.checkpoint.filenames import CONFIG, INDEX, WORK
from moesurgery.checkpoint.read_ahead import AHEAD
from moesurgery.checkpoint.source import Source
from moesurgery.cpu_count import cores
from moesurgery.errors import OutputError
from moesurgery.expr.nodes import Compute
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import Rounding, together
from moesurgery.scheduler import MakeExecutor, results_of
from moesurgery.write import copy_bytes
from moesurgery.write.claim import WorkFolder, claim
from moesurgery.write.expected_output import Promise, check_and_index, expected_output, keep_promise, write_side_files
from moesurgery.write.job_control import JobControl
from moesurgery.write.output_folder import check_output
from moesurgery.write.publish import publish, recover
from moesurgery.write.shard import Manner, ShardTask, disk_error, write_shard
from moesurgery.write.shard_layout import output_tasks
from moesurgery.write.shard_manifest import done, rounding_of


@dataclass(frozen=True)
class WriteOptions:
    """How and where to write. Nothing here changes the bytes of a tensor.

    `jobs`: threads in all. `link`: hard-link unchanged shards where they cannot be cloned. `force`:
    replace an existing output. `card`: write README.md even where the model has its own. `evidence`: Markdown that
    the card ends with. `durable`: wait for the disk before the output appears; without it a power cut may damage what
    was just written. `checksums`: read every shard again for its SHA-256 and record it in the provenance.
    """

    jobs: int | None = None
    link: bool = False
    force: bool = False
    card: bool = False
    evidence: str = ""
    durable: bool = True
    checksums: bool = False


@dataclass(frozen=True)
class Written:
    """What a job did."""

    path: Path | str  # the address of a store is text
    shards: int
    nbytes: int
    resumed: int
    rounding: Rounding = field(default_factory=dict)  # of quantised matrices: see `plan.rounding`


def write_plan(
    plan: Plan,
    output: str | Path,
    options: WriteOptions = WriteOptions(),
    *,
    watch: JobControl | None = None,
    make_executor: MakeExecutor | None = None,
    promise: Promise | None = None,
) -> Written:
    """Write `plan` to the directory `output`.

    `make_executor()` gives any `concurrent.futures.Executor` of processes that see the same directories, and is asked
    again where its workers died; threads of this process by default. `promise`: what the output must be to the byte.
    Raises OutputError where the output exists, equals an input, does not fit, or is not what was promised.
    """
    output = Path(os.path.abspath(output))
    tasks, identity = begin_output(plan, output, force=options.force)
    partial = partial_of(output)
    work = claim(partial, identity, force=options.force)
    try:
        todo = [task for task in tasks if not done(work, task.name, identity)]
        watch = watch or JobControl()
        for task in tasks:
            if task not in todo:
                watch.progress(task.data_bytes)
        write_tasks(plan, todo, work, options, watch, make_executor)
        rounding = together(rounding_of(work, task.name) for task in tasks)
        try:
            write_side_files(
                plan,
                tasks,
                work,
                card=options.card,
                durable=options.durable,
                evidence=options.evidence,
                rounding=rounding,
            )
            check_and_index(
                expected_output(plan, tasks), work, options.jobs, durable=options.durable, checksums=options.checksums
            )
            if promise is not None:
                keep_promise(promise, work, options.jobs)
            check_sources(plan, tasks)
            publish(work, output, force=options.force, durable=options.durable)
        except OSError as error:
            raise disk_error(error, partial) from error
    finally:
        work.release()
    return Written(output, len(tasks), sum(task.data_bytes for task in tasks), len(tasks) - len(todo), rounding)


def partial_of(output: Path) -> Path:
    """Return the folder in which an output is made."""
    return output.with_name(output.name + ".partial")


def begin_output(plan: Plan, output: Path, *, force: bool) -> tuple[list[ShardTask], str]:
    """Check that a plan may be written to `output`, and return its shards and its digest.

    Raises OutputError where it may not, CheckpointError where a side file leads out of the checkpoint.
    """
    recover(output)
    check_output(plan, output, force=force)
    for file in plan.checkpoint.side_files:
        plan.checkpoint.source.local(file)  # a link out of the checkpoint is an error now, not after hours
    tasks = output_tasks(plan)
    return tasks, plan_id(plan, tasks)


def write_tasks(
    plan: Plan,
    todo: list[ShardTask],
    work: WorkFolder,
    options: WriteOptions,
    watch: JobControl,
    make_executor: MakeExecutor | None = None,
) -> None:
    """Write shards into the working folder, several at once. Raises OutputError where they do not fit."""
    workers, threads = _workers(options, todo) if make_executor is None else (1, 1)
    reflink = can_reflink(plan, work)
    manner = Manner(threads, options.link, reflink, options.durable, ahead=AHEAD // workers)
    _check_space(todo, work, manner)
    if make_executor is None:
        write_on_threads(todo, work, manner, watch, workers)
    else:
        arguments = {task.name: (task, work, work.plan_id, manner) for task in todo}
        for name, _ in results_of(make_executor, write_shard, arguments, f"writing {work.path}"):
            watch.progress(arguments[name][0].data_bytes)


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


def check_sources(plan: Plan, tasks: Iterable[ShardTask]) -> None:
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


def can_reflink(plan: Plan, work: WorkFolder) -> bool:
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


def write_on_threads(todo: list[ShardTask], work: WorkFolder, manner: Manner, watch: JobControl, workers: int) -> None:
    """Write shards on threads of this process."""
    if not todo:
        return
    previous_threads = _limit_torch_threads(todo)
    futures: list[Future[int]] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                futures = [pool.submit(write_shard, task, work, work.plan_id, manner, watch) for task in todo]
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except BaseException:
                watch.stop.set()
                raise
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
