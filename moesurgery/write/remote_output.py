"""Writing a plan to an object store or to the Hub, with two shards of disk space.

Each shard is written into a scratch folder, uploaded, checked, and deleted here while the next one is written. What
was uploaded is noted in that folder, so that the same command resumes. Config and index come last: until then what is
there is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.digest import whole_digest
from moesurgery.checkpoint.filenames import CARD, CONFIG, INDEX, PROVENANCE, WORK
from moesurgery.cpu_count import cores
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import together
from moesurgery.write.claim import WorkFolder, claim
from moesurgery.write.expected_output import (
    ExpectedShard,
    checked_shard,
    expected_output,
    write_record,
    write_side_files,
)
from moesurgery.write.job_control import JobControl
from moesurgery.write.object_store import Store, open_store
from moesurgery.write.output_folder import is_part_of_checkpoint
from moesurgery.write.shard import Manner, ShardTask, disk_error
from moesurgery.write.shard_layout import output_tasks
from moesurgery.write.shard_manifest import work_name
from moesurgery.write.write_plan import (
    WriteOptions,
    Written,
    bytes_needed,
    can_reflink,
    check_sources,
    partial_of,
    plan_id,
    write_on_threads,
)

_MOST_NOTE = 1 << 16


def write_remote(
    plan: Plan,
    url: str,
    options: WriteOptions | None = None,
    *,
    scratch: str | Path = ".",
    watch: JobControl | None = None,
) -> Written:
    """Write `plan` to the store `url`: `s3://bucket/name`, `gs://…`, `hf://org/name`, or any that fsspec writes to.

    `scratch`: an existing folder, in which a folder NAME.partial holds two shards at most. With `force` a checkpoint
    that is there is replaced: its config and index are deleted at once, the rest when the new one is complete. Raises
    OutputError where something is there, where the store refuses, or where two shards do not fit.
    """
    options = options or WriteOptions()
    watch = watch or JobControl()
    store = open_store(url)
    if plan.checkpoint.gguf is not None:
        raise OutputError("a GGUF file is written to a folder", "name one with -o, and upload the file")
    _check_inputs(plan, store)
    for file in plan.checkpoint.side_files:
        plan.checkpoint.source.local(file)
    tasks = output_tasks(plan)
    identity = hashlib.sha256(f"{plan_id(plan, tasks)} {store.url}".encode()).hexdigest()
    present = store.files()
    marker = _check_present(plan, tasks, store, present, identity, force=options.force)
    partial = scratch_folder(url, scratch)
    work = claim(partial, identity, force=options.force)
    try:
        uploaded = {task.name: note for task in tasks if (note := _note_of(work, store, task.name, present))}
        todo = [task for task in tasks if task.name not in uploaded]
        if marker not in present:
            try:
                _check_space(todo, partial, options)
                store.begin(marker, sorted(present.keys() & {CONFIG, INDEX}))
            except OutputError:
                work.discard()  # nothing was written
                raise
        for task in tasks:
            if task.name in uploaded:
                work.remove(task.name)
                watch.progress(task.data_bytes)
        expected = expected_output(plan, tasks)
        shards = {shard.name: shard for shard in expected.shards}
        _write_and_upload(plan, todo, shards, work, store, options, watch, uploaded)
        rounding = together(note.get("rounding", {}) for note in uploaded.values())
        write_side_files(
            plan, tasks, work, card=options.card, durable=False, evidence=options.evidence, rounding=rounding
        )
        digests = [_of_provenance(uploaded[task.name], checksums=options.checksums) for task in tasks]
        write_record(expected, digests, work, durable=False)
        check_sources(plan, tasks)
        _finish(store, work, expected.shards, marker)
        work.unlock()
        work.discard()
    except OSError as error:
        raise disk_error(error, partial) from error
    finally:
        work.release()
    return Written(store.url, len(tasks), sum(task.data_bytes for task in tasks), len(tasks) - len(todo), rounding)


def scratch_folder(url: str, scratch: str | Path) -> Path:
    """Return the folder in which shards wait for their upload. Raises OutputError where it has nowhere to be."""
    place = Path(os.path.abspath(scratch))
    if not place.is_dir():
        raise OutputError(f"--scratch {place} does not exist", f"make it first: mkdir -p {shlex.quote(str(place))}")
    return partial_of(place / output_name(url))


def output_name(url: str) -> str:
    """Return the last part of a store's address. Raises OutputError where that is no name."""
    name = url.partition("://")[2].rstrip("/").rpartition("/")[2].partition("@")[0]
    if name in ("", ".", ".."):
        raise OutputError(f"{url} ends in no name", "end it with the name of the model")
    return name


def check_store(url: str, scratch: str | Path, *, force: bool) -> None:
    """Refuse what can be refused before anything is planned: no such store, no right to list it, something is there."""
    store = open_store(url)
    if scratch_folder(url, scratch).exists() or force:
        return  # a job to be resumed: what may be there is known when it is planned
    present = store.files()
    if present and not any(name.startswith(f"{WORK}/") for name in present):
        raise _exists(store, present)


def scratch_needed(tasks: list[ShardTask], *, linked: bool) -> int:
    """Return the space in bytes that the two largest shards take."""
    return sum(sorted((bytes_needed(task, linked=linked) for task in tasks), reverse=True)[:2])


_BEGUN, _REPLACE = f"{WORK}/upload-", f"{WORK}/replace-"  # of markers; the second where an old output is replaced


