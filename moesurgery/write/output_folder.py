"""Whether an output may be written where it is wanted, and whether what is there may be replaced."""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path, PurePosixPath

from moesurgery.checkpoint.filenames import WORK
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import OutputError
from moesurgery.plan.plan import Plan
from moesurgery.write.open_folder import OpenFolder
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
    place = output.resolve()
    if plan.checkpoint.gguf is not None and output.suffix.lower() == ".gguf":
        raise OutputError(
            f"the output {output} is a folder, in which the GGUF has its old name", f"choose one: -o {output.stem}"
        )
    working = re.compile(re.escape(str(place)) + r"\.(partial|replaced-\d+)(/.*)?", re.DOTALL)
    for checkpoint in plan.sources:
        if isinstance(checkpoint.source, LocalSource):
            root = checkpoint.source.root.resolve()
            if root.is_relative_to(place):
                raise OutputError(
                    f"the output {output} is or contains the input {root}", "choose another folder with -o"
                )
            if place.is_relative_to(root) and checkpoint.source.chosen is None:  # a file may lie beside its edits
                raise OutputError(
                    f"the output {output} lies inside the input {root}",
                    f"put it beside the model: -o {shlex.quote(os.path.relpath(root.parent / output.name))}",
                )
            if working.fullmatch(str(root)):
                raise OutputError(
                    f"the input {root} has the name of a folder that a job for {output} makes and deletes",
                    "give it another name, or choose another folder with -o",
                )
    check_place(output, force=force, dry_run=dry_run)


def check_place(output: Path, *, force: bool = False, dry_run: bool = False) -> None:
    """Refuse an output that exists, or has nowhere to be: what can be said before anything is planned."""
    try:
        _check_place(output, force=force, dry_run=dry_run)
    except OSError as error:  # a folder that may not be searched or listed
        raise disk_error(error, output) from error


def _check_place(output: Path, *, force: bool, dry_run: bool) -> None:
    if not output.parent.is_dir():
        command = f"mkdir -p {shlex.quote(str(output.parent))}"
        raise OutputError(f"{output.parent} does not exist", f"make it first: {command}")
    longest = os.pathconf(output.parent, "PC_NAME_MAX") - len(".replaced-4194304")  # what stands beside it for a while
    if len(os.fsencode(output.name)) > longest:
        raise OutputError(
            f"the output's name is {len(os.fsencode(output.name))} bytes long, and may have {longest}:"
            f" {output.name[:40]}…",
            "choose a shorter one with -o",
        )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a directory", "choose another folder with -o")
    if output.exists() and output.samefile(os.curdir):
        raise OutputError(
            f"{output} is the folder you are in, and an output takes the place of its folder",
            f"go up first: cd .., then -o {shlex.quote(output.name)}",
        )
    if not os.access(output.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise OutputError(f"{output.parent} may not be written to", "choose another place with -o")
    if dry_run or not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise OutputError(
            f"{output} exists and is not empty", "choose another folder with -o, or replace it with --force"
        )
    check_replaceable(OpenFolder.open(output))


def check_replaceable(folder: OpenFolder, *, emptied: bool = False) -> list[str]:
    """Return all that an old output consists of, folders before what is in them; refuse what is no part of one.

    `emptied`: some of it has been deleted already, so that folders in it may be empty.
    """
    entries = dict(folder.entries())
    parents = {name.rpartition("/")[0] for name in entries}
    for name, status in entries.items():
        file = PurePosixPath(name)
        is_folder = stat.S_ISDIR(status.st_mode)
        ours = file.parts[0] == WORK and not stat.S_ISLNK(status.st_mode)
        used = is_folder and (name in parents or emptied)  # of an adapter, or of shards that an index names so
        if not ours and not used and not (stat.S_ISREG(status.st_mode) and is_part_of_checkpoint(name)):
            raise OutputError(
                f"--force would delete {folder.path / name}, which is no part of a checkpoint",
                "move it away, or choose another folder",
            )
    return list(entries)


def is_part_of_checkpoint(name: str) -> bool:
    """Whether a file has a name such as those of which a checkpoint consists."""
    file = PurePosixPath(name)
    return file.suffix.lower() in _CHECKPOINT_SUFFIXES or file.name in _CHECKPOINT_NAMES
