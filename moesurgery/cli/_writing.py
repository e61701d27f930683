"""What all writers share: options, the dry run, progress, and what is said at the end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.cli._common_options import Force, Json, Picture, Quiet, SchedulerAddress
from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._evidence import Evidence, evidence_markdown, write_evidence
from moesurgery.cli._exit_codes import ANSWER_IS_NO, FAILED
from moesurgery.cli._output_name import default_output
from moesurgery.cli._pictures import Panel, check_picture, factors_of_rules, of_table, write_picture
from moesurgery.errors import RecipeError
from moesurgery.expr.nodes import Copy
from moesurgery.plan.plan import Plan
from moesurgery.plan.rounding import rounding_lines
from moesurgery.recipe.reader import parse_size
from moesurgery.scheduler import MakeExecutor, Scheduler
from moesurgery.write.card import config_changes
from moesurgery.write.expected_output import Promise
from moesurgery.write.object_store import is_url, open_store
from moesurgery.write.output_folder import check_output, check_place
from moesurgery.write.parts import Part, write_part
from moesurgery.write.publish import recover
from moesurgery.write.remote_output import check_store, output_name, scratch_needed, write_remote
from moesurgery.write.shard_layout import output_tasks
from moesurgery.write.write_plan import WriteOptions, Written, bytes_needed, write_plan

if TYPE_CHECKING:
    from moesurgery.validate.report import Report

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder to write, or s3://bucket/name, gs://…, hf://org/name; named after model and operation by default.",
    ),
]
UploadScratch = Annotated[
    Path | None,
    typer.Option(
        "--scratch",
        metavar="DIR",
        help="With a store as output: where two shards wait for their upload; the current folder by default.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, from headers alone.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the equivalent recipe and stop.")]
MaxShardSize = Annotated[
    str | None, typer.Option("--max-shard-size", help="Reshard, as in 5GB; the source's shards otherwise.")
]
Link = Annotated[bool, typer.Option("--link", help="Hard-link unchanged shards instead of copying them.")]
Card = Annotated[bool, typer.Option("--card", help="Write README.md even where the model has its own.")]
NoFsync = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk; a power cut may then damage the output.")
]
Checksums = Annotated[
    bool, typer.Option("--checksums", help="Record the SHA-256 of every shard; reads what was written once more.")
]
Validate = Annotated[bool, typer.Option("--validate", help="Validate the output; exit 1 where it is wrong.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Threads; as many as there are cores by default.")
]
PartOption = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="Write part I of N of the shards; other processes write the rest."),
]
Finish = Annotated[
    bool, typer.Option("--finish", help="With --part: publish the output where this part is the last to end.")
]
ShareWith = Annotated[
    str | None,
    typer.Option("--share-with", metavar="GROUP", help="Unix group whose members write parts, too, and are trusted."),
]


@dataclass(frozen=True)
class WriterFlags:
    """The options of a writer as the user gave them."""

    output: Output = None
    force: Force = False
    dry_run: DryRun = False
    print_recipe: PrintRecipe = False
    max_shard_size: MaxShardSize = None
    link: Link = False
    card: Card = False
    no_fsync: NoFsync = False
    checksums: Checksums = False
    validate: Validate = False
    jobs: Jobs = None
    part: PartOption = None
    finish: Finish = False
    share_with: ShareWith = None
    scheduler: SchedulerAddress = None
    upload_scratch: UploadScratch = None
    picture: Picture = None
    as_json: Json = False
    quiet: Quiet = False

    @property
    def store(self) -> str | None:
        """The address of the store that is to be written to; None where the output is a folder."""
        return self.output if is_url(self.output) else None

    @property
    def scratch(self) -> Path:
        return self.upload_scratch or Path(".")

    @property
    def folder(self) -> Path | None:
        """The folder to write, or the one in whose place a store's files are made; None where none is named."""
        if self.store is not None:
            return self.scratch / output_name(self.store)
        return Path(self.output) if self.output is not None else None

    @property
    def shard_bytes(self) -> int | None:
        if self.max_shard_size is None:
            return None
        try:
            return parse_size(self.max_shard_size)
        except ValueError as error:
            raise RecipeError(f"--max-shard-size: {error}") from None


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
    _draw(plan, flags.picture)
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
                    plan, output, options, watch=watch, make_executor=_make_executor(flags), promise=promise
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
            "steps": [
                {"operation": s.operation, "summary": s.summary, "notes": s.notes, "report": s.report}
                for s in plan.steps
            ],
            **({"rounding": written.rounding} if written.rounding else {}),
            **more,
        }
        if report is not None:
            from moesurgery.validate.report import as_json

            document["validation"] = as_json(report)
        console.json(document)
    else:
        _say_written(flags.store or output, written)
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
    total = sum(task.data_bytes for task in part.of(output_tasks(plan)))
    with console.progress(f"writing part {flags.part} of {output.name}", total) as watch:
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


