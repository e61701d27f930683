"""Run the checks of the levels that were asked for, and gather what they say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path

from moesurgery.checkpoint.finding import Finding
from moesurgery.checkpoint.scan import Scan, scan_checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.checkpoint.source_address import open_source
from moesurgery.errors import CheckpointError, RecipeError
from moesurgery.families.clients import CLIENTS
from moesurgery.validate.check import CHECKS, NotChecked
from moesurgery.validate.check_gguf import in_gguf_words
from moesurgery.validate.codes import CODES, LEVELS, Level
from moesurgery.validate.context import Context
from moesurgery.validate.parent_models import Given
from moesurgery.validate.report import Report

# The modules with the checks, in the order in which they run. Their imports are light; torch comes with
# `architecture` when it runs, and with `forward`.
_MODULES = (
    *("container", "policy", "provenance"),
    *(
        "gguf",
        "constants",
        "shapes",
        "experts",
        "layers",
        "vocabulary",
        "dtypes",
        "tokenizer",
        "architecture",
        "clients",
    ),
    *("values", "forward", "against"),
)
# The checks that a GGUF goes through, by the first of their codes: the others are about safetensors and config.json.
_OF_GGUF = frozenset(("P02", "P04", "S09", "S10", "G13", "C04", "C05", "C06", "C07", "V01", "R01"))
_WITHOUT_TENSORS = frozenset(("C16", "T01", "T02"))  # of the levels above `container`


def validate_checkpoint(
    reference: str | Path,
    *,
    level: Level | None = None,
    against: str | Path | Sequence[str | Path] | None = None,
    tolerance: float | None = None,
    ignore: Collection[str] = (),
    client: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Validate the checkpoint that `reference` names: a directory, `hf://org/name[@revision]`, a URL.

    `level` includes the ones before it; the default is everything but `forward` for a directory, and everything
    that reads headers alone for a remote one. `against`: the checkpoint that this one was made from, or all that were
    merged; `NAME=MODEL` says which of those that the provenance names one is. `tolerance` bounds the KL (nats) of F02.
    `client`: a program of `families.clients` that is to read it.
    `progress` is told the bytes of weights that were read.

    Never raises for what the checkpoint holds. Raises CheckpointError where there is no such checkpoint or no such
    reference, RecipeError for an unknown code or client.
    """
    if client is not None and client not in CLIENTS:
        raise RecipeError(f"there is no client {client!r}", f"known: {', '.join(CLIENTS)}")
    for code in ignore:
        if code not in CODES:
            raise RecipeError(f"there is no code {code!r}", "docs/codes.md lists them all")
    start = time.monotonic()
    source = open_source(reference)
    chosen = level or ("values" if isinstance(source, LocalSource) else "config")
    levels: tuple[Level, ...] = LEVELS[: LEVELS.index(chosen) + 1]
    references = (against,) if isinstance(against, (str, Path)) else tuple(against or ())
    for each in references:
        Given(str(each))
    if client is not None:
        levels = (*levels, "client")
    if references:
        levels = (*levels, "against")
    scan = scan_checkpoint(source)
    subject = Context(scan, tuple(map(str, references)), tolerance, client, progress)
    findings, skipped, checked = _run(subject, levels)
    if level is None and chosen == "config":
        skipped.append(NotChecked(("V01",), f"the values of {_stored(scan) / 1e9:.1f} GB: --level values reads them"))
    kept = [f for f in dict.fromkeys(findings) if f.code not in ignore]
    ignored = Counter(f.code for f in dict.fromkeys(findings) if f.code in ignore)
    return Report(
        source.identity,
        levels,
        tuple(kept),
        _by_reason(skipped),
        tuple(code for code in dict.fromkeys(checked) if code not in ignore),
        dict(ignored),
        subject.measured,
        time.monotonic() - start,
    )


def _by_reason(skipped: Sequence[NotChecked]) -> tuple[NotChecked, ...]:
    """Put together what was not checked for one reason: a broken file is one line, and not one for each check."""
    codes: dict[str, list[str]] = {}
    for one in skipped:
        codes.setdefault(one.reason, []).extend(one.codes)
    order = list(CODES)
    return tuple(NotChecked(tuple(sorted(set(each), key=order.index)), reason) for reason, each in codes.items())


def _stored(scan: Scan) -> int:
    return sum(info.nbytes for header in scan.headers for info in header.tensors)


def _run(subject: Context, levels: tuple[Level, ...]) -> tuple[list[Finding], list[NotChecked], list[str]]:
    for module in _MODULES:
        import_module(f"moesurgery.validate.check_{module}")
    findings: list[Finding] = []
    skipped: list[NotChecked] = []
    checked: list[str] = []
    for level in levels:
        wrong_before = any(finding.severity == "error" for finding in findings)
        for check in CHECKS:
            if check.level != level or (subject.is_gguf and check.codes[0] not in _OF_GGUF):
                continue
            if check.codes[0] == "G13" and not subject.is_gguf:
                continue
            checked += check.codes
            if level != "container" and not subject.sound and not _WITHOUT_TENSORS.issuperset(check.codes):
                skipped.append(NotChecked(check.codes, "the files themselves are wrong: mend those first"))
                continue
            if level == "forward" and wrong_before:
                skipped.append(NotChecked(check.codes, "a model with errors is not run: mend those first"))
                continue
            try:
                for outcome in check.function(subject):
                    if isinstance(outcome, Finding):
                        findings.append(in_gguf_words(subject, outcome) if subject.is_gguf else outcome)
                    else:
                        skipped.append(outcome)
            except CheckpointError as error:
                skipped.append(NotChecked(check.codes, error.message))
    return findings, skipped, checked
