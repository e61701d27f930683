"""One job written by several processes, on one machine or on many that share a filesystem.

Each process plans the whole job and writes its part of the shards into the `OUT.partial` that all share. The first
of them also writes config, side files, and what remains to be done when all shards are there (`job.json`), so that
any process can do that, without a plan, from any folder.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moesurgery.checkpoint.filenames import WORK
from moesurgery.errors import OutputError, RecipeError
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import together
from moesurgery.write.claim import BusyError, WorkFolder, busy, claim, join, reopen, share
from moesurgery.write.expected_output import (
    ExpectedOutput,
    ExpectedShard,
    check_and_index,
    expected_output,
    write_side_files,
)
from moesurgery.write.job_control import JobControl
from moesurgery.write.output_folder import check_output
from moesurgery.write.publish import publish, recover
from moesurgery.write.shard import ShardTask, disk_error
from moesurgery.write.shard_manifest import done, rounding_of
from moesurgery.write.write_plan import (
    WriteOptions,
    Written,
    begin_output,
    check_sources,
    partial_of,
    write_tasks,
)

_JOB = f"{WORK}/job.json"
_MOST_JOB = 1 << 30
_TRIES, _PAUSE = 600, 0.1  # how often, and in what distance in seconds, the first process is waited for


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1 on."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `2/16`. Raises RecipeError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise RecipeError(
                f"--part {text} is not I/N with I from 1 to N", "for the second of 16 parts type --part 2/16"
            )
        return cls(int(match[1]), int(match[2]))

    def of(self, tasks: list[ShardTask]) -> list[ShardTask]:
        """Return this part of the shards: the largest are dealt out first, each to the part with the fewest bytes."""
        sizes = [0] * self.count
        mine = set()
        for task in sorted(tasks, key=lambda task: (-task.data_bytes, task.name)):
            least = min(range(self.count), key=lambda i: sizes[i])
            sizes[least] += max(task.data_bytes, 1)
            if least == self.number - 1:
                mine.add(task.name)
        return [task for task in tasks if task.name in mine]


@dataclass(frozen=True)
class PartWritten:
    """What a part did: shards and bytes of its own, those found done, and how many shards of the job are missing.

    `path` is the output where it was published, and the working folder where it was not.
    """

    path: Path
    shards: int
    nbytes: int
    resumed: int
    missing: int
    published: bool


def write_part(
    plan: Plan,
    output: str | Path,
    part: Part,
    options: WriteOptions | None = None,
    *,
    finish: bool = False,
    group: int | None = None,
    watch: JobControl | None = None,
) -> PartWritten:
    """Write one part of a plan into the working folder of `output`, and leave it there for the others.

    With `finish`, the part that finds all shards written publishes the output. `group`: id of the Unix group whose
    members write parts, too. Parts always wait for the disk. Raises OutputError where the folder holds another job or
    one of other inputs, and as `write_plan` does.
    """
    output = Path(os.path.abspath(output))
    options = replace(options or WriteOptions(), durable=True)
    tasks, identity = begin_output(plan, output, force=options.force)
    work = _enter(plan, tasks, identity, output, options, group)
    watch = watch or JobControl()
    try:
        mine = part.of(tasks)
        watch.expect(sum(task.data_bytes for task in mine))
        todo = [task for task in mine if not done(work, task.name, identity)]
        for task in mine:
            if task not in todo:
                watch.progress(task.data_bytes)
        write_tasks(plan, todo, work, options, watch)
        check_sources(plan, tasks)
        missing = sum(not done(work, task.name, identity) for task in tasks)
    finally:
        work.release()
    published = finish and not missing and _finish_last(output, options, group)
    where = output if published else partial_of(output)
    return PartWritten(
        where, len(mine), sum(task.data_bytes for task in mine), len(mine) - len(todo), missing, published
    )


def finish_parts(output: str | Path, options: WriteOptions | None = None, *, group: int | None = None) -> Written:
    """Check that all shards of a job in parts are written, and publish its output.

    Raises OutputError where shards are missing, where a part is still being written, or where there is no such job.
    """
    options = options or WriteOptions()
    output = Path(os.path.abspath(output))
    recover(output)
    partial = partial_of(output)
    work = reopen(partial, group=group)
    try:
        expected = _read_job(work)
        missing = [shard.name for shard in expected.shards if not done(work, shard.name, work.plan_id)]
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise OutputError(
                f"{len(missing)} of {len(expected.shards)} shards of {partial} are missing: {names}",
                "run the parts again that did not end well; shards that are there are kept",
            )
        rounding = together(rounding_of(work, shard.name) for shard in expected.shards)
        try:
            check_and_index(expected, work, options.jobs, durable=True, checksums=options.checksums)
            publish(work, output, force=options.force, durable=True)
        except OSError as error:
            raise disk_error(error, partial) from error
    finally:
        work.release()
    return Written(output, len(expected.shards), expected.nbytes, len(expected.shards), rounding)


def _finish_last(output: Path, options: WriteOptions, group: int | None) -> bool:
    """Publish a job of which all shards are written; return False where another part does, or did."""
    for _ in range(_TRIES):
        try:
            finish_parts(output, options, group=group)
            return True
        except BusyError:
            time.sleep(_PAUSE)  # another part has not left yet
        except OutputError:
            if partial_of(output).exists():
                raise
            return False
    return False


def _enter(
    plan: Plan, tasks: list[ShardTask], identity: str, output: Path, options: WriteOptions, group: int | None
) -> WorkFolder:
    """Join the working folder, or make it as the first part."""
    partial = partial_of(output)
    for _ in range(_TRIES):
        work = join(partial, identity, group=group)
        if work is not None and work.exists(_JOB):
            return work
        if work is not None:
            work.release()
        try:
            work = claim(partial, identity, force=False, in_parts=True, group=group)
        except BusyError:
            time.sleep(_PAUSE)  # the first part is making it
            continue
        try:
            if not work.exists(_JOB):
                try:
                    check_output(plan, output, force=options.force)
                except OutputError:
                    work.discard()  # the same part was started twice, and the other has published meanwhile
                    raise
                write_side_files(plan, tasks, work, card=options.card, durable=True, evidence=options.evidence)
                _write_job(expected_output(plan, tasks), work)
            share(work)
        except BaseException:
            work.release()
            raise
        return work
    raise busy(partial)


def _write_job(expected: ExpectedOutput, work: WorkFolder) -> None:
    content = json.dumps(asdict(expected)).encode()
    work.write(f"{_JOB}.tmp", [content], durable=True)
    work.replace(f"{_JOB}.tmp", _JOB)


def _read_job(work: WorkFolder) -> ExpectedOutput:
    try:
        stored = json.loads(work.read(_JOB, _MOST_JOB))
        shards = tuple(ExpectedShard(**shard) for shard in stored["shards"])
        return ExpectedOutput(shards, stored["index"], stored["provenance"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise OutputError(
            f"{work.path} is no job in parts: {_JOB} in it cannot be read",
            "run the command that was writing it once more, or delete the folder",
        ) from None
