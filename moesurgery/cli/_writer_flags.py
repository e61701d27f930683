"""The options of all writers, and what of them is refused before anything is planned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moesurgery.cli._common_options import Force, Json, Picture, Quiet, SchedulerAddress
from moesurgery.cli._pictures import check_picture
from moesurgery.errors import RecipeError
from moesurgery.recipe.reader import parse_size
from moesurgery.scheduler import MakeExecutor, Scheduler
from moesurgery.write.object_store import is_url
from moesurgery.write.output_folder import check_place
from moesurgery.write.parts import Part
from moesurgery.write.publish import recover
from moesurgery.write.remote_output import check_store, output_name

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
        return None if self.max_shard_size is None else size_of_option("--max-shard-size", self.max_shard_size)

    def executor(self) -> MakeExecutor | None:
        """Return what gives the workers that write; None for threads of this process."""
        return None if self.scheduler is None else Scheduler(self.scheduler).executor


def size_of_option(option: str, text: str) -> int:
    """Return the bytes that an option names, as in 5GB. Raises RecipeError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from None


def check_early(flags: WriterFlags) -> None:
    """Refuse an output that cannot be, before anything is planned or measured: that may take hours."""
    check_picture(flags.picture)
    _check_parts(flags)
    flags.executor()
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


def group_id(name: str) -> int:
    """Return the id of a Unix group. Raises RecipeError where there is none of that name."""
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise RecipeError(f"--share-with: there is no group {name!r}", "list your groups: id -Gn") from None
