"""Reports: hostile names in every format, SARIF's shape and the pre-commit hooks."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml

from moesurgery.checkpoint.finding import Finding
from moesurgery.validate.check import NotChecked
from moesurgery.validate.report import Report
from moesurgery.validate.report_formats import BY_SUFFIX, FORMATS, SHOWN
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import ROOT, Result

Cli = Callable[..., Result]

HOSTILE = [
    "line\nbreak\r\n::error file=x::injected",
    "::set-output name=a::b",
    "100%25 %0A::warning::x",
    "\x1b[2J\x1b]0;title\x07",
    "\u202eright to left\u2066",
    "]]><script>alert(1)</script>",
    "a|b|c\n| --- |\n[click](javascript:x) @someone #1 `code`",
    "[bold red]markup[/bold red] [/]",
    "null\x00byte \ud800 half",
    "x" * 100_000,
]


def report(name: str) -> Report:
    """A report in which `name` stands wherever a stranger's text may."""
    findings = tuple(Finding(code, name, name, name, name, severity) for code, severity in SEVERITIES)
    return Report(name, ("container",), findings, (NotChecked(("C03",), name),), ("P01", "S01", "C03"), {"P05": 1})


SEVERITIES: list[tuple[str, Any]] = [("S01", "error"), ("P01", "warning"), ("S01", "note"), ("I02", "error")]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("form", [*FORMATS.values(), *BY_SUFFIX.values()], ids=lambda f: f.__name__)
def test_hostile_names_stay_names(form: Callable[[Report], str], name: str) -> None:
    text = form(report(name))
    text.encode()  # what was half a character is none any more
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\u202e" not in text
    if form.__name__ != "to_json":  # data, as it is
        assert len(text) < 60_000
    calm = form(report("calm"))
    if form.__name__ == "github":
        assert len(text.splitlines()) == len(calm.splitlines())
        commands = [line for line in text.splitlines() if line.startswith("::")]
        assert all(re.match(r"::(error|warning|notice) [^:]*::[^\n]*$", line) for line in commands)
        assert "::" not in re.sub(r"^::\w+ [^:]*::", "", text, flags=re.MULTILINE)
    elif form.__name__ == "junit":
        assert shape(ElementTree.fromstring(text)) == shape(ElementTree.fromstring(calm))
    elif form.__name__ == "markdown":
        assert len(text.splitlines()) == len(calm.splitlines())
        assert [line.count("|") for line in text.splitlines()] == [line.count("|") for line in calm.splitlines()]
        assert not re.search(r"<script|\]\(|@someone", text)
    elif form.__name__ in ("sarif", "to_json"):
        assert keys(json.loads(text)) == keys(json.loads(calm))


@pytest.mark.parametrize("name", ["it's", '"a" & <b>', "&amp; &#39;", "#1 | `c` *d* _e_ [f](g) {h} ~i~ \\j", "ö 語"])
def test_the_job_summary_shows_names_as_they_are(name: str) -> None:
    """Each character is escaped once: what a browser makes of it is the name again."""
    text = BY_SUFFIX[".md"](report(name))
    heading, *_ = text.splitlines()
    assert html.unescape(heading) == f"### moesurgery validate: {name}"
    rows = [line for line in text.splitlines() if line.startswith("| error | S01")]
    assert html.unescape(rows[0].split("|")[4].strip()) == name


def test_no_line_of_the_log_is_a_command_of_the_older_form() -> None:
    assert "##[" not in FORMATS["github"](report("##[set-output name=errors]0"))


def shape(element: ElementTree.Element) -> Any:
    return element.tag, sorted(element.attrib), [shape(child) for child in element]


def keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


