"""Sending a finished checkpoint to the Hub: which files, with which card, in one commit.

One commit, so that the repository never shows half a model. huggingface_hub uploads first and commits last, and sends
nothing again that the Hub already has; so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.filenames import CARD, CONFIG, PROVENANCE, WORK
from moesurgery.checkpoint.scan import read_object
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import OutputError, RecipeError
from moesurgery.write.card import MADE_WITH, front_matter, with_front_matter
from moesurgery.write.object_store import HubRepository
from moesurgery.write.output_folder import is_part_of_checkpoint

_REPOSITORY = re.compile(r"(hf://)?(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/@]+))?/?")
_MOST_RECORD = 64 << 20


@dataclass(frozen=True)
class HubUpload:
    """What is sent: files with their sizes in bytes, and README.md as it will be there.

    `left_out`: files that stay here. `changes`: what was changed of README.md. `bases`: the models of the Hub that were
    edited, `hf://org/name@<commit>`.
    """

    folder: Path
    files: dict[str, int]
    card: bytes
    left_out: tuple[str, ...]
    changes: tuple[str, ...]
    bases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def repository_of(reference: str, revision: str | None = None) -> HubRepository:
    """Read `org/name`, `hf://org/name@revision`. Raises RecipeError."""
    match = _REPOSITORY.fullmatch(reference)
    if match is None:
        raise RecipeError(f"{reference} does not name a model of the Hub", "write org/name")
    if match["revision"] and revision and match["revision"] != revision:
        raise RecipeError(f"{reference} and --revision {revision} name two revisions", "leave one out")
    return HubRepository(match["repository"], revision or match["revision"])


def prepare_upload(folder: Path) -> HubUpload:
    """Return what of a checkpoint's folder is sent, and make its card.

    The card keeps what README.md says, licence included. Where that is the card of the model that was edited,
    `base_model` becomes that model, its evaluation results go, and a line says what was done. Raises CheckpointError
    where the folder is no checkpoint, OutputError where it is one that is still being written.
    """
    folder = Path(folder)
    if folder.name.endswith(".partial") or (folder / WORK).exists():
        raise OutputError(
            f"{folder} is still being written, or was interrupted", "run the command that writes it once more"
        )
    checkpoint = open_checkpoint(folder)
    source = checkpoint.source
    assert isinstance(source, LocalSource)
    sizes = source.files()
    files = {name: size for name, size in sizes.items() if is_part_of_checkpoint(name)}
    for name in files:
        source.local(name)  # a link out of the folder is refused
    text = source.read(CARD, 0, sizes[CARD]).decode(errors="replace") if CARD in sizes else ""
    identities = _identities(record := _record(source, sizes))
    card, changes = _card(text, record, identities)
    files[CARD] = len(card)
    left_out = sorted((sizes.keys() - files.keys()) | source.irregular().keys())
    bases = tuple(name for name in identities if name.startswith("hf://"))
    return HubUpload(folder, dict(sorted(files.items())), card, tuple(left_out), tuple(changes), bases)


def push(upload: HubUpload, to: HubRepository, *, private: bool, force: bool) -> str:
    """Send a checkpoint in one commit, and return the commit's address.

    `private`: make a new repository a private one. `force`: the commit also deletes the files of a checkpoint that is
    there; the Hub's history keeps them. Raises OutputError where a checkpoint is there, and for what the Hub refuses.
    """
    present = to.files()
    if not force and (CONFIG in present or any(name.endswith(".safetensors") for name in present)):
        raise OutputError(
            f"{to.url} holds a model already",
            "name another repository or --revision, or replace the model with --force: the Hub's history keeps it",
        )
    inherited = to.create(private=private or None)
    stale = [name for name in (*present, *inherited) if name not in upload.files and is_part_of_checkpoint(name)]
    contents: dict[str, Path | bytes] = {name: upload.folder / name for name in upload.files}
    contents[CARD] = upload.card
    return to.commit(f"Upload {upload.folder.resolve().name}", contents, stale)


def same_as_bases(upload: HubUpload, at: HubRepository) -> tuple[int, int] | None:
    """Return how many of the large files that were pushed the models that were edited hold too, and their bytes.

    Such files are stored once. What Xet shares of other files, by the chunk, huggingface_hub does not tell. None where
    no such model is known or one cannot be listed.
    """
    held: set[str] = set()
    try:
        for base in upload.bases:
            held |= repository_of(base).digests().keys()
        same = [size for digest, size in at.digests().items() if digest in held]
    except (OutputError, RecipeError):
        return None  # the checkpoint is there all the same
    return (len(same), sum(same)) if held else None


def _record(source: LocalSource, sizes: dict[str, int]) -> dict[str, Any]:
    """Return what moesurgery.json says; nothing where there is none that can be read."""
    if PROVENANCE not in sizes:
        return {}
    try:
        return read_object(source, PROVENANCE, sizes[PROVENANCE], _MOST_RECORD)
    except ValueError:
        return {}


def _identities(record: dict[str, Any]) -> list[str]:
    """Return what the provenance calls the models that were edited."""
    return [str(each.get("identity")) for each in record.get("inputs") or () if isinstance(each, dict)]


def _card(text: str, record: dict[str, Any], identities: list[str]) -> tuple[bytes, list[str]]:
    """Return README.md for the Hub, and what was changed of the one in the folder."""
    front, body = front_matter(text)
    parents = [name.removeprefix("hf://").split("@")[0] for name in identities if name.startswith("hf://")]
    changes = []
    inherited = bool(record) and MADE_WITH not in body
    if parents and (inherited or "base_model" not in front):
        front["base_model"] = parents
        changes.append(f"base_model: {', '.join(parents)}")
    if inherited:
        if front.pop("model-index", None) is not None:
            changes.append("model-index goes: those results are the original's")
        front.pop("base_model_relation", None)
        steps = [each for each in record.get("steps") or () if isinstance(each, dict)]
        done = "; ".join(f"{each.get('operation')}: {each.get('summary')}" for each in steps)
        names = ", ".join(f"`{name}`" for name in identities)
        body = f"\n> {MADE_WITH} {record.get('version')} from {names}: {done}. The card of that model follows.\n{body}"
        changes.append("a line says what was done to the model whose card it is")
    tags = front.get("tags")
    if "moesurgery" not in (tags := tags if isinstance(tags, list) else []):
        front["tags"] = [*tags, "moesurgery"]
    front.setdefault("library_name", "transformers")
    return with_front_matter(front, body).encode(), changes