def group_id(name: str) -> int:
    """Return the id of a Unix group. Raises RecipeError where there is none of that name."""
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise RecipeError(f"--share-with: there is no group {name!r}", "list your groups: id -Gn") from None


def _check_parts(flags: WriterFlags) -> None:
    """Refuse options that mean nothing together, or that a part cannot carry out."""
    if flags.part is None:
        alone = [option for option, given in (("--finish", flags.finish), ("--share-with", flags.share_with)) if given]
        if alone:
            raise RecipeError(f"{alone[0]} goes with --part I/N", "add --part, or leave it out")
        return
    Part.parse(flags.part)
    if flags.output is None:
        raise RecipeError("--part needs the output's name, which all parts share", "give it with -o")
    others = {"--no-fsync": flags.no_fsync, "--validate": flags.validate, "--scheduler": flags.scheduler}
    refused = [option for option, given in others.items() if given]
    if refused:
        raise RecipeError(f"{refused[0]} is not for one part of a job", "leave it out; validate the published output")


def _make_executor(flags: WriterFlags) -> MakeExecutor | None:
    """Return what gives the workers that write; None for threads of this process."""
    return None if flags.scheduler is None else Scheduler(flags.scheduler).executor


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


def check_early(flags: WriterFlags) -> None:
    """Refuse an output that cannot be, before anything is planned or measured: that may take hours."""
    check_picture(flags.picture)
    _check_parts(flags)
    _make_executor(flags)
    if flags.store is not None:
        given = {"--part": flags.part, "--scheduler": flags.scheduler}
        if refused := [option for option, value in given.items() if value]:
            raise RecipeError(f"{refused[0]} writes to a folder, and {flags.store} is a store", "leave it out")
        check_store(flags.store, flags.scratch, force=flags.force or flags.dry_run)
        return
    if flags.upload_scratch is not None:
        raise RecipeError("--scratch goes with a store as output", "name one, such as -o s3://bucket/name")
    if flags.output is not None:
        if not flags.dry_run:
            recover(Path(os.path.abspath(flags.output)))
        check_place(Path(os.path.abspath(flags.output)), force=flags.force, dry_run=flags.dry_run)


def _validated(output: Path | str, nbytes: int) -> Report:
    from moesurgery.validate.run_checks import validate_checkpoint

    with console.progress("validating", nbytes) as watch:
        return validate_checkpoint(output, progress=watch.progress)


def _say_written(output: Path | str, written: Written) -> None:
    for line in rounding_lines(written.rounding):
        console.result(line)
    resumed = f", {written.resumed} of them from the interrupted job" if written.resumed else ""
    console.result(f"wrote {output} ({human_bytes(written.nbytes)} in {written.shards} shards{resumed})")