# The parts of the OASIS schema of SARIF 2.1.0 that a report of ours uses, none of them optional for GitHub.
MESSAGE = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
RESULT = {
    "type": "object",
    "required": ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
    "additionalProperties": False,
    "properties": {
        "ruleId": {"type": "string"},
        "ruleIndex": {"type": "integer", "minimum": 0},
        "level": {"enum": ["none", "note", "warning", "error"]},
        "message": MESSAGE,
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
        "locations": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["physicalLocation"],
                "properties": {
                    "physicalLocation": {
                        "required": ["artifactLocation"],
                        "properties": {
                            "artifactLocation": {
                                "required": ["uri"],
                                "properties": {"uri": {"type": "string", "pattern": r"^[A-Za-z0-9_.~/%-]+$"}},
                            }
                        },
                    },
                    "logicalLocations": {"type": "array", "items": {"required": ["name", "kind"]}},
                },
            },
        },
    },
}
RULE = {
    "required": ["id", "shortDescription", "helpUri", "defaultConfiguration"],
    "properties": {"shortDescription": MESSAGE, "helpUri": {"type": "string", "pattern": "^https://"}},
}
SARIF = {
    "type": "object",
    "required": ["$schema", "version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "required": ["tool", "results"],
                "properties": {
                    "tool": {
                        "required": ["driver"],
                        "properties": {
                            "driver": {
                                "required": ["name", "version", "rules"],
                                "properties": {"rules": {"type": "array", "uniqueItems": True, "items": RULE}},
                            }
                        },
                    },
                    "results": {"type": "array", "items": RESULT},
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                },
            },
        },
    },
}


@pytest.mark.parametrize("name", ["calm", *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_sarif_is_what_code_scanning_takes(name: str) -> None:
    document = json.loads(FORMATS["sarif"](report(name)))
    jsonschema.validate(document, SARIF)
    (run,) = document["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(ids[result["ruleIndex"]] == result["ruleId"] for result in run["results"])


def test_an_alert_stays_the_same_alert() -> None:
    """The fingerprint is of what is wrong and where, and not of how that is put."""
    told = [Finding("S06", message, "model.safetensors", "w") for message in ("is truncated at 7", "is truncated at 9")]
    prints = [json.loads(FORMATS["sarif"](Report("m", (), (f,))))["runs"][0]["results"][0] for f in told]
    assert prints[0]["partialFingerprints"] == prints[1]["partialFingerprints"]
    other = Finding("S06", "is truncated at 7", "model.safetensors", "v")
    assert json.loads(FORMATS["sarif"](Report("m", (), (other,))))["runs"][0]["results"][0] != prints[0]


def test_thousands_of_findings_stay_readable() -> None:
    findings = tuple(Finding("C11", "left over", tensor=f"t{i}", severity="warning") for i in range(5000))
    for form in ("text", "github"):
        assert len(FORMATS[form](Report("m", (), findings)).splitlines()) <= SHOWN + 3
    assert len(json.loads(FORMATS["json"](Report("m", (), findings)))["findings"]) == 5000


def test_the_same_finding_on_many_tensors_is_one_line_with_a_count() -> None:
    def of(layer: int, what: str, values: int) -> Finding:
        return Finding("V01", f"{values} values are NaN", "model.safetensors", f"model.layers.{layer}.{what}.weight")

    findings = (*(of(i, "norm", 3 + i) for i in range(40)), of(0, "router", 1), of(1, "router", 2))
    for form in ("text", "markdown"):
        shown = BY_SUFFIX[".txt" if form == "text" else ".md"](Report("m", (), findings))
        assert shown.count("V01") == 2
        assert "39 more like it" in shown
        assert "1 more like it" in shown
        assert "42 errors" in shown.lower()
    assert len(json.loads(FORMATS["json"](Report("m", (), findings)))["findings"]) == 42


def test_an_error_of_the_files_is_not_buried(demo: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo, tmp_path / "model"))
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    report = validate_checkpoint(model)
    lines = FORMATS["text"](report).splitlines()
    assert len([line for line in lines if line.startswith("not checked")]) <= 3, lines
    assert any("error" in line and shard.name in line for line in lines[:3])
    skipped = {code for one in report.not_checked for code in one.codes}
    assert {"C02", "C03", "V01"} <= skipped  # the data still says all that was left out


# The pre-commit hooks


def test_the_hooks_name_commands_that_exist(cli: Cli, tmp_path: Path) -> None:
    hooks = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    good = sorted((ROOT / "recipes").rglob("*.yaml"))
    pattern = re.compile(hooks["moesurgery-recipe"]["files"])
    assert all(pattern.search(path.relative_to(ROOT).as_posix()) for path in good)
    program, *words = hooks["moesurgery-recipe"]["entry"].split()
    assert program == "moesurgery"
    assert cli(*words, *good).code == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("steps:\n  - rescale: {top_q: 3}\n")
    result = cli(*words, good[0], wrong)
    assert result.code == 1
    assert f"{wrong}:2" in result.out
    program, *words = hooks["moesurgery-validate"]["entry"].split()
    assert cli(*words, ROOT / "examples" / "demo" / "model").code == 0
