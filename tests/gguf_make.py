"""Tiny GGUF files: models that the package gguf writes, and headers made by hand, right or wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

HIDDEN, INTER, LAYERS, EXPERTS, VOCABULARY = 256, 256, 2, 4, 16
QUANTISED = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"})


def of_type(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Return random weights of a type: quantised by gguf where it can, else random blocks with small factors."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind in QUANTISED:
        return np.asarray(quantize(values, GGMLQuantizationType[kind]))
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), np.uint8)
    blocks[..., 0:4] = np.array([0.01, 0.02], "<f2").view(np.uint8)  # the factors of most types
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, ()):
        blocks[..., at : at + 2] = np.array([0.01], "<f2").view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    kind: str = "F32",
    *,
    architecture: str = "qwen3moe",
    experts: int = EXPERTS,
    parts: int = 1,
    bias: bool = False,
    dense: int = 0,
    predicting: int = 0,
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny model of experts of one type with the package gguf; return its first file.

    The first `dense` blocks have no experts; `predicting` blocks for multi-token prediction are written behind the
    others, and a list in `keys` has an entry for every block.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture, split_max_tensors=-(-(10 * LAYERS + 2) // parts) if parts > 1 else 0)
    writer.add_name("Tiny")
    writer.add_size_label("4x1K")
    writer.add_block_count(LAYERS + predicting)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_expert_feed_forward_length(INTER)
    writer.add_head_count(4)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    if dense:
        writer.add_leading_dense_block_count(dense)
    for key, value in (keys or {}).items():
        add_key = {float: writer.add_float32, list: writer.add_array}.get(type(value), writer.add_uint32)
        add_key(f"{architecture}.{key}", value)

    def add(name: str, shape: tuple[int, ...], dtype: str = "F32") -> None:
        raw = None if dtype in ("F32", "F16") else GGMLQuantizationType[dtype]
        writer.add_tensor(name, of_type(rng, shape, dtype), raw_dtype=raw)

    def add_block(layer: int) -> None:
        add(f"blk.{layer}.attn_norm.weight", (HIDDEN,))
        for projection in ("q", "k", "v"):
            add(f"blk.{layer}.attn_{projection}.weight", (HIDDEN, HIDDEN), kind)
        add(f"blk.{layer}.ffn_norm.weight", (HIDDEN,))
        projections = (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER))
        if layer < dense:
            for projection, rows, columns in projections:
                add(f"blk.{layer}.ffn_{projection}.weight", (rows, columns), kind)
            return
        add(f"blk.{layer}.ffn_gate_inp.weight", (experts, HIDDEN))
        if bias:
            add(f"blk.{layer}.exp_probs_b.bias", (experts,))
        for projection, rows, columns in projections:
            add(f"blk.{layer}.ffn_{projection}_exps.weight", (experts, rows, columns), kind)

    add("token_embd.weight", (VOCABULARY, HIDDEN), kind)
    for layer in range(LAYERS):
        add_block(layer)
    add("output_norm.weight", (HIDDEN,))
    for layer in range(LAYERS, LAYERS + predicting):
        add_block(layer)
        add(f"blk.{layer}.nextn.eh_proj.weight", (HIDDEN, 2 * HIDDEN), kind)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            add(f"blk.{layer}.nextn.{norm}.weight", (HIDDEN,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def stored_arrays(*paths: Path) -> dict[str, np.ndarray]:
    """Return the stored bytes of all tensors, [experts, rows, bytes of a row], as the package gguf reads them."""
    return {tensor.name: np.array(tensor.data) for path in paths for tensor in GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    """Return the metadata as the package gguf reads them."""
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


Key = tuple[str, int, Any]
Tensor = tuple[str, Sequence[int], int, int]  # name, sizes in GGUF's order, type, offset
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
KEYS: list[Key] = [
    ("general.architecture", 8, "qwen3moe"),
    ("qwen3moe.block_count", 4, 1),
    ("qwen3moe.context_length", 4, 64),
    ("qwen3moe.embedding_length", 4, 32),
    ("qwen3moe.attention.head_count", 4, 4),
    ("qwen3moe.expert_count", 4, 2),
    ("qwen3moe.expert_used_count", 4, 1),
    ("tokenizer.ggml.tokens", 9, (8, ["a", "b"])),
]
TENSORS: list[Tensor] = [
    ("token_embd.weight", (32, 2), 0, 0),
    ("blk.0.ffn_gate_inp.weight", (32, 2), 0, 256),
    ("blk.0.ffn_gate_exps.weight", (32, 32, 2), 2, 512),
    ("blk.0.ffn_up_exps.weight", (32, 32, 2), 2, 1664),
    ("blk.0.ffn_down_exps.weight", (32, 32, 2), 2, 2816),
]
DATA = 3968  # bytes of these tensors


def text_bytes(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key_bytes(key: str | bytes, kind: int, value: Any) -> bytes:
    """Return one key with its value: a number, a text, (type, entries) for an array, or bytes as they are."""
    head = text_bytes(key) + struct.pack("<I", kind)
    if isinstance(value, bytes):
        return head + value
    if kind == 8:
        return head + text_bytes(value)
    if kind != 9:
        return head + struct.pack("<" + _LETTERS[kind], value)
    inner, entries = value
    body = b"".join(text_bytes(e) if inner == 8 else struct.pack("<" + _LETTERS[inner], e) for e in entries)
    return head + struct.pack("<IQ", inner, len(entries)) + body


def header_bytes(
    keys: Sequence[Key] = KEYS,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    data: int = DATA,
    alignment: int = 32,
) -> bytes:
    """Return a whole file: header, padding, and data of ones. `counts` are those of tensors and keys that it states."""
    stated = [len(given) if count is None else count for given, count in zip((tensors, keys), counts, strict=True)]
    content = magic + struct.pack("<IQQ", version, *stated) + b"".join(key_bytes(*key) for key in keys)
    for name, sizes, kind, offset in tensors:
        content += text_bytes(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        content += struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % alignment) + b"\x01" * data
