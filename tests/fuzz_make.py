"""How the inputs of `tests.fuzz` are made: what is right, changed in a few places, by a random generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

WIDTH = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
HOSTILE: list[Any] = [
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        2**31,
        2**53,
        2**63,
        2**64,
        10**40,
        -(2**63),
        0.5,
        1.5,
        -0.0,
        1e300,
        float("inf"),
        float("nan"),
    ),
    *(True, False, None, "", "..", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "\ud800", "::error::", "[/bold]", "#"),
    *("BF16", "F32", "x" * 9999, "model.layers.0", "F8_E4M3", "0", "-1", "1e9", "٣", "mixtral", "qwen3_moe", "llama"),
    *(
        [],
        {},
        [[]],
        [0, 0],
        [0, 8],
        [2**62, 2**62],
        [-1],
        {"": {}},
        "config.json",
        ".",
        "model.safetensors",
        "hf://a/b",
    ),
    *(["full_attention"], ["sparse", "dense"], {"a": {"b": {"c": []}}}, [None], ["", ""], [1.5], "1,2,3", "E-M*"),
]
WORDS = ["weight", "experts", "router", "layers", "mlp", "gate", "value", "filter", "model", "source", "name"]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return any value that JSON can hold."""
    kind = rng.randrange(10)
    if kind < 7 or depth > 3:
        return copy.deepcopy(rng.choice(HOSTILE))
    if kind == 7:
        return rng.choice([rng.randrange(-9, 99), rng.random() * 10 ** rng.randrange(-9, 9), rng.choice(WORDS)])
    many = range(rng.randrange(4))
    return (
        [value(rng, depth + 1) for _ in many] if kind == 8 else {rng.choice(WORDS): value(rng, depth + 1) for _ in many}
    )


def _places(whole: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value at any depth."""
    items = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    for key, inner in items:
        found.append((whole, key))
        _places(inner, found)
    return found


def changed(rng: random.Random, good: Any) -> Any:
    """Return `good` with a few values at any depth replaced, left out, repeated, moved or put under another name."""
    whole = copy.deepcopy(good)
    for _ in range(rng.randrange(1, 4)):
        places = _places(whole, [])
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(9)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice([*WORDS, str(value(rng))[:40]])] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice([0, 2, 9])
        elif kind == 3:
            other, place = rng.choice(places)
            if (isinstance(other, dict) and place in other) or (isinstance(other, list) and place < len(other)):
                holder[key] = copy.deepcopy(other[place])
        elif kind == 4 and type(holder[key]) in (int, float):
            holder[key] = holder[key] * rng.choice([-1, 2, 0, 10**6, 0.5]) + rng.choice([0, 1, -1])
        elif kind == 5 and isinstance(holder[key], str):
            holder[key] = damaged(rng, holder[key].encode("utf-8", "replace")).decode("utf-8", "replace")
        else:
            holder[key] = value(rng)
    return whole


def damaged(rng: random.Random, good: bytes) -> bytes:
    """Return `good` with bytes changed, cut out, doubled or put in."""
    data = bytearray(good)
    for _ in range(rng.randrange(1, 5)):
        at, much, kind = rng.randrange(len(data) + 1), rng.randrange(17), rng.randrange(4)
        if kind == 0:
            data[at : at + much] = rng.randbytes(rng.randrange(17))
        elif kind == 1 and rng.random() < 0.5:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + much] * rng.randrange(1, 50)
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def as_json(whole: Any) -> bytes:
    return json.dumps(whole).encode("utf-8", "replace")


def changed_json(rng: random.Random, good: Any) -> bytes:
    return damaged(rng, as_json(good)) if rng.random() < 0.2 else as_json(changed(rng, good))


Tensors = Mapping[str, tuple[str, list[int]]]


def changed_tensors(rng: random.Random, good: Tensors) -> dict[str, tuple[str, list[int]]]:
    """Return names, dtypes and shapes with a few of them wrong, in a way that a header may have them."""
    found = {name: (dtype, list(shape)) for name, (dtype, shape) in good.items()}
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(sorted(found)) if found else "a"
        dtype, shape = found.get(name, ("F32", [1]))
        numbers = [part for part in name.split(".") if part.isdigit()]
        kind = rng.randrange(9)
        if kind == 0:
            found.pop(name, None)
        elif kind == 1 and numbers:
            number = rng.choice(["#", "00", "007", "99", "1000000", "9" * 30, "٣", "-1", "", "1e3", "*", "[0-7]"])
            found[name.replace(f".{rng.choice(numbers)}.", f".{number}.", 1)] = (dtype, shape)
        elif kind == 2:
            found[name] = (
                dtype,
                rng.choice([[], [1], [0], [1, 1, 1, 1], shape[::-1], shape[1:], [*shape, 1], [0, *shape]]),
            )
        elif kind == 3:
            found[name] = (rng.choice(sorted(WIDTH)), shape)
        elif kind == 4:
            found[
                name + rng.choice([".bias", "_scale_inv", ".weight", ".qweight", "_blocks", "_scales", ".lora_A"])
            ] = (
                rng.choice(sorted(WIDTH)),
                shape,
            )
        elif kind == 5 and shape:
            at = rng.randrange(len(shape))
            found[name] = (dtype, [*shape[:at], rng.choice([0, 1, 3, shape[at] * 2, shape[at] + 1]), *shape[at + 1 :]])
        elif kind == 6:
            found[rng.choice(["x", "#", "a" * 300, "model.layers.0", "layers.0.", ".", "mtp.0.x", "vision.a"])] = (
                dtype,
                shape,
            )
        elif kind == 7:
            other = rng.choice(sorted(found)) if found else "b"
            found[other], found[name] = (dtype, shape), found.get(other, ("F32", [1]))
        else:
            found[damaged(rng, name.encode()).decode("utf-8", "replace")] = (dtype, shape)
    return found


def safetensors(
    tensors: Tensors, metadata: Mapping[str, str] | None = None, fill: Callable[[int], bytes] | None = None
) -> tuple[bytes, int]:
    """Return a file up to its data (or whole, with `fill`), and how long it is with the data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = WIDTH[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode("utf-8", "replace")
    start = len(text).to_bytes(8, "little") + text
    return (start + fill(at) if fill else start), len(start) + at
