"""The model card and the provenance record: what was done, to what, by which version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.filenames import CARD
from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.plan.plan import Plan, Step
from moesurgery.write.source_names import SourceNames

_SCHEMA_VERSION = 1
_MOST_CARD = 1 << 20
LICENCE_KEYS = ("license", "license_name", "license_link")
MADE_WITH = "Made with moesurgery"


def recipe_from_steps(plan: Plan) -> dict[str, Any]:
    """Return the recipe that makes this plan, as data: model, steps and what changes the files."""
    parents = SourceNames(plan.sources)
    recipe: dict[str, Any] = {
        "model": plan.checkpoint.source.identity,
        "steps": [{step.operation: parents.parameters(step)} for step in plan.steps],
    }
    if plan.max_shard_size:
        recipe["max_shard_size"] = plan.max_shard_size
    return recipe


def provenance(plan: Plan, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `moesurgery.json` holds. Inputs are named by Hub id or folder name, never by local path.

    `outputs` are the files that were written, with their digests, so that `validate` can tell them from others.
    """
    return {
        "schema_version": _SCHEMA_VERSION,
        "tool": "moesurgery",
        "version": __version__,
        "recipe": recipe_from_steps(plan),
        "inputs": [
            {
                "name": name,
                "identity": checkpoint.source.identity,
                "shards": [
                    {"file": h.file, "size": h.file_size, "header_sha256": h.digest} for h in checkpoint.headers
                ],
            }
            for name, checkpoint in SourceNames(plan.sources)
        ],
        "steps": [
            {
                "operation": s.operation,
                "summary": s.summary,
                "notes": list(s.notes),
                "warnings": warnings_of(s),
                "report": dict(s.report),
            }
            for s in plan.steps
        ],
        "outputs": outputs,
        "config_changes": [{"key": key, "old": old, "new": new} for key, old, new in config_changes(plan)],
    }


def config_changes(plan: Plan) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) for everything the plan changes in config.json."""
    return list(json_differences(plan.checkpoint.config, plan.config, ""))


def json_differences(old: Any, new: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) wherever two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from json_differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):  # 1 is not true, NaN is itself
        yield path, old, new


def card_text(plan: Plan, evidence: str = "", rounding: Sequence[str] = ()) -> str:
    """Return README.md: front matter for the Hub, then the steps in words, the recipe, and `evidence` in Markdown.

    `rounding`: lines that say how far quantised matrices are rounded.
    """
    import yaml

    names = [name for name, _ in SourceNames(plan.sources)]
    parents = [name.removeprefix("./").removeprefix("hf://").split("@")[0] for name in names]
    hub = [parent for name, parent in zip(names, parents, strict=True) if name.startswith("hf://")]
    gguf = plan.checkpoint.gguf is not None
    front: dict[str, Any] = {"library_name": "gguf" if gguf else "transformers", "tags": ["moe", "moesurgery"]}
    if hub:
        front["base_model"] = hub
    front |= _licence(plan)
    if len(parents) > 1:
        front["base_model_relation"] = "merge"
        front["tags"].insert(0, "merge")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {parents[0].rsplit('/', 1)[-1]}, edited",
        "",
    ]
    lines.append(f"{MADE_WITH} {__version__} from {', '.join(parents)}.")
    for step in plan.steps:
        lines += ["", *_step_lines(step)]
    if rounding:
        lines += ["", "## Rounding", "", *(f"* {line}" for line in rounding)]
    changes = config_changes(plan)
    if changes:
        lines += [
            "",
            f"## Changes to {'the metadata' if gguf else 'config.json'}",
            "",
            "| key | before | after |",
            "| --- | --- | --- |",
        ]
        lines += [f"| `{k}` | `{ascii_json(a, indent=None)}` | `{ascii_json(b, indent=None)}` |" for k, a, b in changes]
    recipe = yaml.safe_dump(recipe_from_steps(plan), sort_keys=False, allow_unicode=True).strip()
    lines += ["", "## Recipe", "", "```yaml", recipe, "```", "", *([evidence] if evidence else [])]
    return "\n".join(lines)


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    """Return what the front matter of a README.md says, and the rest; nothing of one that is not a YAML mapping."""
    import yaml

    match = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|\Z)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        stated = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, card
    return (stated, card[match.end() :]) if isinstance(stated, dict) else ({}, card)


def with_front_matter(front: dict[str, Any], body: str) -> str:
    """Return a README.md of front matter and text."""
    import yaml

    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---\n{body}"


def _licence(plan: Plan) -> dict[str, str]:
    """Return the licence that the cards of all models state, as front matter; nothing where they differ."""
    stated = []
    for checkpoint in plan.sources:
        size = checkpoint.file_sizes.get(CARD, 0)
        text = checkpoint.source.read(CARD, 0, min(size, _MOST_CARD)).decode(errors="replace") if size else ""
        front, _ = front_matter(text)
        stated.append({key: front[key] for key in LICENCE_KEYS if isinstance(front.get(key), str)})
    return stated[0] if stated and all(each == stated[0] for each in stated) else {}


def warnings_of(step: Step) -> list[str]:
    """Return a step's warnings with the recipe file by its name alone."""
    if not step.origin:
        return list(step.warnings)
    return [warning.replace(step.origin, PurePath(step.origin).name, 1) for warning in step.warnings]


def _step_lines(step: Step) -> list[str]:
    lines = [f"## {step.operation}", "", step.summary]
    for text in (*step.details, *step.notes, *warnings_of(step)):
        lines += ["", text]
    return lines
