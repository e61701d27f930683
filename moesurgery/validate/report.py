"""The outcome of a validation: findings, what was not checked, and whether that is a failure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from moesurgery._version import __version__
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.validate.check import NotChecked
from moesurgery.validate.codes import Level

_SCHEMA_VERSION = 1
_RANK_OF_SEVERITY: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Report:
    """What `validate` found. `checked` are the codes that were looked for; `ignored` counts what was asked to be."""

    target: str
    levels: tuple[Level, ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...] = ()
    checked: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def errors(self) -> int:
        return self.count("error")

    @property
    def warnings(self) -> int:
        return self.count("warning")

    def failed(self, fail_on: Severity = "error") -> bool:
        """Whether there is a finding at least as grave as `fail_on`."""
        return any(_RANK_OF_SEVERITY[finding.severity] <= _RANK_OF_SEVERITY[fail_on] for finding in self.findings)

    @property
    def by_severity(self) -> list[Finding]:
        """All findings, errors first, those of one code together."""
        return sorted(self.findings, key=lambda f: (_RANK_OF_SEVERITY[f.severity], f.code))

    @property
    def verdict(self) -> str:
        """One line: `2 errors, 1 warning`, or that nothing was found."""
        counts = Counter(finding.severity for finding in self.findings)
        parts = [f"{n} {kind}{'s' if n > 1 else ''}" for kind in _RANK_OF_SEVERITY if (n := counts[kind])]
        return ", ".join(parts) or "nothing wrong was found"


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as data. Names are as they stand in the checkpoint: escape them where you show them."""
    return {
        "schema_version": _SCHEMA_VERSION,
        "tool": "moesurgery",
        "version": __version__,
        "target": report.target,
        "levels": list(report.levels),
        "errors": report.errors,
        "warnings": report.warnings,
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "message": finding.message,
                "file": finding.file,
                "tensor": finding.tensor,
                "hint": finding.hint,
            }
            for finding in report.by_severity
        ],
        "not_checked": [{"codes": list(skipped.codes), "reason": skipped.reason} for skipped in report.not_checked],
        "checked": list(report.checked),
        "ignored": report.ignored,
        "measured": report.measured,
        "seconds": round(report.seconds, 3),
    }