def _check_present(
    plan: Plan, tasks: list[ShardTask], store: Store, present: dict[str, int], identity: str, *, force: bool
) -> str:
    """Return the name of this job's marker; refuse a place where anything is that this job did not put there."""
    if (marker := _REPLACE + identity) in present:
        return marker
    ours = {task.name for task in tasks} | set(plan.checkpoint.side_files) | plan.files.keys()
    ours |= {CONFIG, CARD, PROVENANCE, INDEX, _BEGUN + identity}
    foreign = sorted(present.keys() - ours)
    if not present or (_BEGUN + identity in present and not foreign):
        return _BEGUN + identity
    if not force:
        if _BEGUN + identity in present:
            raise OutputError(
                f"{store.url}/{foreign[0]} came there meanwhile, and is no part of this output",
                "move it away, or delete what the output does not have with --force",
            )
        if any(name.startswith((_BEGUN, _REPLACE)) for name in present):
            raise OutputError(
                f"{store.url} holds an unfinished upload of another recipe or of changed inputs",
                "finish that one, delete what is there, or start over with --force",
            )
        raise _exists(store, present)
    for name in present:
        if not name.startswith(f"{WORK}/") and not is_part_of_checkpoint(name):
            raise OutputError(
                f"--force would delete {store.url}/{name}, which is no part of a checkpoint",
                "move it away, or choose another place",
            )
    return marker


def _exists(store: Store, present: dict[str, int]) -> OutputError:
    return OutputError(
        f"{store.url} exists and holds {len(present)} files, such as {min(present)}",
        "choose another place with -o, or replace it with --force",
    )


def _check_inputs(plan: Plan, store: Store) -> None:
    """Refuse a place that is, contains or lies inside an input."""
    for checkpoint in plan.sources:
        source = checkpoint.source.identity.split("@")[0].rstrip("/") + "/"
        target = store.url.split("@")[0] + "/"
        if source.startswith(target) or target.startswith(source):
            raise OutputError(
                f"the output {store.url} is, contains or lies inside the input {checkpoint.source.identity}",
                "choose another place with -o",
            )


def _check_space(todo: list[ShardTask], partial: Path, options: WriteOptions) -> None:
    needed = scratch_needed(todo, linked=options.link)
    status = os.statvfs(partial)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise OutputError(
            f"two shards need {needed / 1e9:.2f} GB, {partial.parent} has {free / 1e9:.2f} GB free",
            "choose another disk with --scratch, or write smaller shards, such as --max-shard-size 1GB",
        )


def _write_and_upload(
    plan: Plan,
    todo: list[ShardTask],
    shards: dict[str, ExpectedShard],
    work: WorkFolder,
    store: Store,
    options: WriteOptions,
    watch: JobControl,
    uploaded: dict[str, dict[str, Any]],
) -> None:
    """Write one shard while the one before is uploaded, and note in `uploaded` what is there."""
    threads = options.jobs or min(cores(), 8)
    manner = Manner(threads, link=options.link, reflink=can_reflink(plan, work), durable=options.durable)
    pool = ThreadPoolExecutor(1)
    running: Future[None] | None = None
    wait = True

    def send(name: str) -> None:
        uploaded[name] = _upload(store, work, shards[name])

    try:
        for task in todo:
            write_on_threads([task], work, manner, watch, 1)
            if running is not None:
                running.result()
            running = pool.submit(send, task.name)
        if running is not None:
            running.result()
    except KeyboardInterrupt:
        wait = False  # an upload of gigabytes may take minutes
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=not wait)


def _upload(store: Store, work: WorkFolder, shard: ExpectedShard) -> dict[str, Any]:
    """Upload one finished shard, note that, and delete it here."""
    digests = checked_shard(work, shard, checksums=False)
    digests["sha256"] = whole_digest(work.source, shard.name, shard.size)
    store.upload(work.source.local(shard.name), shard.name, digests["sha256"])
    note = {"plan": work.plan_id, "state": store.state(shard.name), **digests}
    name = _note_name(shard.name)
    work.write(f"{name}.tmp", [json.dumps(note).encode()], durable=True)
    work.replace(f"{name}.tmp", name)
    work.remove(shard.name)
    return note


def _note_name(shard: str) -> str:
    return f"{WORK}/{work_name(shard)}.uploaded.json"


def _note_of(work: WorkFolder, store: Store, name: str, present: dict[str, int]) -> dict[str, Any] | None:
    """Return what was noted of a shard that is uploaded, and is still what was uploaded; None for any other."""
    try:
        note = json.loads(work.read(_note_name(name), _MOST_NOTE))
        same = note["plan"] == work.plan_id and note["size"] == present.get(name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return note if same and note.get("state") == store.state(name) else None


def _of_provenance(note: dict[str, Any], *, checksums: bool) -> dict[str, Any]:
    """Return what the provenance says of a shard: the same as of one that is written to a folder."""
    left_out = {"plan", "state"} if checksums else {"plan", "state", "sha256"}
    return {key: value for key, value in note.items() if key not in left_out}


def _finish(store: Store, work: WorkFolder, shards: tuple[ExpectedShard, ...], marker: str) -> None:
    """Check that all shards are there; then upload what goes with them, config and index last."""
    present = store.files()
    missing = [shard.name for shard in shards if present.get(shard.name) != shard.size]
    if missing:
        raise OutputError(
            f"{store.url}: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} no longer what was uploaded",
            "see that nobody else writes there, then run the same command again",
        )
    names = [name for name, _ in work.entries() if work.is_file(name) and not name.startswith(f"{WORK}/")]
    paths = {name: work.source.local(name) for name in names}
    last = {name: paths.pop(name) for name in (CONFIG, INDEX) if name in paths}
    kept = {marker, *names, *(shard.name for shard in shards)}
    stale = sorted(present.keys() - kept) if marker.startswith(_REPLACE) else []
    store.finish(paths, last, stale, marker)
