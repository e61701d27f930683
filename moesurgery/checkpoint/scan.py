"""Read all of a checkpoint but its weights, and collect everything that is wrong with it.

The one reader of config, index and headers: `open_checkpoint` raises at the first fatal finding, `validate`
reports them all. It reads no path outside the checkpoint and trusts no length before checking it.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from moesurgery.checkpoint.filenames import CONFIG, INDEX, SINGLE
from moesurgery.checkpoint.finding import Finding, Severity
from moesurgery.checkpoint.gguf_files import config_of, gguf_models, part_problems
from moesurgery.checkpoint.gguf_header import GgufHeader, scan_gguf_header
from moesurgery.checkpoint.header import Header, TensorInfo, scan_header
from moesurgery.checkpoint.source import LocalSource, Source, gguf_parts, is_contained
from moesurgery.checkpoint.strict_json import parse_json, repeated_keys
from moesurgery.cpu_count import cores
from moesurgery.errors import CheckpointError

MAX_CONFIG_BYTES = 16_000_000
MAX_INDEX_BYTES = 200_000_000
MAX_ALIKE = 1000  # findings with one code: a hostile index could make millions

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# Weights in other forms. They would be stale beside an edited checkpoint, so they are not carried over.
OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|pkl)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"-\d+-of-(\d+)\.")


@dataclass
class Scan:
    """A checkpoint as far as it could be read. `problems` come in the order in which an opener meets them."""

    source: Source
    sizes: dict[str, int]
    headers_only: bool = False
    config: dict[str, Any] | None = None
    weight_map: dict[str, str] | None = None
    index_metadata: dict[str, Any] | None = None
    headers: list[Header] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    def add(
        self,
        code: str,
        message: str,
        file: str | None = None,
        tensor: str | None = None,
        *,
        hint: str | None = None,
        fatal: bool = True,
        severity: Severity = "error",
    ) -> None:
        if sum(p.code == code for p in self.problems[-MAX_ALIKE:]) < MAX_ALIKE:
            self.problems.append(Finding(code, message, file, tensor, hint, severity, fatal))

    def read_object(self, file: str, code: str, limit: int) -> dict[str, Any] | None:
        """Read one JSON object; where it cannot be read, add a finding `code` and return None."""
        try:
            self.source.local(file)
        except CheckpointError as error:
            self.add("P03", error.message, file, hint=error.hint)
            return None
        try:
            return read_object(self.source, file, self.sizes[file], limit)
        except CheckpointError as error:
            self.add("S11", error.message, file, hint=error.hint)
        except ValueError as error:
            self.add(code, str(error), file)
        return None

    @property
    def broken(self) -> set[str]:
        """The shards whose headers cannot be trusted."""
        return {header.file for header in self.headers if any(p.fatal for p in header.problems)}


def read_object(source: Source, file: str, size: int, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object of a checkpoint. Raises ValueError for what it holds, CheckpointError for the disk."""
    if size > limit:
        raise ValueError(f"is {size:,} bytes, too large for its kind")
    try:
        # Real configs hold Infinity (Mamba's time_step_limit): Python writes it, so it is read and kept.
        value = parse_json(source.read(file, 0, size), config=True)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def scan_checkpoint(source: Source, *, headers_only: bool = False) -> Scan:
    """Read config, index and headers. Raises CheckpointError only where the files cannot even be listed.

    `headers_only`: shards may end before their data does.
    """
    scan = Scan(source, source.files(), headers_only)
    models = gguf_models(scan.sizes)
    if models and not any(file.endswith(".safetensors") and "/" not in file for file in scan.sizes):
        _read_gguf(scan, models)
        return scan
    _read_config(scan)
    files = _read_index(scan) if INDEX in scan.sizes else _find_shards(scan)
    _read_headers(scan, files)
    _check_names(scan)
    return scan


def _read_gguf(scan: Scan, models: list[str]) -> None:
    """Read the GGUF that a folder or a reference holds."""
    if len(models) > 1:
        scan.add(
            "G12",
            f"{scan.source.identity} holds {len(models)} GGUF models",
            hint=f"name one of them: {', '.join(models[:5])}",
        )
        return
    parts = gguf_parts(models[0])
    if missing := [file for file in parts if file not in scan.sizes]:
        scan.add(
            "G11", f"of {len(parts)} parts, {', '.join(missing[:3])} do not exist", hint="download the missing parts"
        )
    _read_headers(scan, [file for file in parts if file in scan.sizes and _may_be_read(scan, file)])
    headers = [header for header in scan.headers if isinstance(header, GgufHeader)]
    if len(headers) == len(parts) and not scan.problems:
        scan.problems += part_problems(headers, parts)
        scan.config = config_of(headers[0])


