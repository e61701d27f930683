"""The reader of GGUF headers against the package gguf, and against files that are wrong in one way each."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf.quants import dequantize

from moesurgery import open_checkpoint
from moesurgery.checkpoint.arrays import decoded
from moesurgery.checkpoint.block_values import FACTORS, REQUANTISED, multiplied_blocks, quantised_blocks
from moesurgery.checkpoint.dtypes import BITS, BLOCKS, GGUF_TYPES
from moesurgery.checkpoint.gguf_header import encoded_key, scan_gguf_header
from moesurgery.checkpoint.source_address import open_source
from moesurgery.count.params import count_params
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.families.recognition import recognise
from moesurgery.validate.codes import CODES
from moesurgery.validate.run_checks import validate_checkpoint
from tests.gguf_make import KEYS, TENSORS, header_bytes, key_bytes, of_type, write_gguf


def test_types_are_those_of_the_library() -> None:
    for kind, (elements, nbytes) in GGML_QUANT_SIZES.items():
        assert GGUF_TYPES[int(kind)] == kind.name
        assert BITS[kind.name] * elements == 8 * nbytes
    assert {name for name in GGUF_TYPES.values() if name in BLOCKS} == BLOCKS.keys()


def test_a_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "Q4_K", bias=True)
    checkpoint, reader = open_checkpoint(path), GGUFReader(path)
    header = checkpoint.gguf
    assert header is not None
    assert header.values == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert [(t.name, t.dtype, list(t.shape), t.start, t.nbytes) for t in checkpoint.tensors.values()] == [
        (t.name, t.tensor_type.name, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    for key, entry in header.entries.items():  # what is not edited is written as it was read
        if header.kinds[key] != 9:
            assert encoded_key(key, header.kinds[key], header.values[key]) == entry


@pytest.mark.parametrize("kind", sorted(BLOCKS.keys() - {"Q8_1", "Q8_K", "Q1_0", "Q2_0"}))
def test_values_and_factors_of_blocks(kind: str) -> None:
    """A power of two on the factors is exact, any other as near as half precision is."""
    from gguf import GGMLQuantizationType

    blocks = of_type(np.random.default_rng(1), (3, 512), kind)
    values = dequantize(blocks, GGMLQuantizationType[kind])
    assert (decoded(blocks.tobytes(), kind).reshape(3, 512) == values).all()
    if kind in REQUANTISED:
        assert bytes(quantised_blocks(values, kind)) == blocks.tobytes()
    if kind not in FACTORS:
        return
    doubled = decoded(multiplied_blocks(blocks.tobytes(), kind, 2.0), kind).reshape(3, 512)
    assert (doubled == 2 * values).all()
    third = decoded(multiplied_blocks(blocks.tobytes(), kind, 1 / 3), kind).reshape(3, 512)
    assert np.abs(third - values / 3).max() <= 2**-10 * np.abs(values).max() / 3 + 1e-12
    with pytest.raises(RefusedError, match="half precision"):
        multiplied_blocks(blocks.tobytes(), kind, 1e9)


def test_the_hand_made_file_is_right(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes())
    report = validate_checkpoint(path)
    assert [f.code for f in report.findings if f.severity == "error"] == []


Break = Callable[[], bytes]
CASES: dict[str, tuple[str, Break]] = {}


def case(code: str) -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        CASES[function.__name__] = code, function
        return function

    return register


def _with_key(key: str, kind: int, value: object) -> bytes:
    return header_bytes([*(k for k in KEYS if k[0] != key), (key, kind, value)])


def _with_tensor(number: int, name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    tensors = list(TENSORS)
    tensors[number] = name, sizes, kind, offset
    return header_bytes(tensors=tensors)


UP = TENSORS[3]

for name, code, made in (
    ("wrong_magic", "G01", lambda: header_bytes(magic=b"GGML")),
    ("version_1", "G01", lambda: header_bytes(version=1)),
    ("big_endian", "G01", lambda: header_bytes(version=3 << 24)),
    ("empty", "G02", lambda: b""),
    ("cut_in_the_header", "G02", lambda: header_bytes()[:200]),
    ("too_many_tensors_stated", "G02", lambda: header_bytes(counts=(2**63, None))),
    ("too_many_keys_stated", "G02", lambda: header_bytes(counts=(None, 2**40))),
    ("one_tensor_more_stated", "G02", lambda: header_bytes(counts=(6, None), data=0)),
    ("array_longer_than_the_file", "G02", lambda: _with_key("x", 9, struct.pack("<IQ", 4, 2**60))),
    ("texts_more_than_the_file", "G02", lambda: _with_key("x", 9, struct.pack("<IQ", 8, 2**60))),
    ("text_longer_than_allowed", "G03", lambda: _with_key("x", 8, struct.pack("<Q", 2**62))),
    ("key_twice", "G03", lambda: header_bytes([*KEYS, KEYS[1]])),
    ("key_of_no_type", "G03", lambda: _with_key("x", 13, b"1234")),
    ("array_of_arrays", "G03", lambda: _with_key("x", 9, struct.pack("<IQ", 9, 1))),
    ("no_boolean", "G03", lambda: _with_key("x", 7, 2)),
    ("empty_key", "G03", lambda: _with_key("", 4, 1)),
    ("not_utf8", "G03", lambda: _with_key("x", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    ("alignment_of_three", "G04", lambda: _with_key("general.alignment", 4, 3)),
    ("alignment_as_text", "G04", lambda: _with_key("general.alignment", 8, "32")),
    ("name_twice", "G05", lambda: _with_tensor(3, TENSORS[2][0], *UP[1:])),
    ("name_too_long", "G05", lambda: _with_tensor(3, "blk.0." + "x" * 60, *UP[1:])),
    ("name_of_nothing", "G05", lambda: _with_tensor(3, "", *UP[1:])),
    ("five_dimensions", "G06", lambda: _with_tensor(3, UP[0], (32, 32, 2, 1, 1), *UP[2:])),
    ("more_elements_than_a_file", "G06", lambda: _with_tensor(3, UP[0], (2**40, 2**40), *UP[2:])),
    ("rows_of_half_blocks", "G06", lambda: _with_tensor(3, UP[0], (48, 32, 2), *UP[2:])),
    ("type_4_was_removed", "G07", lambda: _with_tensor(3, UP[0], UP[1], 4, UP[3])),
    ("tensors_overlap", "G08", lambda: _with_tensor(3, UP[0], UP[1], UP[2], 512)),
    ("tensors_leave_a_hole", "G08", lambda: _with_tensor(4, TENSORS[4][0], *TENSORS[4][1:3], 2848)),
    ("offset_not_aligned", "G08", lambda: _with_tensor(3, UP[0], UP[1], UP[2], 1665)),
    ("truncated", "G09", lambda: header_bytes(data=3000)),
    ("bytes_after_the_end", "G09", lambda: header_bytes(data=5000)),
    ("no_architecture", "G10", lambda: header_bytes(KEYS[1:])),
    ("an_imatrix", "G10", lambda: header_bytes([*KEYS, ("general.type", 8, "imatrix")])),
    ("says_it_is_one_of_two", "G11", lambda: header_bytes([*KEYS, ("split.no", 2, 0), ("split.count", 2, 2)])),
    ("no_head_count", "G13", lambda: header_bytes([k for k in KEYS if "head" not in k[0]])),
    ("three_tokens", "G13", lambda: _with_key("tokenizer.ggml.tokens", 9, (8, ["a", "b", "c"]))),
    ("no_expert_count", "G13", lambda: header_bytes([k for k in KEYS if k[0] != "qwen3moe.expert_count"])),
    ("wrong_expert_count", "C04", lambda: _with_key("qwen3moe.expert_count", 4, 3)),
    ("router_of_three", "C05", lambda: header_bytes(tensors=_shifted(3), data=DATA_WITH_THREE)),
    ("top_k_of_five", "C06", lambda: _with_key("qwen3moe.expert_used_count", 4, 5)),
    ("two_layers_stated", "C07", lambda: _with_key("qwen3moe.block_count", 4, 2)),
):
    CASES[name] = code, made


DATA_WITH_THREE = 3968 + 128


def _shifted(rows: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Return the tensors with a router of so many rows."""
    tensors, shift = [], 0
    for name, sizes, kind, offset in TENSORS:
        more = name == "blk.0.ffn_gate_inp.weight"
        tensors.append((name, (32, rows) if more else tuple(sizes), kind, offset + shift))
        shift += 128 * (rows - 2) if more else 0
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_named_by_its_code(name: str, tmp_path: Path) -> None:
    code, made = CASES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(made())
    report = validate_checkpoint(path)
    errors = {finding.code for finding in report.findings if finding.severity == "error"}
    assert errors == {code}
    if CODES[code].level == "container":
        with pytest.raises(CheckpointError) as refused:
            open_checkpoint(path)
        assert "m.gguf" in refused.value.message
        assert refused.value.hint


