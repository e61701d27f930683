"""A report as text, JSON, JUnit, SARIF, GitHub annotations and Markdown.

Names of tensors and files come from strangers. Everywhere but in JSON, which keeps them as they are in escaped
form, each is one line of printable characters, cut where it is too long, and then escaped as the format wants.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from moesurgery._version import __version__
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.escape import one_line
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.codes import CODES
from moesurgery.validate.report import Report, as_json

_LONGEST_PATH = 4096
_NUMBERS = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?")
SHOWN = 12  # findings of one code in what people read
_PAGE_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:70rem;"
    "padding:0 1rem;overflow-wrap:anywhere}h1{font-size:1.3rem}h2{font-size:1.05rem}table{border-collapse:collapse;"
    "width:100%}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid #8886}"
    ".error td:first-child{color:#d0342c;font-weight:600}.warning td:first-child{color:#b26a00;font-weight:600}"
)
_DOCS = "https://github.com/moesurgery/moesurgery/blob/main/docs/codes.md"
_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def text(report: Report) -> str:
    """Return what the command prints by default."""
    lines = [f"{one_line(report.target)}: {report.verdict} (levels: {', '.join(report.levels)})"]
    shown: dict[str, int] = {}
    for finding, alike in _kinds(report):
        shown[finding.code] = shown.get(finding.code, 0) + 1
        if shown[finding.code] <= SHOWN:
            lines.append(f"{finding.severity:<7} {finding.code}  {_line(finding)}{_and_alike(alike)}")
            if finding.hint:
                lines.append(f"             hint: {one_line(finding.hint)}")
    for code, count in shown.items():
        if count > SHOWN:
            lines.append(f"        {code}  … and {count - SHOWN:,} more (--format json lists all)")
    for key, value in report.measured.items():
        lines.append(f"measured: {key}: {value}")
    for skipped in report.not_checked:
        codes = [*skipped.codes] if len(skipped.codes) <= SHOWN else [*skipped.codes[:3], "…", skipped.codes[-1]]
        lines.append(f"not checked: {', '.join(codes)}: {one_line(skipped.reason)}")
    if report.ignored:
        lines.append("ignored: " + ", ".join(f"{n} {code}" for code, n in report.ignored.items()))
    return "\n".join(lines)


def _kinds(report: Report) -> list[tuple[Finding, int]]:
    """Return findings, of those that differ in numbers alone the first, and how many more of its kind there are."""
    counts: dict[str, int] = {}
    first: dict[str, Finding] = {}
    for finding in report.by_severity:
        kind = repr((finding.severity, finding.code, finding.file, finding.message))
        if finding.tensor is not None:  # those of a kind may lie in several shards
            template, message = name_template(finding.tensor)[0], _NUMBERS.sub("#", finding.message)
            kind = repr((finding.severity, finding.code, template, message))
        first.setdefault(kind, finding)
        counts[kind] = counts.get(kind, 0) + 1
    return [(finding, counts[kind] - 1) for kind, finding in first.items()]


def _and_alike(alike: int) -> str:
    return f" (and {alike:,} more like it)" if alike else ""


def _line(finding: Finding) -> str:
    where = one_line(finding.where)
    return f"{where}: {one_line(finding.message)}" if where else one_line(finding.message)


def to_json(report: Report) -> str:
    """Return the report as one JSON document."""
    return ascii_json(as_json(report))


def junit(report: Report) -> str:
    """Return JUnit XML: one test case for each code that was looked for, its findings as one failure."""
    by_code: dict[str, list[Finding]] = {code: [] for code in report.checked}
    for finding in report.by_severity:
        by_code.setdefault(finding.code, []).append(finding)
    skipped = {code: skip.reason for skip in report.not_checked for code in skip.codes}
    failures = sum(any(f.severity == "error" for f in findings) for findings in by_code.values())
    suite = ElementTree.Element(
        "testsuite",
        name=f"moesurgery validate {one_line(report.target)}",
        tests=str(len(by_code)),
        failures=str(failures),
        errors="0",
        skipped=str(sum(code in skipped and not by_code[code] for code in by_code)),
        time=f"{report.seconds:.3f}",
    )
    for code, findings in by_code.items():
        case = ElementTree.SubElement(suite, "testcase", classname="moesurgery", name=f"{code} {CODES[code].title}")
        lines = "\n".join(f"{f.severity}: {_line(f)}" for f in findings)
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors:
            failure = ElementTree.SubElement(case, "failure", message=_line(errors[0]), type=code)
            failure.text = lines
        elif findings:
            ElementTree.SubElement(case, "system-out").text = lines
        elif code in skipped:
            ElementTree.SubElement(case, "skipped", message=one_line(skipped[code]))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def sarif(report: Report) -> str:
    """Return SARIF 2.1.0. Fingerprints come from code, file and tensor, so that an alert stays one alert."""
    levels: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "note"}
    rules = sorted({*report.checked, *(finding.code for finding in report.findings)})
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "moesurgery",
                "version": __version__,
                "informationUri": _DOCS,
                "rules": [
                    {
                        "id": code,
                        "shortDescription": {"text": CODES[code].title},
                        "helpUri": f"{_DOCS}#{CODES[code].level}",
                        "defaultConfiguration": {"level": levels[CODES[code].severity]},
                    }
                    for code in rules
                ],
            }
        },
        "results": [_sarif_result(finding, levels[finding.severity], rules) for finding in report.by_severity],
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    {
                        "level": "note",
                        "message": {"text": f"not checked: {', '.join(s.codes)}: {one_line(s.reason)}"},
                    }
                    for s in report.not_checked
                ],
            }
        ],
        "columnKind": "unicodeCodePoints",
    }
    return ascii_json({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]})


def _sarif_result(finding: Finding, level: str, rules: list[str]) -> dict[str, Any]:
    message = one_line(finding.message) + (f" ({one_line(finding.hint)})" if finding.hint else "")
    mark = "\0".join((finding.code, finding.file or "", finding.tensor or ""))
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(finding.file or "config.json")}}}
    if finding.tensor is not None:
        location["logicalLocations"] = [{"name": one_line(finding.tensor), "kind": "object"}]
    return {
        "ruleId": finding.code,
        "ruleIndex": rules.index(finding.code),
        "level": level,
        "message": {"text": f"{one_line(finding.where)}: {message}" if finding.where else message},
        "locations": [location],
        "partialFingerprints": {"moesurgery/v1": hashlib.sha256(mark.encode("utf-8", "replace")).hexdigest()[:32]},
    }


def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.encode("utf-8", "replace")[:_LONGEST_PATH], safe="/")


def github(report: Report) -> str:
    """Return workflow commands: one annotation for each code, errors first. GitHub shows ten of each kind."""
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in report.by_severity:
        groups.setdefault((finding.severity, finding.code), []).append(finding)
    lines = []
    kinds: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "notice"}
    for (severity, code), findings in groups.items():
        first = findings[0]
        more = f" (and {len(findings) - 1:,} more {code})" if len(findings) > 1 else ""
        properties = {"title": f"{code}: {CODES[code].title}"}
        if first.file is not None:
            properties = {"file": one_line(first.file), **properties}
        given = ",".join(f"{key}={_command(value, property_=True)}" for key, value in properties.items())
        lines.append(f"::{kinds[severity]} {given}::{_command(_line(first) + more)}")
    lines += [
        f"::notice title=not checked::{_command(', '.join(s.codes) + ': ' + one_line(s.reason))}"
        for s in report.not_checked
    ]
    lines.append(_command(f"{one_line(report.target)}: {report.verdict}"))
    return "\n".join(lines)


def _command(value: str, *, property_: bool = False) -> str:
    """Escape a workflow command's message, or one of its properties."""
    value = value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    value = value.replace("##[", "#%23[")  # the older form of a command, which may stand anywhere in a line
    return value.replace(":", "%3A").replace(",", "%2C") if property_ else value.replace("::", ":%3A")


