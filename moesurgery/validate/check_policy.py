"""P: what a checkpoint must not make anybody do. Nothing here is opened as code, and no link is followed out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import moesurgery.tied
from moesurgery.checkpoint.filenames import CONFIG, INDEX, TOKENIZER_CONFIG
from moesurgery.errors import CheckpointError
from moesurgery.validate.chat_template_scan import chat_templates
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context
from moesurgery.validate.pickle_scan import find_pickle

# The JSON files of a checkpoint in which loaders look for code.
_CONFIGS = (CONFIG, "generation_config.json", TOKENIZER_CONFIG, "processor_config.json")
_CODE_KEYS = ("_attn_implementation_internal", "_experts_implementation_internal")
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


@check("P03", "P04")
def files_inside(subject: Context) -> Outcome:
    """Every file is a regular one and lies in the checkpoint, links followed."""
    reported = {problem.file for problem in subject.scan.problems if problem.code == "P03"}
    for file, kind in subject.source.irregular().items():
        code = "P03" if "path" in kind else "P04"
        yield finding(code, f"is {kind}, not a regular file", file, hint="remove it, or copy the file it stands for")
    for file in subject.files:
        try:
            subject.source.local(file)
        except CheckpointError as error:
            if file not in reported:
                yield finding("P03", error.message, file, hint=error.hint)


@check("P01")
def no_pickles(subject: Context) -> Outcome:
    """No file is a pickle, whatever its name. Shards are looked at by S08."""
    shards = {header.file for header in subject.scan.headers}
    for file, size in subject.files.items():
        if file in shards or size == 0:
            continue
        try:
            pickle = find_pickle(size, partial(subject.source.read, file))
        except CheckpointError as error:
            yield NotChecked(("P01",), f"{file}: {error.message}")
            continue
        if pickle is None:
            continue
        hint = "moesurgery never opens it; remove it, or let nobody load it"
        if pickle.unexpected:
            named = ", ".join(pickle.unexpected[:5])
            yield finding("P01", f"is {pickle.kind} that names {named}", file, hint=hint, severity="error")
        else:
            partly = " (only its beginning was read)" if pickle.partial else ""
            yield finding("P01", f"is {pickle.kind}{partly}", file, hint=hint)


@check("P05")
def no_code(subject: Context) -> Outcome:
    """Code beside the weights runs wherever somebody says trust_remote_code."""
    foreign = [f for f in subject.files if f.endswith((".py", ".so", ".pyc")) and not _is_ours(subject, f)]
    for file in foreign:
        yield finding("P05", "is code that loaders run when told to trust it", file, hint="read it before you do")
    for file, config in _configs(subject):
        for path, key, value in _walk(config):
            if key == "auto_map" and value:
                ours = not foreign and _modules(value) <= set(subject.files)
                what = (
                    "names code that moesurgery wrote, byte for byte" if ours else "names code of the checkpoint's own"
                )
                yield finding("P05", f"{path} names {what}", file, severity="note" if ours else None)
            elif key in ("trust_remote_code", "custom_pipelines") and value:
                yield finding("P05", f"{path} asks to run code that comes with the model", file)


def _is_ours(subject: Context, file: str) -> bool:
    """Whether a file is the code that tie-blocks writes beside tied checkpoints, to the byte."""
    own = Path(moesurgery.tied.__file__).with_name("modeling_tied.py")
    if file != own.name or subject.files[file] != own.stat().st_size:
        return False
    try:
        return subject.source.read(file, 0, subject.files[file]) == own.read_bytes()
    except CheckpointError:
        return False


def _modules(auto_map: Any) -> set[str]:
    """Return the files that an `auto_map` names; those of another repository are none of a checkpoint's."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    return {f"{value.partition('.')[0]}.py" if isinstance(value, str) else "" for value in values}


@check("P06")
def no_code_keys(subject: Context) -> Outcome:
    """Keys through which a config made a loader fetch and run code (CVE-2026-4372 and its relatives)."""
    hint = "remove the key; choose implementations where the model is loaded"
    for file, config in _configs(subject):
        for path, key, value in _walk(config):
            if key in _CODE_KEYS and value is not None:
                yield finding("P06", f"{path} is {value!r}: loaders before transformers 5.3 fetch it", file, hint=hint)
            elif key in _KERNEL_KEYS and any("/" in name for name in _texts(value)):
                yield finding("P06", f"{path} is {value!r}: a kernel that loaders fetch from the Hub", file, hint=hint)
            elif key == "custom_generate" and value:
                yield finding("P06", f"{path} is {value!r}: code that generation fetches", file, hint=hint)


@check("P07", "P09")
def names(subject: Context) -> Outcome:
    """Names of tensors and files are such that no terminal, shell or filesystem stumbles over them."""
    for file in (*subject.files, *subject.source.irregular()):
        if any(unicodedata.category(c) in ("Cc", "Cs", "Cf", "Zl", "Zp") for c in file):
            yield finding("P07", "the file's name contains control characters", file, severity="warning")
    tensors = dict.fromkeys(info.name for header in subject.scan.headers for info in header.tensors)
    for kind, all_names in (("files", subject.files), ("tensors", tensors)):
        for group in _alike(all_names):
            shown = " and ".join(repr(name) for name in group[:3])
            yield finding("P09", f"{len(group)} {kind} have names that differ only in form: {shown}")


@check("P08")
def templates(subject: Context) -> Outcome:
    """Chat templates are read as a syntax tree, never rendered."""
    for template in chat_templates(subject):
        for problem in template.problems():
            yield finding(
                "P08", f"{template.place} {problem}", template.file, hint="do not render it outside a sandbox"
            )


def _configs(subject: Context) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in subject.files:
        if file in _CONFIGS or (file.endswith("config.json") and file != INDEX and "/" not in file):
            config = subject.object_or_none(file)
            if config is not None:
                yield file, config


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted path, key, value) for every key at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, key, inner
            yield from _walk(inner, here)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{i}]")


def _texts(value: Any) -> Iterable[str]:
    """Yield the strings in `value`: implementations may be given for each part of a model."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)


_SPACE = re.compile(r"\s+")


def _alike(found: Iterable[str]) -> list[list[str]]:
    """Group names that some filesystems and people take for one."""
    groups: dict[str, list[str]] = {}
    for name in found:
        folded = name if name.isascii() else unicodedata.normalize("NFKC", name)
        groups.setdefault(_SPACE.sub(" ", folded.casefold()).strip(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
