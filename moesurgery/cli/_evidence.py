"""What a measured edit or a comparison found, as one HTML page that needs nothing else, as JSON, or as Markdown.

All three have the same figures; the page draws them too.
"""

from __future__ import annotations

import html
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cli._pictures import Bars, Heatmap, Panel, dropped_experts, factors_of_rules, figure, of_table
from moesurgery.errors import RecipeError
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    from moesurgery.fitting.heldout import HeldOut
    from moesurgery.plan.plan import Plan

REPORT_KINDS = ("card", "html", "json")
ReportKinds = Annotated[
    list[str] | None,
    typer.Option(
        "--report",
        metavar="card|html|json",
        help="Also write what was measured as a page with plots, as JSON, or into the model card; repeat for more.",
    ),
]


@dataclass(frozen=True)
class EvidenceSection:
    """A heading, a table, and a plot of it, where it has one."""

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    panel: Panel | None = None


@dataclass(frozen=True)
class Evidence:
    """What was found, in order; `about` says on what it was measured, `figures` are the same numbers unrounded."""

    title: str
    about: str
    sections: Sequence[EvidenceSection]
    figures: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


def check_reports(kinds: Sequence[str]) -> None:
    """Raise RecipeError for a kind of report that there is not, before anything is measured."""
    for kind in kinds:
        if kind not in REPORT_KINDS:
            raise RecipeError(
                f"--report is {kind!r}, expected one of {', '.join(REPORT_KINDS)}", "repeat it for several"
            )


def command_line() -> str:
    """Return the command that runs now, with the names alone of files that were given by an absolute path."""
    return shlex.join(["moesurgery", *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])])


def evidence_of_edit(plan: Plan, measured: HeldOut, heading: str = "") -> Evidence:
    """Return the report of an edit that was measured on held-out text."""
    base = measured.nats["original"]
    over = {name: nats - base for name, nats in measured.nats.items() if name != "original"}
    rows = [("original", f"{base:.4f}", "", "")]
    for name, value in over.items():
        low, high = measured.intervals[name]
        rows.append((name, f"{measured.nats[name]:.4f}", f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}"))
    sections = [
        EvidenceSection(
            "Loss over the original",
            (heading or "edit", "held-out loss", "over the original", "95 % interval"),
            rows,
            Bars("nats per token over the original", list(over), list(over.values())),
        )
    ]
    domains = list(measured.domains["original"])
    if len(domains) > 1:
        by_text = [[measured.domains[n][d] - measured.domains["original"][d] for d in domains] for n in over]
        sections.append(
            EvidenceSection(
                "Loss over the original, by text",
                ("edit", *domains),
                [(n, *(f"{v:+.4f}" for v in values)) for n, values in zip(over, by_text, strict=True)],
                Heatmap("nats per token over the original", list(over), domains, by_text, across="text"),
            )
        )
    for step in plan.steps:
        for table in step.tables:
            title = f"{step.operation}: {table.header[-1]} by {table.header[0]}"
            panel = of_table(title, table.header, table.rows)
            if step.operation == "rescale" and "alternatives" in step.report:
                panel = factors_of_rules(step.report)
            elif step.operation == "drop-experts" and "layers" in step.report:
                panel = dropped_experts(step.report)
            sections.append(EvidenceSection(title, table.header, table.rows, panel))
    about = (
        f"{measured.tokens:,} held-out tokens; intervals are 95 % by bootstrap over windows, paired with the original"
    )
    title = f"{plan.checkpoint.name}: {', '.join(step.operation for step in plan.steps)}"
    figures = {
        "heldout": asdict(measured),
        "steps": [{"operation": s.operation, "summary": s.summary, "report": dict(s.report)} for s in plan.steps],
    }
    return Evidence(title, about, sections, figures, command_line())


def write_evidence(report: Evidence, kind: str, path: Path) -> None:
    """Write a report as `html`, `json` or `card` (Markdown). Raises OutputError where the file cannot be written."""
    text = {"html": evidence_page, "json": evidence_json, "card": evidence_markdown}[kind](report)
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def evidence_json(report: Evidence) -> str:
    """Return the figures as JSON."""
    about = {"schema_version": 1, "title": report.title, "about": report.about, "command": report.command}
    return write_json({**about, **report.figures})


def evidence_markdown(report: Evidence) -> str:
    """Return the tables as Markdown, with the command that made them."""
    lines = ["## Measured", "", f"{report.about}."]
    for section in report.sections:
        rows = [section.header, ["---"] * len(section.header), *section.rows]
        lines += ["", f"### {section.heading}", ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    if report.command:
        lines += ["", "Made by", "", f"    {report.command}"]
    return "\n".join([*lines, ""])


def evidence_page(report: Evidence) -> str:
    """Return the HTML page: tables and plots scroll sideways by themselves where the window is narrow."""
    body = []
    for section in report.sections:
        body.append(f"<section><h2>{html.escape(section.heading)}</h2>")
        if section.panel is not None:
            body.append(f'<div class="s" tabindex="0" role="region" aria-label="plot">{figure(section.panel)}</div>')
        body.append('<div class="s" tabindex="0" role="region" aria-label="table"><table><thead><tr>')
        body += [f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header]
        body.append("</tr></thead><tbody>")
        for first, *rest in section.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
            body.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
        body.append("</tbody></table></div></section>")
    command = f"<h2>Made by</h2><pre>{html.escape(report.command)}</pre>" if report.command else ""
    parts = {"TITLE": html.escape(report.title), "ABOUT": html.escape(report.about), "COMMAND": command}
    text = _PAGE
    for name, value in (*parts.items(), ("BODY", "".join(body))):
        text = text.replace(f"@{name}@", value, 2 if name == "TITLE" else 1)
    return text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root{color-scheme:light dark;--ink:#22262b;--paper:#fff;--soft:#5b6570;--line:#d5dae0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#16191d;--soft:#9aa4ae;--line:#3a424a}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:1.5rem auto;max-width:72rem;
padding:0 1rem}h1{font-size:1.3rem;margin:0 0 .2rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:2rem 0 .5rem;
overflow-wrap:anywhere}.about{color:var(--soft);margin:0}.s{overflow-x:auto}.s svg{display:block;margin-bottom:.6rem;
height:auto;max-width:max(100%,26rem)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;border-bottom:1px solid
var(--line);text-align:right;vertical-align:top}th:first-child{text-align:left;padding-left:0}th{font-weight:600}
tbody th{font-weight:400}thead th{color:var(--soft)}pre{white-space:pre-wrap;overflow-wrap:anywhere}
</style></head><body><h1>@TITLE@</h1><p class="about">@ABOUT@</p>
<main>@BODY@</main>
@COMMAND@</body></html>
"""
