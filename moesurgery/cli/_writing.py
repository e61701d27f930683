"""How every writer carries out a plan: checks, progress, and what is printed at the end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._dry_run import dry_run
from moesurgery.cli._evidence import Evidence, evidence_markdown, write_evidence
from moesurgery.cli._exit_codes import ANSWER_IS_NO
from moesurgery.cli._output_name import default_output
from moesurgery.cli._step_report import draw_steps, report_steps, steps_document
from moesurgery.cli._writer_flags import WriterFlags, check_early, group_id
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import rounding_lines
from moesurgery.write.expected_output import Promise
from moesurgery.write.output_folder import check_output
from moesurgery.write.parts import Part, write_part
from moesurgery.write.publish import recover
from moesurgery.write.remote_output import write_remote
from moesurgery.write.write_plan import WriteOptions, Written, write_plan

if TYPE_CHECKING:
    from moesurgery.validate.report import Report


class Printable(Protocol):
    def to_yaml(self) -> str: ...


class Plannable(Printable, Protocol):
    """What a writer carries out: a recipe of operations, or of a merge."""

    def plan(self) -> Plan: ...


def carry_out(
    recipe: Plannable | None,
    flags: WriterFlags,
    plan: Plan | None = None,
    measured: Evidence | None = None,
    kinds: Sequence[str] = (),
    promise: Promise | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Plan a recipe, unless there is a `plan` already, then print, weigh or write it, as the flags say.

    What was `measured`, and `more`, join the JSON answer; the former is reported in these `kinds` too. `promise`: what
    the output must be to the byte.
    """
    more = {**(more or {}), **({} if measured is None else {"heldout": measured.figures["heldout"]})}
    console.quiet = flags.quiet
    if flags.print_recipe and recipe is not None:
        print_recipe(recipe, as_json=flags.as_json)
        return
    check_early(flags)
    if plan is None:
        assert recipe is not None
        plan = recipe.plan()
    for step in plan.steps:
        for warning in step.warnings:
            console.warning(warning)
    if _changes_nothing(plan):
        would = "would change" if flags.dry_run else "changes"
        console.warning(f"nothing {would}: every tensor and config.json stay as they are")
    output = flags.folder or default_output(plan)
    if flags.store is None:
        if not flags.dry_run:
            recover(Path(os.path.abspath(output)))
        check_output(plan, Path(os.path.abspath(output)), force=flags.force, dry_run=flags.dry_run)
    draw_steps(plan, flags.picture)
    if flags.dry_run:
        dry_run(plan, output, flags, more)
        return
    report_steps(plan, flags)
    if plan.checkpoint.other_weights:
        console.warning(
            "left behind: " + ", ".join(plan.checkpoint.other_weights[:5]) + " (not the safetensors that were edited)"
        )
    options = WriteOptions(
        jobs=flags.jobs,
        link=flags.link,
        force=flags.force,
        card=flags.card or "card" in kinds,
        evidence=evidence_markdown(measured) if measured is not None and "card" in kinds else "",
        durable=not flags.no_fsync,
        checksums=flags.checksums,
    )
    if flags.part is not None:
        _write_part(plan, output, options, flags)
        return
    with console.progress(f"writing {output.name}", plan.nbytes + plan.companion_nbytes) as watch:
        try:
            if flags.store is not None:
                if flags.store.startswith("hf://"):
                    hide_bars_of_the_hub()
                written = write_remote(plan, flags.store, options, scratch=flags.scratch, watch=watch)
            else:
                written = write_plan(
                    plan, output, options, watch=watch, make_executor=flags.executor(), promise=promise
                )
        except KeyboardInterrupt:
            partial = Path(os.path.abspath(output)).with_name(output.name + ".partial")
            if partial.exists():
                kept = f"interrupted; {partial} is kept: the same command resumes it, deleting it gives it up"
                console.if_interrupted = kept
            raise
    for kind in kinds:
        if measured is not None and kind != "card":
            write_evidence(measured, kind, output.with_name(f"{output.name}.report.{kind}"))
    report = _validated(written.path, plan.nbytes) if flags.validate else None
    if flags.as_json:
        document = {
            "schema_version": 1,
            "output": str(written.path),
            "shards": written.shards,
            "shards_resumed": written.resumed,
            "bytes": written.nbytes,
            "steps": steps_document(plan),
            **({"rounding": written.rounding} if written.rounding else {}),
            **more,
        }
        if report is not None:
            from moesurgery.validate.report import as_json

            document["validation"] = as_json(report)
        console.json(document)
    else:
        _report_written(flags.store or output, written)
        if report is not None:
            from moesurgery.validate.report_formats import text

            console.result(text(report))
    if report is not None and report.failed():
        raise typer.Exit(ANSWER_IS_NO)


def hide_bars_of_the_hub() -> None:
    """Have huggingface_hub show no progress of its own."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


def _write_part(plan: Plan, output: Path, options: WriteOptions, flags: WriterFlags) -> None:
    assert flags.part is not None
    part = Part.parse(flags.part)
    group = None if flags.share_with is None else group_id(flags.share_with)
    with console.progress(f"writing part {flags.part} of {output.name}", None) as watch:
        written = write_part(plan, output, part, options, finish=flags.finish, group=group, watch=watch)
    if flags.as_json:
        document = asdict(written) | {"path": str(written.path), "part": flags.part}
        console.json({"schema_version": 1, **document})
        return
    resumed = f", {written.resumed} of them were there" if written.resumed else ""
    console.result(f"wrote part {flags.part}: {human_bytes(written.nbytes)} in {written.shards} shards{resumed}")
    if written.published:
        console.result(f"all parts are there: {output} is published")
    elif written.missing:
        console.result(f"{written.missing} shards of {output} are still to be written by other parts")
    elif not flags.finish:
        console.result(f"all shards are there; publish them: moesurgery finish {shlex.quote(str(output))}")


def _changes_nothing(plan: Plan) -> bool:
    """Whether the output would be the input under another name; of merges their own warnings say it."""
    if any(step.operation == "merge" for step in plan.steps):
        return False
    if plan.config != plan.checkpoint.config or plan.files or plan.companions or plan.max_shard_size:
        return False
    return sum(1 for _ in plan.untouched()) == len(plan.tensors) == len(plan.checkpoint.tensors)


def print_recipe(recipe: Printable, *, as_json: bool) -> None:
    """Print a recipe as YAML, or what the YAML says as JSON."""
    text = recipe.to_yaml()
    if not as_json:
        console.result(text.rstrip())
        return
    from moesurgery.recipe.yaml_strict import parse_all

    documents = [document.value for document in parse_all(text)]  # a merge may have several stages
    console.json({"schema_version": 1, "recipe": documents[0] if len(documents) == 1 else documents})


def _validated(output: Path | str, nbytes: int) -> Report:
    from moesurgery.validate.run_checks import validate_checkpoint

    with console.progress("validating", nbytes) as watch:
        return validate_checkpoint(output, progress=watch.progress)


def _report_written(output: Path | str, written: Written) -> None:
    for line in rounding_lines(written.rounding):
        console.result(line)
    resumed = f", {written.resumed} of them from the interrupted job" if written.resumed else ""
    console.result(f"wrote {output} ({human_bytes(written.nbytes)} in {written.shards} shards{resumed})")
