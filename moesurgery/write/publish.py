"""Where a job works and what its output replaces: refusing, claiming and publishing folders.

All work happens in `OUT.partial` beside the output, locked, with a record of the plan; the last thing a job does is
to give that folder the output's name.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from pathlib import Path

from moesurgery.checkpoint.filenames import WORK
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.write import copy_bytes
from moesurgery.write.shard import disk_error

# What `--force` may replace: the files of which a checkpoint consists.
_CHECKPOINT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".json", ".md", ".txt", ".jinja", ".model", ".py", ".bin", ".pt", ".pth", ".gguf"),
        *(".yaml", ".yml", ".tiktoken", ".vocab"),
    )
)
_CHECKPOINT_NAMES = frozenset((".gitattributes", "LICENSE", "NOTICE"))


def check_output(plan: Plan, output: Path, *, force: bool = False, dry_run: bool = False) -> None:
    """Refuse an output that exists, or that is, contains or lies inside an input. A `dry_run` may find one there."""
    for checkpoint in plan.sources:
        if isinstance(checkpoint.source, LocalSource):
            root = checkpoint.source.root.resolve()
            if root.is_relative_to(output.resolve()):
                raise OutputError(
                    f"the output {output} is or contains the input {root}", "choose another folder with -o"
                )
            if output.resolve().is_relative_to(root):
                raise OutputError(
                    f"the output {output} lies inside the input {root}",
                    f"put it beside the model: -o {shlex.quote(os.path.relpath(root.parent / output.name))}",
                )
    check_place(output, force=force, dry_run=dry_run)


def check_place(output: Path, *, force: bool = False, dry_run: bool = False) -> None:
    """Refuse an output that exists, or has nowhere to be: what can be said before anything is planned."""
    try:
        _check_place(output, force=force, dry_run=dry_run)
    except OSError as error:  # a folder that may not be searched or listed
        raise disk_error(error, output) from error


def _check_place(output: Path, *, force: bool, dry_run: bool) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a directory", "choose another folder with -o")
    if output.exists() and output.samefile(os.curdir):
        raise OutputError(
            f"{output} is the folder you are in, and an output takes the place of its folder",
            f"go up first: cd .., then -o {shlex.quote(output.name)}",
        )
    if not output.parent.is_dir():
        command = f"mkdir -p {shlex.quote(str(output.parent))}"
        raise OutputError(f"{output.parent} does not exist", f"make it first: {command}")
    if not os.access(output.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise OutputError(f"{output.parent} may not be written to", "choose another place with -o")
    if dry_run or not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise OutputError(
            f"{output} exists and is not empty", "choose another folder with -o, or replace it with --force"
        )
    _check_replaceable(output)


def _check_replaceable(output: Path) -> None:
    """Refuse to delete what is no part of a checkpoint."""
    for path in output.rglob("*"):
        known = path.suffix.lower() in _CHECKPOINT_SUFFIXES or path.name in _CHECKPOINT_NAMES
        ours = output / WORK in (path, *path.parents) and not path.is_symlink()
        folder = path.is_dir() and any(path.iterdir())  # of an adapter, or of shards that an index names so
        if not ours and (path.is_symlink() or not (folder or (path.is_file() and known))):
            raise OutputError(
                f"--force would delete {path}, which is no part of a checkpoint",
                "move it away, or choose another folder",
            )


def claim(partial: Path, identity: str, *, force: bool) -> int:
    """Make or take over the working directory; return a locked descriptor that keeps others out."""
    if partial.is_symlink() or (partial.exists() and not (partial / WORK).is_dir() and any(partial.iterdir())):
        raise OutputError(
            f"{partial} exists and is no unfinished job of ours", "move it away, or choose another folder"
        )
    record = partial / WORK / "plan"
    try:
        (partial / WORK).mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / WORK / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(error, partial) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OutputError(f"another process is writing {partial}", "wait for it, or choose another folder") from None
    try:
        found = record.read_text() if record.exists() else None
        if found is not None and found != identity:
            if not force:
                raise OutputError(
                    f"{partial} holds an unfinished job of another recipe or of changed inputs",
                    "finish that job, delete the folder, or start over with --force",
                )
            _empty(partial, keep=WORK)
            _empty(partial / WORK, keep="lock")
        for stale in (partial / WORK).rglob("*.tmp"):
            _remove(stale)
        record.with_suffix(".new").write_text(identity)
        os.replace(record.with_suffix(".new"), record)
    except OSError as error:
        os.close(lock)
        raise disk_error(error, partial) from error
    except OutputError:
        os.close(lock)
        raise
    return lock


def _empty(folder: Path, *, keep: str) -> None:
    for path in folder.iterdir():
        if path.name != keep:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder; what a killed process left may be any of them."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, output: Path, *, force: bool, durable: bool) -> None:
    """Give the finished directory its name. Killed at any point, it is whole under one name or the other."""
    replaced: Path | None = None
    if output.exists() and any(output.iterdir()):
        if not force:
            raise OutputError(
                f"{output} appeared while {partial} was written", f"mv {partial} to a place of your choice"
            )
        _check_replaceable(output)  # again: hours may have passed
        replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
        os.rename(output, replaced)
    elif output.exists():
        output.rmdir()
    os.rename(partial, output)
    if durable:
        copy_bytes.sync_directory(output.parent)
    shutil.rmtree(output / WORK)
    if replaced is not None:
        shutil.rmtree(replaced)
