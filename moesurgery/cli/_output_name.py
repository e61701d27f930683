"""What an output is called without -o: the model and what was done, `Mixtral-8x7B-rescale-k3`, and where it lies."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from moesurgery.checkpoint.source import LocalSource
from moesurgery.plan.plan import Plan, Step

_MOST_STEPS = 3


def default_output(plan: Plan) -> Path:
    """Return a folder where one is, or beside the model where that would lie inside it."""
    name, here = default_name(plan), Path.cwd().resolve()
    roots = [c.source.root.resolve() for c in plan.sources if isinstance(c.source, LocalSource)]
    around = [root for root in roots if here.is_relative_to(root)]
    if not around:
        return Path(name)
    outermost = min(around, key=lambda root: len(root.parts))
    return Path(os.path.relpath(outermost.parent, here)) / name


def default_name(plan: Plan) -> str:
    """Name an output after the model and its first steps."""
    model = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", plan.checkpoint.name)).lstrip("-")
    return "-".join((model or "model", *map(_done, plan.steps[:_MOST_STEPS])))


def _done(step: Step) -> str:
    """Say what a step did: `drop-96of384`, `upcycle-8x`."""
    given, report = step.parameters, step.report
    old, new = report.get("old_experts"), report.get("experts")
    match step.operation:
        case "rescale" if "top_k" in given:
            return f"rescale-k{given['top_k']}"
        case "drop-experts" if isinstance(old, int) and isinstance(new, int):
            return f"drop-{old - new}of{old}"
        case "merge-experts" if isinstance(old, int) and isinstance(new, int):
            return f"merge-{old}to{new}"
        case "add-expert" if isinstance(old, int) and isinstance(new, int):
            return f"add-{new - old}to{old}"
        case "upcycle" if isinstance(given.get("experts"), int):
            return f"upcycle-{given['experts']}x"
        case "to-dense" if isinstance(given.get("expert"), int | str):
            return f"to-dense-{given['expert']}"
        case "convert":
            words = [str(given[key]) for key in ("layout", "dtype") if isinstance(given.get(key), str)]
            return "-".join(("convert", *words, *(["plain"] if given.get("dequantize") else [])))
        case "tie-blocks" if report.get("blocks"):
            return f"tie-{len(report['blocks'])}of{len(report['layer_tie_map'])}"
    return re.sub(r"[^\w.-]+", "-", step.operation)