def test_parts(tmp_path: Path) -> None:
    """A set is opened by any of its parts; one that is missing, or belongs to another set, is named."""
    first = write_gguf(tmp_path / "m.gguf", parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    whole = open_checkpoint(first)
    assert open_checkpoint(parts[1]).tensors == whole.tensors == open_checkpoint(tmp_path).tensors
    assert validate_checkpoint(first).findings == ()
    (tmp_path / "one").mkdir()
    single = open_checkpoint(write_gguf(tmp_path / "one" / "x.gguf"))
    assert [t[:3] for t in whole.tensors.values()] == [t[:3] for t in single.tensors.values()]
    copied = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    assert {f.code for f in validate_checkpoint(first).findings} == {"G11"}
    parts[1].write_bytes(copied)
    parts[2].unlink()
    assert [f.code for f in validate_checkpoint(first).findings] == ["G11"]
    with pytest.raises(CheckpointError, match="do not exist"):
        open_checkpoint(tmp_path)


def test_a_folder_of_several_models_is_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.Q4_0.gguf", "a.Q8_0.gguf", "mmproj-a.gguf", "a.imatrix.gguf"):
        (tmp_path / name).write_bytes(header_bytes())
    assert [f.code for f in validate_checkpoint(tmp_path).findings] == ["G12"]
    with pytest.raises(CheckpointError, match="2 GGUF models") as refused:
        open_checkpoint(tmp_path)
    assert "a.Q4_0.gguf" in str(refused.value.hint)
    (tmp_path / "a.Q8_0.gguf").unlink()
    assert open_checkpoint(tmp_path).shards == ["a.Q4_0.gguf"]


def test_every_code_of_gguf_has_a_case() -> None:
    assert {code for code, _ in CASES.values()} | {"G12"} >= {code for code in CODES if code[0] == "G"}


def test_lengths_are_not_believed(tmp_path: Path) -> None:
    """A header of a few bytes that promises a file of exabytes is refused before anything of that size is asked for."""
    content = header_bytes([(KEYS[0]), ("x", 8, struct.pack("<Q", 2**27))], data=0)
    asked: list[int] = []

    def read(start: int, length: int) -> bytes:
        asked.append(length)
        return content[start : start + length]

    assert scan_gguf_header("x.gguf", len(content), read).problems[0].code == "G02"
    assert max(asked) <= len(content)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Path]:
    """A model of 100 GB of holes: 94 layers of 128 experts, as Qwen3-235B-A22B has, with a vocabulary."""
    keys = [k for k in KEYS if not k[0].startswith(("tokenizer", "qwen3moe.block", "qwen3moe.expert", "qwen3moe.emb"))]
    keys += [("qwen3moe.block_count", 4, 94), ("qwen3moe.embedding_length", 4, 4096)]
    keys += [("qwen3moe.expert_count", 4, 128), ("qwen3moe.expert_used_count", 4, 8)]
    keys += [("tokenizer.ggml.tokens", 9, (8, [f"token {i}" for i in range(151_936)]))]
    tensors, at = [], 0

    def add(name: str, sizes: tuple[int, ...], kind: int, nbytes: int) -> None:
        nonlocal at
        tensors.append((name, sizes, kind, at))
        at += nbytes

    add("token_embd.weight", (4096, 151_936), 2, 4096 * 151_936 * 18 // 32)
    for layer in range(94):
        add(f"blk.{layer}.ffn_gate_inp.weight", (4096, 128), 0, 4096 * 128 * 4)
        for kind in ("gate", "up", "down"):
            sizes = (4096, 1536, 128) if kind != "down" else (1536, 4096, 128)
            add(f"blk.{layer}.ffn_{kind}_exps.weight", sizes, 10, 4096 * 1536 * 128 // 256 * 84)
    path = tmp_path / "large.gguf"
    content = header_bytes(keys, tensors, data=0)
    path.write_bytes(content)
    os.truncate(path, len(content) + at)
    yield path
    path.unlink()


def test_a_hundred_gigabytes_are_counted_at_once(sparse: Path) -> None:
    begun = time.process_time()
    checkpoint = open_checkpoint(sparse)
    counts = count_params(recognise(checkpoint.config, checkpoint.tensors), checkpoint.tensors)
    assert time.process_time() - begun < 3
    assert sparse.stat().st_size > 7e10
    assert (counts.num_experts, counts.num_moe_layers) == (128, 94)
    assert counts.components["routed_experts"] == 94 * 128 * 3 * 4096 * 1536


def test_references() -> None:
    assert open_source("s3://b/m/x-00001-of-00002.gguf").name == "x"
    with pytest.raises(CheckpointError, match="does not name a model"):
        open_source("hf://org/name/file.txt")


def test_keys_of_all_types_are_read(tmp_path: Path) -> None:
    more = [(f"x.{kind}", kind, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)]
    more += [("x.long", 9, (5, [-1] * 5000)), ("x.short", 9, (12, [0.5, 2.5]))]
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes([*KEYS, *more]))
    header = open_checkpoint(path).gguf
    assert header is not None
    assert [header.values[key] for key, *_ in more[:-2]] == [1] * 11
    assert header.values["x.short"] == [0.5, 2.5]
    assert header.values["x.long"].startswith("5000 numbers, SHA-256 ")
    assert header.lengths["x.long"] == 5000
    assert key_bytes(*more[-1]) == header.entries["x.short"]
