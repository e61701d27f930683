"""What a command chose, as a plan file: experts by layer with their scores, criterion, digests of model and text.

The format is described in docs/plan-file.md; `stats.plan_file` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.strict_json import compact_json, write_json
from moesurgery.errors import OutputError
from moesurgery.plan.fingerprint import fingerprint, router_digest
from moesurgery.plan.plan import Plan, Step
from moesurgery.stats.plan_file import FORMAT
from moesurgery.whole_file import whole_file
from moesurgery.write.source_names import SourceNames


def plan_document(before: Plan, step: Step) -> dict[str, Any]:
    """Return the plan file of what `step` chose on the plan `before` it. Reads the routers."""
    names = SourceNames(before.sources)
    experts = {block.where: block.experts for block in before.anatomy.blocks}
    statistics: Mapping[str, Any] = step.report.get("statistics", {})
    ((name, _), *_) = names
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "operation": step.operation,
        "criterion": names.parameters(step),
        "model": {
            "name": name,
            "model_type": before.anatomy.model_type,
            "digest": fingerprint(before),
            "routers": router_digest(before),
        },
        "text": statistics.get("text", []),
    }
    if statistics:
        document["statistics"] = {key: value for key, value in statistics.items() if key != "text"}
    document["layers"] = {
        layer["layer"]: {"experts": experts[layer["layer"]], **_choice(layer)} for layer in step.report["layers"]
    }
    return document


def _choice(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step's report says of one layer, under the keys of a plan file."""
    keys = {"kept": "keep", "groups": "groups", "shares": "shares", "scores": "scores", "neurons": "neurons"}
    return {name: layer[key] for key, name in keys.items() if key in layer}


def _text(document: Mapping[str, Any]) -> str:
    """Return a plan file as text, each layer on a line of its own."""
    layers = [f"    {compact_json(where)}: {compact_json(entry)}" for where, entry in document["layers"].items()]
    head = write_json({key: value for key, value in document.items() if key != "layers"})
    return head.removesuffix("\n}\n") + ',\n  "layers": {\n' + ",\n".join(layers) + "\n  }\n}\n"


def save_plan_document(document: Mapping[str, Any], path: Path, *, force: bool) -> bool:
    """Write a plan file; return False where just this is there already.

    Raises OutputError where something else is there, unless `force`, or where nothing can be written.
    """
    text = _text(document)
    if path.exists() and not force:
        try:
            there = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            there = ""
        if there == text:
            return False
        raise OutputError(
            f"{path} exists and holds something else than this choice",
            "name another file; --force replaces it; to carry out the plan that it holds, give --plan without what"
            " chooses (--keep, --count, --to, …)",
        )
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")
    return True
