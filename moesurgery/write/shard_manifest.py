"""The manifest of a finished shard: what file it is, of which plan. An interrupted job goes on by what it says."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moesurgery.checkpoint.digest import sampled_digest
from moesurgery.checkpoint.filenames import WORK
from moesurgery.errors import CheckpointError, SurgeryError
from moesurgery.plan.rounding import Rounding
from moesurgery.write.open_folder import OpenFolder

TRIES = 10  # where a shard was put there once more by another process of the same part
_MOST_MANIFEST = 1 << 16
_T = TypeVar("_T")


def done(folder: OpenFolder, name: str, plan_id: str) -> bool:
    """Whether shard `name` of this very plan is already complete in the working folder.

    It must be the file that was written: its size, the times of its last change (of which the kernel decides one) and
    64 blocks of it are in its manifest. What was written without waiting for the disk counts only until the machine
    restarts.
    """
    try:
        manifest = json.loads(folder.read(f"{WORK}/{work_name(name)}.json", _MOST_MANIFEST))
        safe = manifest["boot"] is None or manifest["boot"] == boot_id()
        return bool(safe and manifest == _manifest(folder, name, plan_id, manifest["boot"], manifest["rounding"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SurgeryError):
        return False


def tried_again(read: Callable[[], _T]) -> _T:
    """Return what `read` finds in a finished shard, which another process of the same part may put there once more."""
    for _ in range(TRIES):
        try:
            return read()
        except CheckpointError:
            continue
    return read()


def work_name(name: str) -> str:
    """Return what files about a shard are called: its name, or a digest of one that leaves no room for an ending."""
    return name if len(os.fsencode(name)) <= 100 else hashlib.sha256(os.fsencode(name)).hexdigest()


def rounding_of(folder: OpenFolder, name: str) -> Rounding:
    """Return how far the quantised matrices of a finished shard are rounded: see `plan.rounding`."""
    found: Rounding = json.loads(folder.read(f"{WORK}/{work_name(name)}.json", _MOST_MANIFEST))["rounding"]
    return found


def _manifest(folder: OpenFolder, name: str, plan_id: str, boot: str | None, rounding: Rounding) -> dict[str, Any]:
    status = folder.status(name)
    return {
        "plan": plan_id,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "sampled_sha256": sampled_digest(folder.source, name, status.st_size),
        "boot": boot,
        "rounding": rounding,
    }


def boot_id() -> str:
    """Name this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_manifest(folder: OpenFolder, name: str, plan_id: str, rounding: Rounding, *, durable: bool) -> None:
    """Note that a shard of a plan is complete; where the disk was not waited for, for this run of the machine alone."""
    manifest = _manifest(folder, name, plan_id, None if durable else boot_id(), rounding)
    temporary = f"{WORK}/{work_name(name)}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    folder.write(temporary, [json.dumps(manifest).encode()], durable=durable)
    folder.replace(temporary, f"{WORK}/{work_name(name)}.json")