def _read_config(scan: Scan) -> None:
    if CONFIG not in scan.sizes:
        scan.add("C01", f"{scan.source.identity} has no {CONFIG}", hint=_hint_without_config(scan.source))
        return
    scan.config = scan.read_object(CONFIG, "C01", MAX_CONFIG_BYTES)
    for key in repeated_keys(scan.config):
        scan.add("C01", f"has the key {key!r} twice; readers take the last", CONFIG, fatal=False, severity="warning")


def _hint_without_config(source: Source) -> str:
    if isinstance(source, LocalSource):
        below = [*source.root.glob(f"*/{CONFIG}"), *source.root.glob(f"snapshots/*/{CONFIG}")]  # the Hub's cache
        folders = sorted(p.parent.relative_to(source.root).as_posix() for p in below)
        if folders:
            return f"did you mean one of its folders: {', '.join(folders[:5])}?"
    return "name the folder that holds config.json and *.safetensors"


def _read_index(scan: Scan) -> list[str]:
    """Read the index; return the shards that it names and that are there."""
    index = scan.read_object(INDEX, "I01", MAX_INDEX_BYTES)
    if index is None:
        return _top_level_shards(scan)
    for key in repeated_keys(index):
        scan.add("I01", f"has the key {key!r} twice", INDEX)
    metadata, weight_map = index.get("metadata"), index.get("weight_map")
    scan.index_metadata = metadata if isinstance(metadata, dict) else {}
    if not isinstance(metadata, dict):
        scan.add("I01", "has no `metadata` object, which transformers asks for", INDEX, fatal=False)
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        scan.add("I01", "weight_map is not a non-empty object of file names", INDEX)
        return _top_level_shards(scan)
    for name in repeated_keys(weight_map):
        scan.add("I01", "is mapped twice", INDEX, name)
    scan.weight_map = weight_map
    files = sorted(set(weight_map.values()))
    shards = [file for file in files if _is_shard(scan, file)]
    if SINGLE in scan.sizes and SINGLE not in files:
        scan.add(
            "I05",
            f"{scan.source.identity} has both {SINGLE} and {INDEX}, and loaders disagree on which counts",
            hint="remove the one that is stale",
        )
    for file in scan.sizes:
        if SHARD.fullmatch(file) and file not in files:
            scan.add(
                "I05",
                "is a shard that the index does not name: a stale one?",
                file,
                hint="remove it, or make the index complete",
                fatal=False,
                severity="warning",
            )
    _check_numbering(scan, files)
    return shards


def _is_shard(scan: Scan, file: str) -> bool:
    """Whether a file that the index names is there and may be read."""
    if not is_contained(file):
        hint = "a checkpoint may only name files beside its config.json; do not use this one"
        scan.add("P03", f"the path {file!r} leaves the checkpoint", INDEX, hint=hint)
    elif not file.endswith(".safetensors"):
        scan.add("I01", f"names {file!r}, which is no .safetensors file", INDEX)
    elif file not in scan.sizes:
        assert scan.weight_map is not None
        named = sum(f == file for f in scan.weight_map.values())
        scan.add(
            "I02", f"names {file} ({named} tensors), which does not exist", INDEX, hint="download the missing shard"
        )
    else:
        return _may_be_read(scan, file)
    return False


def _may_be_read(scan: Scan, file: str) -> bool:
    """Whether `file` lies in the checkpoint, links followed; checked before any of it is read."""
    try:
        scan.source.local(file)
    except CheckpointError as error:
        scan.add("P03", error.message, file, hint=error.hint)
        return False
    return True


def _check_numbering(scan: Scan, files: list[str]) -> None:
    """`-of-N` in the shards' names is the number of shards."""
    numbered = [int(match[1]) for file in files if (match := _NUMBERED.search(file))]
    if set(numbered) - {len(numbered)}:
        counts = " and ".join(f"-of-{n:05d}" for n in sorted(set(numbered)))
        message = f"names {len(numbered)} numbered shards, their names say {counts}"
        scan.add("I04", message, INDEX, fatal=False, severity="warning")


def _top_level_shards(scan: Scan) -> list[str]:
    """Return the files that look like shards where no index lists them, so that their headers are checked too."""
    return [f for f in scan.sizes if f.endswith(".safetensors") and "/" not in f and _may_be_read(scan, f)]


