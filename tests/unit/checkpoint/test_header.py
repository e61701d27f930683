"""The strict header reader: one hostile file per kind, each refused by its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesurgery.checkpoint.header import read_header, scan_header
from moesurgery.errors import CheckpointError


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


META = {"format": "pt"}


def scan(content: bytes, **options: Any) -> Any:
    return scan_header("x.safetensors", len(content), lambda start, n: content[start : start + n], **options)


def codes(content: bytes) -> list[str]:
    return [p.code for p in scan(content).problems]


BAD = {
    "empty": (b"", "S01"),
    "seven bytes": (b"1234567", "S01"),
    "length beyond the file": (file_of({}, length=99), "S01"),
    "length of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "S01"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "S02"),
    "not JSON": (file_of(b'{"a": }'), "S02"),
    "a list": (file_of(b"[]"), "S02"),
    "NaN": (file_of(b'{"__metadata__": {"a": NaN}}'), "S02"),
    "nested too deeply": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "S02"),
    "huge integer": (file_of(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "S02"),
    "repeated name": (
        file_of(
            b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "S03",
    ),
    "repeated key in an entry": (
        file_of(b'{"a": {"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "S03",
    ),
    "unknown dtype": (file_of({"a": entry("F99")}, bytes(8)), "S04"),
    "dtype is a number": (file_of({"a": entry(7)}, bytes(8)), "S04"),  # type: ignore[arg-type]
    "negative shape": (file_of({"a": entry(shape=[-2])}, bytes(8)), "S04"),
    "boolean shape": (file_of({"a": entry("U8", [True], [0, 1])}, bytes(1)), "S04"),
    "fractional shape": (file_of({"a": entry(shape=[2.0])}, bytes(8)), "S04"),
    "overflowing shape": (file_of({"a": entry(shape=[2**40, 2**40], offsets=[0, 8])}, bytes(8)), "S04"),
    "wrong size": (file_of({"a": entry(offsets=[0, 4])}, bytes(4)), "S05"),
    "odd number of 4-bit values": (file_of({"a": entry("F4", [3], [0, 2])}, bytes(2)), "S05"),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "S05"),
    "backward offsets": (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "S05"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "S06"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "S06"),
    "two names on one range": (file_of({"a": entry(), "b": entry()}, bytes(8)), "S06"),
    "does not start at 0": (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "S06"),
    "trailing bytes": (file_of({"a": entry()}, bytes(9)), "S06"),
    "truncated": (file_of({"a": entry()}, bytes(7)), "S06"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "S07"),
    "metadata is a list": (file_of({"__metadata__": []}), "S07"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "S08"),
    "zip": (b"PK\x03\x04" + bytes(40), "S08"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "S08"),
    "HTML": (b"<!DOCTYPE html><html></html>", "S08"),
    "GGUF": (b"GGUF" + bytes(40), "S08"),
    "control character in a name": (file_of({"a\x1b[2J": entry("U8", [1], [0, 1])}, b"x"), "P07"),
    "empty name": (file_of({"": entry("U8", [1], [0, 1])}, b"x"), "P07"),
    "lone surrogate in a name": (file_of(b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "P07"),
    "unknown key": (file_of({"a": entry(extra=1)}, bytes(8)), "S02"),
    "entry is a string": (file_of({"a": "F32"}), "S02"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_found_by_code_and_refused(name: str) -> None:
    content, code = BAD[name]
    assert code in codes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        read_header("x.safetensors", len(content), lambda start, n: content[start : start + n])
    assert caught.value.hint


def test_a_pickle_is_recognised_by_content_not_by_chance() -> None:
    # A header of 0x...80 bytes begins with the pickle protocol's first byte and is no pickle.
    padding = b" " * (0x80 - 2)
    assert codes(file_of(b"{}" + padding)) == ["S07"]


GOOD = {
    "no tensors": file_of({"__metadata__": META}),
    "scalar": file_of({"__metadata__": META, "a": entry(shape=[], offsets=[0, 4])}, bytes(4)),
    "zero-size": file_of({"__metadata__": META, "a": entry(shape=[0, 4], offsets=[0, 0])}),
    "4-bit": file_of({"__metadata__": META, "a": entry("F4", [4], [0, 2])}, bytes(2)),
    "E8M0": file_of({"__metadata__": META, "a": entry("F8_E8M0", [3], [0, 3])}, bytes(3)),
    "padded with spaces": file_of(json.dumps({"__metadata__": META, "a": entry()}).encode() + b" " * 77, bytes(8)),
    "names in another order than the data": file_of(
        {"__metadata__": META, "b": entry(offsets=[8, 16]), "a": entry()}, bytes(16)
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_headers_have_no_problem(name: str) -> None:
    assert codes(GOOD[name]) == []


def test_tensors_come_in_file_order_with_absolute_offsets() -> None:
    content = GOOD["names in another order than the data"]
    header = scan(content)
    assert [t.name for t in header.tensors] == ["a", "b"]
    assert header.tensors[0].start == header.data_start == len(content) - 16


def test_leading_space_and_missing_metadata_are_no_errors_but_are_said() -> None:
    header = scan(file_of(b" " + json.dumps({"a": entry()}).encode(), bytes(8)))
    assert [(p.code, p.fatal) for p in header.problems] == [("S02", False), ("S07", False)]


def test_headers_only_accepts_missing_data_but_not_a_broken_header() -> None:
    whole = file_of({"__metadata__": META, "a": entry()}, bytes(8))
    header = scan(whole[:-8], headers_only=True)
    assert header.data_missing
    assert not header.problems
    assert scan(whole[:20], headers_only=True).problems


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.weight": entry("U8", [1], [i, i + 1]) for i in range(4000)}
    content = file_of({"__metadata__": META, **names}, bytes(4000))
    header = scan(content)
    assert not header.problems
    assert len(header.tensors) == 4000


def test_agrees_with_safetensors_on_what_it_writes(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.randn(4).to(torch.float8_e4m3fn)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "who": "me"})
    content = path.read_bytes()
    header = scan(content)
    assert not header.problems
    assert header.metadata == {"format": "pt", "who": "me"}
    with safe_open(path, "pt") as reference:
        for info in header.tensors:
            found = reference.get_slice(info.name)
            assert list(info.shape) == found.get_shape()
            assert info.dtype == found.get_dtype()
            raw = tensors[info.name].view(torch.uint8).numpy().tobytes()
            assert content[info.start : info.start + info.nbytes] == raw
