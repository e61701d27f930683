"""What a command chose, as a plan file: experts by layer with their scores, criterion, digests of model and text.

The format is described in docs/plan-file.md; `stats.plan_file` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_BY_LINE = ("layers", "ffns")


def plan_document(before: Plan, step: Step) -> dict[str, Any]:
    """Return the plan file of what `step` chose on the plan `before` it. Reads the routers."""
    made_of = step.report.get("statistics") or {k: v for k, v in step.report.get("fit", {}).items() if k != "layers"}
    return plan_of_steps(before, [step], step.operation, SourceNames(before.sources).parameters(step), made_of)


def plan_of_steps(
    before: Plan, steps: Sequence[Step], operation: str, criterion: Mapping[str, Any], made_of: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the plan file of what several steps chose by the experts' numbers on the plan `before` them all.

    `made_of` says what was measured on which text, as statistics do. Reads the routers.
    """
    ((name, _), *_) = SourceNames(before.sources)
    experts = {block.where: block.experts for block in before.anatomy.blocks}
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "operation": operation,
        "criterion": criterion,
        "model": {
            "name": name,
            "model_type": before.anatomy.model_type,
            "digest": fingerprint(before),
            "routers": router_digest(before),
        },
        "text": made_of.get("text", []),
    }
    if made_of:
        document["statistics"] = {key: value for key, value in made_of.items() if key != "text"}
    layers: dict[str, dict[str, Any]] = {}
    ffns: dict[str, dict[str, Any]] = {}
    for step in steps:
        for layer in step.report.get("layers", ()):
            layers.setdefault(layer["layer"], {"experts": experts[layer["layer"]]}).update(_choice(layer))
        for where, kept in step.neurons.items():
            entry = (layers if where in experts else ffns).setdefault(where, {"experts": len(kept)})
            entry["neurons"] = {str(expert): list(own) for expert, own in enumerate(kept)}
    return document | {"layers": layers} | ({"ffns": ffns} if ffns else {})


def _choice(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step's report says of one layer, under the keys of a plan file."""
    keys = {"kept": "keep", "groups": "groups", "shares": "shares", "scores": "scores"}
    return {name: layer[key] for key, name in keys.items() if key in layer}


def _text(document: Mapping[str, Any]) -> str:
    """Return a plan file as text, each layer on a line of its own."""
    parts = [write_json({key: value for key, value in document.items() if key not in _BY_LINE}).removesuffix("\n}\n")]
    for key in (key for key in _BY_LINE if key in document):
        lines = [f"    {compact_json(where)}: {compact_json(entry)}" for where, entry in document[key].items()]
        parts.append(f'  "{key}": {{\n' + ",\n".join(lines) + "\n  }")
    return ",\n".join(parts) + "\n}\n"


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
