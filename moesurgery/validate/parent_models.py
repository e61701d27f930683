"""Which of the models given to `--against` is which that the provenance names.

By the name it was given (`NAME=MODEL`), by its own name, by the digests of its headers, and by order, whichever comes
first. Nothing that the record alone names is ever opened: it may be a stranger's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.filenames import ADAPTER_CONFIG as ADAPTER
from moesurgery.checkpoint.filenames import PROVENANCE
from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.source_address import open_source
from moesurgery.lora.apply import LoraAdapter
from moesurgery.validate.check import finding


@dataclass(frozen=True)
class Recorded:
    """A model, an adapter or another file that the provenance names, with the digests of its headers."""

    name: str
    headers: frozenset[str] = frozenset()

    @property
    def short(self) -> str:
        return self.name.removeprefix("./")


@dataclass
class Parents:
    """What to open for each name, and what is wrong with that."""

    where: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def recorded_models(record: Mapping[str, Any]) -> list[Recorded]:
    """Return the inputs of a provenance record, the edited model or the base of a merge first."""
    models = []
    inputs = record.get("inputs")
    for entry in inputs if isinstance(inputs, list) else []:
        if not isinstance(entry, dict):
            continue
        name, shards = entry.get("name", entry.get("identity")), entry.get("shards")
        stated = [s.get("header_sha256") for s in shards if isinstance(s, dict)] if isinstance(shards, list) else []
        if isinstance(name, str):
            models.append(Recorded(name, frozenset(d for d in stated if isinstance(d, str))))
    return models or [Recorded("./model")]


class Given:
    """One `--against`. Raises CheckpointError where there is no such model, adapter or file."""

    def __init__(self, text: str) -> None:
        name, sign, reference = text.partition("=")
        alone = not sign or "://" in name or os.path.exists(text)
        self.name: str | None = None if alone else name
        self.reference = text if alone else reference
        self.identity = Path(self.reference).name if self._file else open_source(self.reference).identity

    @property
    def _file(self) -> bool:
        return os.path.isfile(self.reference) and not self.reference.lower().endswith(".gguf")

    @cached_property
    def headers(self) -> frozenset[str]:
        """The digests of its headers; none for a file of another kind."""
        if self._file:
            return frozenset()
        adapter = ADAPTER in open_source(self.reference).files()
        checkpoint = LoraAdapter(self.reference).checkpoint if adapter else open_checkpoint(self.reference)
        return frozenset(header.digest for header in checkpoint.headers)


def matched(wanted: Sequence[Recorded], given: Sequence[Given]) -> Parents:
    """Find what was given for each name in `wanted`. Raises CheckpointError where something is no checkpoint."""
    parents = Parents()
    chosen: dict[str, Given] = {}
    rest = []
    for each in given:
        named = next((e.name for e in wanted if each.name in (e.name, e.short) and e.name not in chosen), None)
        if named is not None:
            chosen[named] = each
        elif each.name is not None:
            parents.findings.append(_not_recorded(f"it names no {each.name}", wanted))
        else:
            rest.append(each)
    for fits in (_same_name, _same_headers, _next):
        for each in list(rest):
            fitting = [e.name for e in wanted if e.name not in chosen and fits(e, each)]
            if fitting and (fits is not _same_headers or len(fitting) == 1):
                chosen[fitting[0]] = each
                rest.remove(each)
    parents.findings += [_not_recorded(f"it names no model for --against {each.reference}", wanted) for each in rest]
    for entry in wanted:
        if entry.name not in chosen:
            hint = f"add --against {entry.name}" if "://" in entry.name else f"add --against {entry.short}=PATH"
            message = f"its recipe needs {entry.short}, which was not given"
            parents.findings.append(finding("R01", message, PROVENANCE, hint=hint))
            continue
        each = chosen[entry.name]
        parents.where[entry.name] = each.reference
        if entry.headers and entry.headers != each.headers:
            message = f"the headers of {each.reference} are not those of the model that was edited"
            if len(wanted) > 1:
                message += f" as {entry.short}"
            hint = "it may be the same model in other shards; else give the model that moesurgery.json names"
            parents.findings.append(finding("R01", message, PROVENANCE, severity="warning", hint=hint))
    return parents


def reference_of(record: Mapping[str, Any] | None, against: Sequence[str]) -> str | None:
    """Return which of the models given was edited, or is the base of a merge; None where none is."""
    if record is None:
        return Given(against[0]).reference if against else None
    models = recorded_models(record)
    return matched(models, [Given(text) for text in against]).where.get(models[0].name)


def _same_name(entry: Recorded, given: Given) -> bool:
    return given.identity in (entry.name, entry.short)


def _same_headers(entry: Recorded, given: Given) -> bool:
    return bool(given.headers) and entry.headers == given.headers


def _next(entry: Recorded, given: Given) -> bool:
    return True


def _not_recorded(message: str, wanted: Sequence[Recorded]) -> Finding:
    names = ", ".join(entry.short for entry in wanted) or "none"
    return finding("R01", message, PROVENANCE, hint=f"the models that it names: {names}")
