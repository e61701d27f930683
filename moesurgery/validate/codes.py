"""Every code that `validate` can report. Append only: CI jobs ignore and count by code.

docs/codes.md is generated from this table. A test demands a broken checkpoint in tests/ for every code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesurgery.checkpoint.finding import Severity

Level = Literal["container", "config", "values", "forward", "client", "against"]

LEVELS: tuple[Level, ...] = ("container", "config", "values", "forward")


@dataclass(frozen=True)
class Code:
    """One kind of finding. `severity` is the usual one; a finding may be milder or graver where `title` says so."""

    code: str
    level: Level
    severity: Severity
    title: str


_TABLE: tuple[tuple[str, Level, Severity, str], ...] = (
    ("P01", "container", "warning", "a pickle, by content, whatever its name; an error where it calls more than torch"),
    ("P02", "container", "error", "no safetensors weights, or none at all"),
    ("P03", "container", "error", "a path or a link leads out of the checkpoint"),
    ("P04", "container", "error", "not a regular file: a pipe, a socket, a device"),
    ("P05", "container", "warning", "code beside the weights: `auto_map`, `.py` files, `trust_remote_code`"),
    ("P06", "container", "error", "a config key that makes a loader fetch or run code"),
    ("P07", "container", "error", "a name with control characters or path parts, or an empty one"),
    ("P08", "container", "error", "a chat template that reaches for Python's internals"),
    ("P09", "container", "warning", "names that differ only in case or in Unicode form"),
    ("S01", "container", "error", "the header's length: missing, over 100 MB, or beyond the file"),
    ("S02", "container", "error", "the header is no UTF-8 JSON object; a warning where only space stands before it"),
    ("S03", "container", "error", "a key twice in a header"),
    ("S04", "container", "error", "an unknown dtype, or a shape that is none"),
    ("S05", "container", "error", "a tensor's byte range does not fit its dtype and shape"),
    ("S06", "container", "error", "tensors overlap, leave holes, or do not end with the file (a truncated copy)"),
    ("S07", "container", "warning", "`__metadata__` is missing; an error where it is not an object of strings"),
    ("S08", "container", "error", "another kind of file in place of weights: LFS pointer, HTML, zip, pickle, GGUF"),
    ("S09", "container", "error", "files differ from what `moesurgery.json` says was written"),
    ("S10", "container", "warning", "a hole in the file that was never written and reads as zeros"),
    ("S11", "container", "error", "a file cannot be read: the disk or the network fails"),
    ("G01", "container", "error", "no GGUF of version 2 or 3 in little-endian order"),
    ("G02", "container", "error", "a GGUF header that is cut off, or counts more than its file can hold"),
    ("G03", "container", "error", "a GGUF key or value that is none, or a key twice"),
    ("G04", "container", "error", "a GGUF alignment that is no power of two"),
    ("G05", "container", "error", "a GGUF tensor's name: empty, too long for llama.cpp, given twice"),
    (
        "G06",
        "container",
        "error",
        "a GGUF tensor's shape: too many dimensions or elements, or rows that fill no blocks",
    ),
    ("G07", "container", "error", "a GGUF tensor of an unknown type"),
    ("G08", "container", "error", "GGUF tensors overlap, leave holes, or are not aligned"),
    ("G09", "container", "error", "a GGUF file ends before its tensors do, or goes on after them"),
    ("G10", "container", "error", "a GGUF that is no model: an imatrix, an adapter, or without an architecture"),
    ("G11", "container", "error", "parts of a GGUF are missing, misnumbered, or disagree on their tensors"),
    ("G12", "container", "error", "several GGUF models in one folder, and none of them named"),
    ("I01", "container", "error", "the index is not what an index is, or maps a name twice"),
    (
        "I02",
        "container",
        "error",
        "the index names a shard that is not there, or a tensor that its shard does not hold",
    ),
    ("I03", "container", "error", "a tensor stands in two shards, or is not in the index"),
    ("I04", "container", "warning", "`total_size` or the numbers in the shards' names are wrong"),
    ("I05", "container", "error", "two checkpoints in one folder; a warning for a stale shard"),
    ("I06", "container", "error", "several shards and no index"),
    ("C01", "container", "error", "config.json is missing or cannot be parsed; a warning for a key given twice"),
    ("C02", "config", "error", "names and shapes are not what the family table makes of the config"),
    ("C03", "config", "error", "names and shapes are not what transformers' own model class makes of the config"),
    (
        "C04",
        "config",
        "error",
        "experts are missing, not numbered 0 to n-1, of unequal shape, or not as many as stated",
    ),
    ("C05", "config", "error", "a router, its bias or its groups do not fit the number of experts"),
    ("C06", "config", "error", "top-k is not a whole number from 1 to the experts that can be reached"),
    (
        "C07",
        "config",
        "error",
        "the layers of the tensors are not the layers of the config, or MoE where it says dense",
    ),
    ("C08", "config", "error", "the head is missing though untied, or there though tied and of another shape"),
    ("C09", "config", "error", "vocabulary, embedding and special tokens disagree; generation_config.json: a warning"),
    ("C10", "config", "error", "element types mixed within one role, or integers without quantization_config"),
    ("C11", "config", "warning", "a tensor outside the architecture: left over from something else"),
    ("C12", "config", "error", "`layer_tie_map` does not fit the layers"),
    ("C13", "config", "error", "quantised weights without scales, scales without weights, or of the wrong shape"),
    ("C14", "config", "warning", "`architectures` and `model_type` name different models"),
    (
        "C15",
        "config",
        "error",
        "a file that describes quantisation, or a list of modules in config.json, does not fit the weights",
    ),
    ("C16", "config", "error", "NaN in a JSON file, which is no JSON; Infinity, which some configs mean: a warning"),
    ("G13", "config", "error", "GGUF metadata that llama.cpp asks for are missing, or do not fit the tensors"),
    ("K01", "client", "error", "with --for: the program has no code for the type, or computes something else"),
    ("K02", "client", "error", "with --for: the experts are in a layout that the program does not read"),
    ("K03", "client", "error", "with --for: RoPE under keys that the program does not read: it takes a default"),
    ("K04", "client", "error", "with --for: config keys that the program needs are missing"),
    ("K05", "client", "error", "with --for: a tied head, which the program does not make of the embedding"),
    ("K06", "client", "error", "with --for: a shared expert's gate of zeros, of which the program makes NaN"),
    ("K07", "client", "note", "with --for: a number of experts, or a width, that the program's kernels take badly"),
    ("T01", "config", "error", "the tokenizer cannot be parsed, or gives ids beyond the embedding"),
    ("T02", "config", "error", "special tokens that the tokenizer does not have, or a chat template that is none"),
    ("V01", "values", "error", "NaN or infinity in a weight"),
    ("V02", "values", "error", "a norm, embedding or head that is all zero; other weights: a warning"),
    ("V03", "values", "warning", "experts of one layer that are identical, byte for byte"),
    ("V04", "values", "warning", "values out of line with their siblings by orders of magnitude, or close to overflow"),
    ("V05", "values", "error", "a stretch of zeros inside a weight: the mark of an interrupted copy"),
    ("V06", "values", "error", "tied embeddings, and a head that differs from the embedding"),
    ("V07", "values", "warning", "layers that are identical, byte for byte, and not tied: one written twice"),
    ("F01", "forward", "error", "logits that are not finite, or the same for every token"),
    ("F02", "forward", "error", "with --against: logits that differ from the reference beyond the tolerance"),
    ("F03", "forward", "warning", "most experts of a layer were chosen by no token: a router that has collapsed"),
    ("R01", "against", "error", "the provenance cannot be replayed on this reference"),
    ("R02", "against", "error", "a tensor that should be untouched differs from the reference"),
    ("R03", "against", "error", "an edited tensor is not what its recipe computes from the reference"),
    ("R04", "against", "error", "a tensor that the recipe does not leave, or one that it leaves and is missing"),
    ("R05", "against", "error", "config.json is not what the recipe makes of the reference's"),
    (
        "R06",
        "against",
        "error",
        "tokenizer, template or code are not what the recipe writes, or leaves (a warning)",
    ),
)

CODES: dict[str, Code] = {row[0]: Code(*row) for row in _TABLE}