def markdown(report: Report) -> str:
    """Return a table for a job summary."""
    lines = [f"### moesurgery validate: {_cell(report.target)}", "", report.verdict.capitalize() + ".", ""]
    if report.findings:
        lines += ["| | code | where | what |", "| --- | --- | --- | --- |"]
        shown: dict[str, int] = {}
        for finding, alike in _kinds(report):
            shown[finding.code] = shown.get(finding.code, 0) + 1
            if shown[finding.code] <= SHOWN:
                where, what = _cell(finding.where), _cell(finding.message + _and_alike(alike))
                lines.append(f"| {finding.severity} | {finding.code} | {where} | {what} |")
        lines += [f"| | {code} | | … and {n - SHOWN:,} more |" for code, n in shown.items() if n > SHOWN]
        lines.append("")
    lines += [f"* not checked: {', '.join(s.codes)}: {_cell(s.reason)}" for s in report.not_checked]
    return "\n".join(lines) + "\n"


def page(report: Report) -> str:
    """Return an HTML page that needs nothing else."""
    rows = [
        f'<tr class="{f.severity}"><td>{f.severity}</td><td>{f.code}</td><td>{html.escape(one_line(f.where))}</td>'
        f"<td>{html.escape(one_line(f.message))}{_and_alike(alike)}"
        + (f"<br><small>{html.escape(one_line(f.hint))}</small>" if f.hint else "")
        + "</td></tr>"
        for f, alike in _kinds(report)
    ]
    target = html.escape(one_line(report.target))
    skipped = [f"<li>{', '.join(s.codes)}: {html.escape(one_line(s.reason))}</li>" for s in report.not_checked]
    table = ["<table>", "<tr><th></th><th>code</th><th>where</th><th>what</th></tr>", *rows, "</table>"] if rows else []
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{target}: {report.verdict}</title><style>{_PAGE_STYLE}</style></head><body>",
        f"<h1>{target}</h1><p>{report.verdict.capitalize()}. Levels: {', '.join(report.levels)}.</p>",
        *table,
        *(["<h2>Not checked</h2><ul>", *skipped, "</ul>"] if skipped else []),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: str) -> str:
    """Escape text for a table cell, each character once: no HTML, no Markdown, no mentions."""
    return "".join(f"&#{ord(c)};" if c in "&<>\"'|`*_[]()!#@~\\{}" else c for c in one_line(value))


FORMATS: dict[str, Callable[[Report], str]] = {
    "text": text,
    "json": to_json,
    "junit": junit,
    "sarif": sarif,
    "github": github,
}
# What a report file holds, by its suffix.
BY_SUFFIX: dict[str, Callable[[Report], str]] = {
    ".txt": text,
    ".json": to_json,
    ".xml": junit,
    ".sarif": sarif,
    ".md": markdown,
    ".html": page,
}
