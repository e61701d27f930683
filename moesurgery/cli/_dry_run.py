"""`--dry-run`: what writing would do, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._exit_codes import FAILED
from moesurgery.cli._step_report import report_steps, steps_document
from moesurgery.cli._writer_flags import WriterFlags
from moesurgery.expr.nodes import Copy
from moesurgery.plan.plan import Plan
from moesurgery.write.card import config_changes
from moesurgery.write.object_store import open_store
from moesurgery.write.remote_output import scratch_needed
from moesurgery.write.shard_layout import output_tasks
from moesurgery.write.write_plan import bytes_needed


def dry_run(plan: Plan, output: Path, flags: WriterFlags, more: Mapping[str, Any]) -> None:
    """Print what writing would do: tensors by kind, config changes, bytes, memory, free space.

    `more` joins the JSON answer. Ends the command where the output does not fit.
    """
    tasks = output_tasks(plan)
    if flags.store is not None:
        needed = scratch_needed(tasks, linked=flags.link)
        exists = bool(open_store(flags.store).files())
    else:
        needed = sum(bytes_needed(task, linked=flags.link) for task in tasks)
        exists = output.exists() and any(output.iterdir())
    where = flags.store or str(output)
    if exists and not flags.force:
        console.warning(f"{where} exists and is not empty: writing needs --force, or another -o")
    place = Path(os.path.abspath(output)).parent
    status = os.statvfs(place if place.exists() else ".")
    free = status.f_bavail * status.f_frsize
    kinds, computed, memory = _tensors_by_kind(plan)
    changes = config_changes(plan)
    written = plan.nbytes + plan.companion_nbytes
    if flags.as_json:
        document = {
            "schema_version": 1,
            "output": where,
            "output_exists": exists,
            "shards": len(tasks),
            "tensors": kinds,
            "bytes_written": written,
            "bytes_computed": computed,
            "bytes_of_new_disk_space": needed,
            "bytes_free": free,
            "peak_memory_per_thread": memory,
            "config_changes": [{"key": k, "old": a, "new": b} for k, a, b in changes],
            "steps": steps_document(plan),
            **more,
        }
        console.json(document)
    else:
        report_steps(plan, flags)
        console.result(f"would write {where}: {len(tasks)} shards, {human_bytes(written)}")
        console.result("tensors: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count))
        for key, old, new in changes:
            console.result(f"config.json: {key}: {ascii_json(old, indent=None)} -> {ascii_json(new, indent=None)}")
        console.result(
            f"computed: {human_bytes(computed)}; new disk space: {human_bytes(needed)} of {human_bytes(free)} free"
        )
        if computed:
            console.result(f"memory: about {human_bytes(memory)} per thread besides the interpreter and torch")
    if needed > free:
        console.error("it does not fit", "free some space, use --link, or choose another disk with -o")
        raise typer.Exit(FAILED)


def _tensors_by_kind(plan: Plan) -> tuple[dict[str, int], int, int]:
    """Return how many tensors there are of each kind, the bytes to compute, and those that a thread needs for that."""
    unchanged = set(plan.untouched())
    kinds = {"unchanged": len(unchanged), "byte ranges": 0, "computed": 0}
    computed, memory = 0, 1 << 21
    for name, expr in plan.tensors.items():
        if name in unchanged:
            continue
        if all(isinstance(piece, Copy) for piece in expr.pieces()):
            kinds["byte ranges"] += 1
            continue
        kinds["computed"] += 1
        computed += expr.nbytes
        memory = max(memory, expr.memory)
    kinds["dropped"] = len(plan.checkpoint.tensors.keys() - plan.tensors.keys())
    kinds["new"] = len(plan.tensors.keys() - plan.checkpoint.tensors.keys())
    return kinds, computed, memory