def _find_shards(scan: Scan) -> list[str]:
    """Return the shards of a checkpoint without an index."""
    numbered = [file for file in scan.sizes if SHARD.fullmatch(file)]
    if SINGLE in scan.sizes:
        if numbered:
            scan.add(
                "I05",
                f"{scan.source.identity} has both {SINGLE} and numbered shards without an index",
                hint="remove what is stale",
                fatal=False,
                severity="warning",
            )
        return [SINGLE] if _may_be_read(scan, SINGLE) else []
    if not numbered:
        others = [f for f in scan.sizes if OTHER_WEIGHTS.fullmatch(f) and "/" not in f]
        if others:
            scan.add(
                "P02",
                f"{scan.source.identity} has no {SINGLE} or {INDEX}, only {', '.join(others[:3])}",
                hint="convert the weights to safetensors first; pickles are never opened",
            )
        else:
            scan.add("P02", f"{scan.source.identity} has no weights", hint=f"it should hold {SINGLE} or {INDEX}")
        return []
    counts = sorted({int(match[2]) for file in numbered if (match := SHARD.fullmatch(file))})
    if len(counts) > 1:
        scan.add(
            "I05",
            f"{scan.source.identity} holds shards of several checkpoints: -of-" + " and -of-".join(map(str, counts)),
            hint="remove the stale ones",
        )
        return []
    expected = [f"model-{i:05d}-of-{counts[0]:05d}.safetensors" for i in range(1, min(counts[0], 99_999) + 1)]
    missing = [file for file in expected if file not in scan.sizes]
    if missing or len(numbered) > len(expected):
        what = (
            f"of {counts[0]} shards, {', '.join(missing[:3])} do not exist" if missing else "the shards are misnumbered"
        )
        scan.add("I02", f"{scan.source.identity}: {what}", hint="download the missing shards")
    elif counts[0] > 1:
        scan.add("I06", f"{counts[0]} shards but no {INDEX}: transformers cannot load them", fatal=False)
    return [file for file in numbered if _may_be_read(scan, file)]


def _read_headers(scan: Scan, files: list[str]) -> None:
    """Read all headers, in parallel, and add findings for what is wrong with them."""

    def header_of(file: str) -> Header | CheckpointError:
        try:
            reader = scan_gguf_header if file.lower().endswith(".gguf") else scan_header
            return reader(
                file,
                scan.sizes[file],
                lambda start, length: scan.source.read(file, start, length),
                headers_only=scan.headers_only,
            )
        except CheckpointError as error:
            return error

    if len(files) < 2:
        headers = [header_of(file) for file in files]
    else:
        workers = 2 * cores() if isinstance(scan.source, LocalSource) else 16
        with ThreadPoolExecutor(min(workers, len(files))) as pool:
            headers = list(pool.map(header_of, files))
    for file, header in zip(files, headers, strict=True):
        if isinstance(header, Header):
            scan.headers.append(header)
            scan.problems += header.problems
        else:
            scan.add("S11", header.message, file, hint=header.hint)


def _check_names(scan: Scan) -> None:
    """Check that every tensor is in exactly one shard, the one that the index lists."""
    tensors: dict[str, TensorInfo] = {}
    for header in scan.headers:
        for info in header.tensors:
            if (first := tensors.setdefault(info.name, info)) is not info:
                scan.add("I03", f"stands in both {first.file} and {info.file}", tensor=info.name)
    if scan.weight_map is None:
        return
    readable = {header.file for header in scan.headers} - scan.broken
    for name, file in scan.weight_map.items():
        if name in tensors and tensors[name].file != file:
            scan.add("I02", f"is mapped to {file}, but it is in {tensors[name].file}", INDEX, name)
        elif name not in tensors and file in readable:
            scan.add(
                "I02",
                f"is mapped to {file}, which does not hold it",
                INDEX,
                name,
                hint="the index is stale or a shard belongs to another model",
            )
    for name, info in tensors.items():
        if name not in scan.weight_map:
            scan.add(
                "I03",
                f"is in {info.file} but not listed in {INDEX}",
                info.file,
                name,
                hint="loaders would read it all the same; make the index complete or remove the stale shard",
            )
    if readable.issuperset(scan.weight_map.values()):
        _check_total(scan, tensors)


def _check_total(scan: Scan, tensors: dict[str, TensorInfo]) -> None:
    total = (scan.index_metadata or {}).get("total_size")
    stored = sum(info.nbytes for info in tensors.values())
    if total is not None and total != stored:
        scan.add(
            "I04", f"total_size is {total!r}, the tensors take {stored:,} bytes", INDEX, fatal=False, severity="warning"
        )