def _draw(plan: Plan, path: Path | None) -> None:
    """Draw the tables of what each step decided."""
    if path is None:
        return
    panels: list[Panel] = []
    for step in plan.steps:
        if step.operation == "rescale" and "alternatives" in step.report:
            panels.append(factors_of_rules(step.report))
            continue
        titled = [(f"{step.operation}: {t.header[-1]} by {t.header[0]}", t) for t in step.tables]
        panels += [panel for title, t in titled if (panel := of_table(title, t.header, t.rows)) is not None]
    if not panels:
        console.warning(f"{path} is not written: no step decided numbers that could be drawn")
        return
    summary = "; ".join(step.summary for step in plan.steps)
    write_picture(path, f"{plan.checkpoint.name}: {', '.join(step.operation for step in plan.steps)}", summary, panels)


def report_steps(plan: Plan, flags: WriterFlags) -> None:
    """Print what each step decided and why."""
    if flags.as_json or flags.quiet:
        return
    for step in plan.steps:
        console.result(f"{step.operation}: {step.summary}")
        for line in (*step.details, *step.notes):
            console.result(f"  {line}")
        for table in step.tables:
            console.result()
            console.table(table.header, table.rows, right=range(1, len(table.header)))
        if step.tables:
            console.result()


def dry_run(plan: Plan, output: Path, flags: WriterFlags, more: Mapping[str, Any]) -> None:
    """Print what writing would do: tensors by kind, config changes, bytes, memory, free space."""
    tasks = output_tasks(plan)
    unchanged = set(plan.untouched())
    kinds = {"unchanged": len(unchanged), "byte ranges": 0, "computed": 0}
    computed_bytes = 0
    memory = 0
    for name, expr in plan.tensors.items():
        if name in unchanged:
            continue
        pieces = list(expr.pieces())
        if all(isinstance(p, Copy) for p in pieces):
            kinds["byte ranges"] += 1
            continue
        kinds["computed"] += 1
        computed_bytes += expr.nbytes
        memory = max(memory, expr.memory)
    kinds["dropped"] = len(plan.checkpoint.tensors.keys() - plan.tensors.keys())
    kinds["new"] = len(plan.tensors.keys() - plan.checkpoint.tensors.keys())
    place = Path(os.path.abspath(output)).parent
    if flags.store is not None:
        needed = scratch_needed(tasks, linked=flags.link)
        exists = bool(open_store(flags.store).files())
    else:
        needed = sum(bytes_needed(task, linked=flags.link) for task in tasks)
        exists = output.exists() and any(output.iterdir())
    where = flags.store or str(output)
    if exists and not flags.force:
        console.warning(f"{where} exists and is not empty: writing needs --force, or another -o")
    status = os.statvfs(place if place.exists() else ".")
    free = status.f_bavail * status.f_frsize
    changes = config_changes(plan)
    written = plan.nbytes + plan.companion_nbytes
    document = {
        "schema_version": 1,
        "output": where,
        "output_exists": exists,
        "shards": len(tasks),
        "tensors": kinds,
        "bytes_written": written,
        "bytes_computed": computed_bytes,
        "bytes_of_new_disk_space": needed,
        "bytes_free": free,
        "peak_memory_per_thread": max(memory, 1 << 21),
        "config_changes": [{"key": k, "old": a, "new": b} for k, a, b in changes],
        "steps": [
            {"operation": s.operation, "summary": s.summary, "notes": s.notes, "report": s.report} for s in plan.steps
        ],
        **more,
    }
    if flags.as_json:
        console.json(document)
    else:
        report_steps(plan, flags)
        console.result(f"would write {where}: {len(tasks)} shards, {human_bytes(written)}")
        console.result("tensors: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count))
        for key, old, new in changes:
            console.result(f"config.json: {key}: {ascii_json(old, indent=None)} -> {ascii_json(new, indent=None)}")
        console.result(
            f"computed: {human_bytes(computed_bytes)};"
            f" new disk space: {human_bytes(needed)} of {human_bytes(free)} free"
        )
        if computed_bytes:
            console.result(
                f"memory: about {human_bytes(max(memory, 1 << 21))} per thread besides the interpreter and torch"
            )
    if needed > free:
        console.error("it does not fit", "free some space, use --link, or choose another disk with -o")
        raise typer.Exit(FAILED)
